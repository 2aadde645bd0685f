"""Trees of parameters for tests."""


def nest(flat: dict) -> dict:
  """{"a.b": 1} -> {"a": {"b": 1}}."""
  tree = {}
  for path, leaf in flat.items():
    *branches, name = path.split(".")
    branch = tree
    for b in branches:
      branch = branch.setdefault(b, {})
    branch[name] = leaf
  return tree
