"""`python -m cpt_jax.cli COMMAND ...`: the program `cpt`, in a clone that is not installed."""

from cpt_jax.cli import app

if __name__ == "__main__":
  app.entry()
