"""A store -> whether every file of it is as it was written.

Invariant: reads all of it, changes nothing.
"""

from cpt_jax.store.documents import DataError
from cpt_jax.store.token_store import open_store


def verify(path: str) -> str:
  """A line for people.
  Raises ConfigError: no whole store there, or one without digests; DataError: files that are not what was written, a line each.
  """
  opened = open_store(path)
  damaged = opened.verify()
  if damaged:
    raise DataError("\n".join([f"{path}: damaged; copy it again or make it again:", *damaged]))
  return f"{path}: whole; {opened.num_documents:,} documents, {opened.num_tokens:,} tokens"
