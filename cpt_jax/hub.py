"""The path of a model that is not there -> how to get it, where it is the name of a model on the Hugging Face hub.

Invariant: nothing is looked up and nothing is downloaded.
"""

import os
import pathlib
import re


def how_to_get(path: str | os.PathLike) -> str:
  """What an error message goes on with: "; if meta/llama is a model of the hub, ..."; "" for what is no such name."""
  name = str(path)
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or pathlib.Path(name).parent.exists():
    return ""
  directory = f"models/{name.split('/')[1]}"
  return (
    f"; if {name} is a model of the Hugging Face hub, get it with: hf download {name} --local-dir {directory}, and name "
    f"{directory}"
  )
