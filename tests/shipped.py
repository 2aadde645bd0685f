"""What is shipped beside the package, for tests: the texts of the examples."""

import gzip
import json


def poems(root, num_bytes, *, name="poetry_ci"):
  texts, total = [], 0
  with gzip.open(root / "examples" / "corpora" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
    while total < num_bytes:
      texts.append(json.loads(next(file))["text"])
      total += len(texts[-1].encode())
  return texts
