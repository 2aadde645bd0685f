"""Tokenizers and text -> does a vocabulary fit, what would more pieces save, and is growing it worth it.

Invariant: nothing is trained; every answer shows the rules that it follows from.

The first tokenizer is your base's, the others are alternatives. Exit codes: 0 done, 65 bad text, 74 disk, 78 wrong settings.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone that is not installed

from cpt_jax import durations
from cpt_jax.config import ConfigError, Problems
from cpt_jax.store import corpus, documents
from cpt_jax.store import tokenizer as tokenizer_lib
from cpt_jax.store.store import write_atomically
from cpt_jax.training import console
from cpt_jax.vocab import assess, verdict
from cpt_jax.vocab import texts as texts_lib
from cpt_jax.vocab.assess import Assessment

_TOKENIZERS = flags.DEFINE_list("tokenizers", [], "Hugging Face directories, tokenizer.json or *.model files; your base first.")
_DOMAIN = flags.DEFINE_multi_string("domain", [], "Text files or globs of what is to be learnt; repeatable.")
_GENERAL = flags.DEFINE_multi_string("general", [], "Text files or globs of text like the base's own; repeatable.")
_DOMAIN_GB = flags.DEFINE_float("domain_gb", None, "Domain text that exists in all, 10^9 bytes, where --domain is a part of it.")
_BUDGET = flags.DEFINE_string("budget", "", "Tokens of domain text that the run would read, e.g. '2B tokens'.")
_OUTPUT = flags.DEFINE_string("output", "", "A file for all figures, e.g. assessment.json; by default they are only printed.")


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags, checked."""

  domain: list[str]
  general: list[str]
  budget_tokens: float | None
  domain_bytes: float | None


def read_flags(problems: Problems) -> Request:
  """The flags; what is wrong with them goes to `problems`."""
  files: dict[str, list[str]] = {"domain": [], "general": []}
  for name, flag in ("domain", _DOMAIN), ("general", _GENERAL):
    if not flag.value:
      problems.add(f"--{name} is empty: name text files, e.g. --{name} 'texts/{name}/*.jsonl.gz'")
      continue
    with problems.collect():
      files[name] = documents.find_files(flag.value, flag=f"--{name}")
  if not _TOKENIZERS.value:
    problems.add("--tokenizers is empty: name the base's Hugging Face directory, then others to compare it with")
  if len(set(_TOKENIZERS.value)) < len(_TOKENIZERS.value):
    problems.add(f"--tokenizers={','.join(_TOKENIZERS.value)}: names one twice")
  if _DOMAIN_GB.value is not None and _DOMAIN_GB.value <= 0:
    problems.add(f"--domain_gb={_DOMAIN_GB.value}: give 10^9 bytes above 0")
  budget_tokens = None
  if _BUDGET.value:
    try:
      budget_tokens = durations.parse_tokens(_BUDGET.value)
    except ValueError as error:
      problems.add(f"--budget={error}")
  domain_bytes = None if _DOMAIN_GB.value is None else _DOMAIN_GB.value * 1e9
  return Request(files["domain"], files["general"], budget_tokens, domain_bytes)


