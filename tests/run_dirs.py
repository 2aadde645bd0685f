"""Run directories written by hand, as training.loop leaves them."""

import json

from cpt_jax import config as config_lib
from cpt_jax.planning import execute


def write_run(path, config, *, final, base=(3.0, 4.0), steps=None, read=(100, 300), complete=True):
  """A run directory as training.loop leaves it, with these held-out losses of general and poetry."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(execute.config_json(config)))
  num_steps = steps or config_lib.num_steps(config)
  lines = []
  for step, losses in ((0, base), (num_steps, final)):
    sources = {name: {"loss": loss} for name, loss in zip(("general", "poetry"), losses, strict=True)}
    lines += [{"step": step, "kind": "train", "loss": 3.3}, {"step": step, "kind": "eval", "sources": sources}]
  (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "ki')
  entries = [{"source": name, "tokens": tokens} for name, tokens in zip(("general", "poetry"), read, strict=True)]
  (path / "ledger.jsonl").write_text(json.dumps({"step": num_steps, "sources": entries}) + "\n")
  if complete:
    (path / "summary.json").write_text(json.dumps({"step": num_steps}))
