"""The plan of examples/plans/poetry.py on the texts of software licences instead. The base has seen no legal English.

Run:   cpt plan --config=tools/experiments/legal.py --output=plan/legal
"""

from cpt_jax import config as config_lib


def get_config():
  c = config_lib.load_file("examples/plans/poetry.py")
  del c.data.sources["poetry"]
  text = "store/text/legal/licence-texts.txt"
  c.data.sources.legal = config_lib.source(store="store/legal", text=text, role="domain", share=0.75)
  return c
