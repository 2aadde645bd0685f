"""What is shipped beside the package, for tests: the texts of the examples and the tools."""

import gzip
import json
import subprocess
import sys


def poems(root, num_bytes, *, name="poetry_ci"):
  texts, total = [], 0
  with gzip.open(root / "examples" / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
    while total < num_bytes:
      texts.append(json.loads(next(file))["text"])
      total += len(texts[-1].encode())
  return texts


def run_tool(root, name, *arguments):
  command = [sys.executable, str(root / "tools" / name), *map(str, arguments)]
  return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