def run(request: Request, opened: list[tokenizer_lib.Tokenizer]) -> tuple[list[Assessment], dict[str, corpus.Text]]:
  """Reads both texts once and measures every tokenizer on them."""
  sampler = texts_lib.Sampler(
    wanted_bytes=assess.SAMPLE_BYTES, there_bytes=texts_lib.total_bytes(request.domain), heldout_frac=assess.HELDOUT_FRAC
  )
  counted, found = {}, []
  with console.progress() as bar:
    for name, files in ("domain", request.domain), ("general", request.general):
      task = bar.add_task(f"{name}: count tokens (kB)", total=sum(os.path.getsize(file) for file in files) // 1000)
      read = [0]

      def advance(num_bytes: int, task=task, read=read) -> None:
        read[0] += num_bytes
        bar.update(task, completed=read[0] // 1000)

      batches = texts_lib.batches(texts_lib.parts(files, on_bytes=advance))
      counted[name] = assess.count(opened, batches, on_part=sampler.add if name == "domain" else lambda _: None)
    texts = {name: side.text for name, side in counted.items()}
    task = bar.add_task("try pieces on held-out text", total=len(opened))
    sample, own_tokens = sampler.sample, {}
    for at, (path, tokenizer) in enumerate(zip(_TOKENIZERS.value, opened, strict=True)):
      size = min(corpus.OWN_VOCAB_SIZE, tokenizer.vocab_size)
      if size not in own_tokens:
        own_tokens[size] = corpus.own_vocabulary_tokens(sample.train, sample.heldout, vocab_size=size)
      assessment = assess.assess(
        path,
        tokenizer,
        counted["domain"].halves_2V[at],
        counted["general"].halves_2V[at],
        domain_text=texts["domain"],
        general_text=texts["general"],
        sample=sample,
        own_tokens=own_tokens[size],
        domain_bytes=request.domain_bytes,
        budget_tokens=request.budget_tokens,
      )
      found.append(assessment)
      bar.advance(task)
  return found, texts


def show(found: list[Assessment], texts: dict[str, corpus.Text]) -> None:
  """The tables: fit, distance, curve, rules, precedents."""
  for name, text in texts.items():
    scripts = ", ".join(f"{script} {share:.0%}" for script, share in list(text.scripts.items())[:3] if share >= 0.005)
    console.say(f"{name:<8} {console.count(text.bytes)} bytes, letters: {scripts or 'none'}; counted per {text.unit}")
  console.say("")
  rows = []
  for each in found:
    for name, side in ("domain", each.domain), ("general", each.general):
      rows.append([each.name if name == "domain" else "", f"{each.vocab_size:,}" if name == "domain" else "", name])
      rows[-1] += [f"{side.bytes_per_token:.2f}", f"{side.fertility:.2f}", f"{side.byte_frac:.1%}", f"{side.unknown_frac:.2%}"]
      rows[-1] += [f"{side.used_frac:.0%}", console.count(side.tokens)]
  console.table(
    "how the vocabularies fit",
    ["tokenizer", "size", "text", "bytes/token", "tokens/unit", "byte tokens", "unknown", "vocab used", "tokens"],
    rows,
  )
  show_curves(found)
  rows = []
  for rule in verdict.RULES.values():
    findings = [each.findings[rule.name] for each in found]
    cells = [f"{amount(f.value, rule.unit)} {'*' if f.met else ' '}" for f in findings]
    rows.append([rule.name, rule.figure, f"{rule.sign} {amount(rule.threshold, rule.unit)}", *cells])
  console.table("rules (* = met)", ["rule", "figure", "threshold", *(each.name for each in found)], rows, left=2)
  console.say(
    "the vocabulary does not fit where far is met with own saves or bytes, or where unknown is; growing asks for enough text too"
  )
  noise = ", ".join(f"{each.distance_bits:.3f} less {each.noise_bits:.3f} of noise" for each in found)
  console.say(f"far, in bits: {noise}\n")
  show_precedents(found[0])


def show_curves(found: list[Assessment]) -> None:
  """Tokens saved by adding pieces, on held-out documents."""
  sizes = sorted({point.num_pieces for each in found for point in each.curve})
  rows = []
  for size in sizes:
    points = [next((point for point in each.curve if point.num_pieces == size), None) for each in found]
    parameters = next((point.new_parameters for point in points if point and point.new_parameters is not None), None)
    cells = ["" if point is None else f"{point.saved_frac:.1%} ({point.context_gain:.2f}x)" for point in points]
    rows.append([f"{size:,}", *cells, "" if parameters is None else console.count(parameters)])
  title = "tokens saved by adding so many pieces, on documents that they were not chosen from (text in a context)"
  console.table(title, ["pieces", *(each.name for each in found), "parameters (first that tells)"], rows)
  for each in found:
    if each.cannot_grow:
      console.say(f"{each.name}: {each.cannot_grow}")


def show_precedents(first: Assessment) -> None:
  """What runs with a changed vocabulary needed, beside what there is."""
  rows = []
  for precedent in verdict.PRECEDENTS:
    needed = "?" if precedent.tokens is None else console.count(precedent.tokens)
    rows.append(
      [precedent.name, precedent.added, precedent.outcome, needed, f"{first.text_tokens / (precedent.tokens or 1):.2g}x"]
    )
  title = f"published runs; there are {console.count(first.text_tokens)} tokens here, {verdict.REPEATS} readings counted"
  console.table(title, ["run", "change", "outcome", "after tokens", "there are"], rows, left=3)


def amount(value: float | None, unit: str) -> str:
  """A figure in its unit."""
  if value is None:
    return "?"
  return {"%": f"{value:.1%}", "tokens": console.count(value)}.get(unit, f"{value:.2f} {unit}")


def show_answers(found: list[Assessment]) -> str:
  """An answer for each tokenizer, then the one for the base; returns the latter."""
  for each in found:
    console.say(f"{each.name}: {each.answer.upper()}: {each.because}")
  first, other = found[0], assess.better(found)
  if other is None:
    answer = first.answer
    if answer == verdict.OTHER_BASE:
      compared = "none of those compared fits" if len(found) > 1 else "compare some with --tokenizers base,other"
      console.say(f"\n{answer.upper()}, one whose vocabulary fits ({compared}); if there is none, keep this vocabulary")
    else:
      console.say(f"\n{answer.upper()}")
    return answer
  gain = other.domain.bytes_per_token / first.domain.bytes_per_token
  console.say(f"\nCHOOSE ANOTHER BASE: {other.name} fits the text, and spells it in {1 / gain:.0%} of {first.name}'s tokens")
  return verdict.OTHER_BASE


def main(argv: list[str]) -> int:
  """Exit code, after printing the assessment or what is wrong."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ConfigError(f"unexpected arguments {argv[1:]}: quote globs against the shell")
    problems = Problems()
    request = read_flags(problems)
    opened = []
    for path in _TOKENIZERS.value:
      with problems.collect():
        opened.append(tokenizer_lib.load(path))
    problems.raise_if_any()
    found, texts = run(request, opened)
    show(found, texts)
    answer = show_answers(found)
    if _OUTPUT.value:
      record: dict[str, Any] = {"command": sys.argv, "answer": answer, "texts": {n: t._asdict() for n, t in texts.items()}}
      record["tokenizers"] = [plain(each) for each in found]
      write_atomically(pathlib.Path(_OUTPUT.value), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
      console.say(f"wrote {_OUTPUT.value}")
  except (ConfigError, OSError) as error:
    print(error, file=sys.stderr)
    return error.exit_code if isinstance(error, ConfigError) else 74
  return 0


def plain(assessment: Assessment) -> dict[str, Any]:
  """An assessment for JSON."""
  record = {field.name: getattr(assessment, field.name) for field in dataclasses.fields(assessment)}
  record |= {side: record[side]._asdict() for side in ("domain", "general")}
  record["curve"] = [point._asdict() for point in assessment.curve]
  record["findings"] = {
    name: {"value": f.value, "threshold": f.rule.threshold, "sign": f.rule.sign, "met": f.met, "basis": f.rule.basis}
    for name, f in assessment.findings.items()
  }
  return record


if __name__ == "__main__":
  app.run(main)
