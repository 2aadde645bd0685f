"""A base and the sources that it is to learn -> a Diagnosis: what was measured, the verdicts, and the command to begin with.

Invariant: nothing is trained; all that is wrong with what was asked is said at once, before anything is prepared or measured.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from cpt_jax import config as config_lib, journal, shipped
from cpt_jax.config import Problems
from cpt_jax.diagnosis import measure, verdict
from cpt_jax.diagnosis.measure import Base
from cpt_jax.diagnosis.verdict import Figures, Verdict
from cpt_jax.progress import Progress
from cpt_jax.store import documents, prepare, token_store
from cpt_jax.stream.sources import least_heldout_frac, too_few_documents
from cpt_jax.training import checkpoint

TOKENS = 50_000  # of each source that the base is evaluated on, at most


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """What `diagnose` found."""

  base: Base
  general: str
  settings: dict[str, Any]
  base_peak_lr: float | None
  figures: dict[str, Figures]  # of every source
  verdicts: list[Verdict]  # of all but the general one
  commands: dict[str, str]  # source -> the command that says what its run would do
  prepared: list[str]  # what is to be said of the stores that were made of text
  notes: list[str]
  output: pathlib.Path

  @property
  def tables(self) -> dict[str, dict[str, list[Any]]]:
    """Columns of what was measured, a row for each source: `tables["base"]["loss"]`; also store, vocabulary, distance, ..."""
    kinds = [name for name in Figures._fields if name != "source"]
    made = {}
    for kind in kinds:
      rows = [getattr(figures, kind) for figures in self.figures.values()]
      made[kind] = {"source": list(self.figures)} | {name: [getattr(row, name) for row in rows] for name in rows[0]._fields}
    return made

  def as_json(self) -> dict[str, Any]:
    """What diagnosis.json holds."""
    base = self.base
    return {
      "command": sys.argv,
      "base": {"path": base.path, "context": base.spec.max_positions, "tokenizer": base.tokenizer.fingerprint}
      | {"peak_lr": self.base_peak_lr},
      "general": self.general,
      "settings": self.settings,
      "sources": {name: _plain(figures) for name, figures in self.figures.items()},
      "rules": [_plain(rule) for rule in verdict.RULES.values()],
      "verdicts": [
        _plain(v._replace(findings=()))
        | {"findings": {f.rule.name: {"value": f.value, "met": f.met} for f in v.findings}}
        | {"begin": _plain(verdict.PRACTICES[v.practice]) if v.practice else None}
        | {"next_command": self.commands.get(v.source)}
        for v in self.verdicts
      ],
      "versions": checkpoint.versions(),
    }


def diagnose(
  hf: str | os.PathLike, sources: Mapping[str, str | os.PathLike] | Iterable[str], *, general: str = "", tokens: int = TOKENS,
  budget: str = "", base_peak_lr: float | None = None, heldout_frac: float | None = None, row_len: int = 0,
  output: str | os.PathLike = "",
) -> Diagnosis:  # fmt: skip
  """Measures a base on every source beside the general one, judges what training it asks for, and writes diagnosis.json.

  >>> cpt_jax.diagnose("examples/base", {"general": "store/en", "law": "store/law"}, general="general")  # doctest: +SKIP

  Args:
    hf: the base, a Hugging Face directory.
    sources: name -> token store, or text to make one of; or texts "NAME=PATH,NAME=PATH".
    general: the source that is like the base's own text; "" = the one named general, else the first.
    tokens: of each source that the base is evaluated on, at most.
    budget: tokens of the planned run, e.g. "2B tokens"; "" = not known.
    base_peak_lr: of the base's own pretraining, where it is known.
    heldout_frac: as data.heldout_frac of the run.
    row_len: positions of an evaluation row; 0 = as a run has them, within the base's context.
    output: where diagnosis.json and stores made of text go; "" = diagnosis, or the first diagnosis_N that is free.

  Raises:
    ConfigError: all that is wrong with the settings, the base and the sources.
    DataError: text that cannot be read.
  """
  problems = Problems()
  paths = _read_sources(sources, problems)
  general = _general(general, paths, problems)
  budget_tokens = _budget(budget, problems)
  held_frac: float = config_lib.default().data.heldout_frac if heldout_frac is None else heldout_frac
  if base_peak_lr is not None and not 0 < base_peak_lr < 1:
    problems.add(f"--base_peak_lr={base_peak_lr}: a rate between 0 and 1, e.g. 3e-4")
  if not 0 < held_frac < 1:
    problems.add(f"--heldout_frac={held_frac}: must lie between 0 and 1, e.g. 0.01")
  folder = pathlib.Path(output) if output else _free_directory("diagnosis")
  if folder.exists() and not folder.is_dir():
    problems.add(f"--output={folder}: is a file; name a directory")
  base = measure.open_base(shipped.find(os.fspath(hf)), problems)
  opened, prepared = _open(paths, base, folder, problems)
  assert base is not None

  row_len = measure.row_len(base, row_len)
  figures = _measure(base, opened, general=general, tokens=tokens, heldout_frac=held_frac, row_len=row_len)
  verdicts = [verdict.judge(figures[name], figures[general], budget_tokens=budget_tokens) for name in figures if name != general]
  unsure = [name for name, of_source in figures.items() if not math.isfinite(of_source.base.bits_per_byte_error)]
  commands, notes = {}, [f"{name}: too few documents to say how sure its loss is; give more text" for name in unsure]
  for one in verdicts:
    if one.practice:
      pair = {name: opened[name] for name in (general, one.source)}
      held, of_pair = _heldout(pair, held_frac)
      notes += [note for note in of_pair if note not in notes]
      commands[one.source] = _command(one, base, pair, held=held, budget_tokens=budget_tokens, base_peak_lr=base_peak_lr)
  settings = {"tokens": tokens, "heldout_frac": held_frac, "row_len": row_len, "budget_tokens": budget_tokens}
  found = Diagnosis(base, general, settings, base_peak_lr, figures, verdicts, commands, prepared, notes, folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
  journal.write_atomically(folder / "diagnosis.json", text.encode())
  return found


def _read_sources(sources: Mapping[str, str | os.PathLike] | Iterable[str], problems: Problems) -> dict[str, str]:
  """name -> path; what is wrong with names goes to `problems`."""
  if isinstance(sources, Mapping):
    entries = [(f"{name}={path}", str(name), str(path)) for name, path in sources.items()]
  else:
    texts = [entry for text in sources for entry in text.split(",") if entry]
    entries = [(text, *text.partition("=")[::2]) for text in texts]
  paths: dict[str, str] = {}
  for entry, name, path in entries:
    if not (path and name.isidentifier()):
      problems.add(f"--sources {entry!r}: write NAME=STORE, the name of letters, digits and underscores, e.g. law=store/law")
    elif name in paths:
      problems.add(f"--sources {entry!r}: {name} is {paths[name]} already; give every source a name of its own")
    else:
      paths[name] = shipped.find(path)
  if len(paths) < 2:
    problems.add("--sources: name the general source and at least one to learn, e.g. --sources general=store/en,domain=store/law")
  return paths


def _general(general: str, paths: Mapping[str, str], problems: Problems) -> str:
  general = general or ("general" if "general" in paths else next(iter(paths), ""))
  if paths and general not in paths:
    known = list(paths)
    problems.add(f"--general={general}: there is no such source.{config_lib.did_you_mean(general, known)} There are {known}.")
  return general


def _budget(budget: str, problems: Problems) -> float | None:
  try:
    return config_lib.parse_tokens(budget) if budget else None
  except ValueError as error:
    problems.add(f"--budget={error}")
    return None


def _free_directory(name: str) -> pathlib.Path:
  """`name`, or the first of name_2, name_3, ... that does not exist."""
  number, path = 1, pathlib.Path(name)
  while path.exists():
    number += 1
    path = pathlib.Path(f"{name}_{number}")
  return path


def _open(
  paths: dict[str, str], base: Base | None, output: pathlib.Path, problems: Problems
) -> tuple[dict[str, token_store.TokenStore], list[str]]:
  """The stores by name, those of text made below `output`, and what is to be said of these; raises all problems first."""
  texts = {}
  for name, path in paths.items():
    is_text = bool(documents.file_kind(path)[0]) or any(c in path for c in "*?[")
    if is_text and not pathlib.Path(path).is_dir():
      with problems.collect():
        documents.find_files([path], flag=f"--sources {name}")
        texts[name] = output / "stores" / name
  opened = {name: measure.open_store(name, path, base, problems) for name, path in paths.items() if name not in texts}
  problems.raise_if_any()  # before anything is prepared
  assert base is not None
  said = []
  for name, directory in texts.items():
    said += prepare.prepare([paths[name]], tokenizer=base.path, output=str(directory)).lines()
    opened[name] = measure.open_store(name, str(directory), base, problems)
  problems.raise_if_any()
  return {name: opened[name] for name in paths}, said  # pyright: ignore[reportReturnType] - none is None without problems


def _measure(
  base: Base, opened: dict[str, token_store.TokenStore], *, general: str, tokens: int, heldout_frac: float, row_len: int
) -> dict[str, Figures]:
  samples, held = {}, {}
  with Progress() as progress:
    for number, (name, store) in enumerate(opened.items()):
      advance = progress.part(f"read {name}", 1)
      samples[name] = measure.describe(store, base)
      held[name] = measure.hold_out(name, number, store, base, max_tokens=tokens, heldout_frac=heldout_frac, row_len=row_len)
      advance(1)
    losses = measure.evaluate(base, held, config=config_lib.default(), progress=progress)
  return measure.gather(samples, losses, general=general, vocab_size=base.spec.vocab_size)


def _plain(value: Any) -> Any:
  """NamedTuples as objects, for JSON."""
  if hasattr(value, "_asdict"):
    return {key: _plain(entry) for key, entry in value._asdict().items()}
  if isinstance(value, dict):
    return {key: _plain(entry) for key, entry in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None  # an error that cannot be told
  return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _command(
  one: Verdict, base: Base, pair: dict[str, token_store.TokenStore], *, held: float, budget_tokens: float | None,
  base_peak_lr: float | None,
) -> str:  # fmt: skip
  """The command that says what the run on (general, source) would do, ready to be given."""
  practice = verdict.PRACTICES[one.practice]
  learnt = "language" if one.practice == "language" else "domain"
  recipe: Any = config_lib.load_file(str(shipped.root() / practice.config))
  row_len = base.spec.max_positions if one.practice == "long" else min(recipe.data.row_len, base.spec.max_positions)
  general, source = pair.values()
  keys: dict[str, Any] = {
    "start.hf": base.path, "data.sources.general.store": str(general.path), f"data.sources.{learnt}.store": str(source.path),
  }  # fmt: skip
  if learnt == "domain":  # the language recipe has a ramp
    share = practice.replay[1]
    keys |= {"data.sources.general.share": f"{share:g}", "data.sources.domain.share": f"{1 - share:g}"}
  if row_len != recipe.data.row_len:
    keys["data.row_len"] = row_len
  if held != config_lib.default().data.heldout_frac:
    keys["data.heldout_frac"] = f"{held:g}"
  if budget_tokens is not None:
    keys["train.length"] = f"{budget_tokens:g} tokens"
  if base_peak_lr is not None:
    peak = practice.rate[1] * base_peak_lr
    keys |= {"schedule.lr_peak": f"{peak:.2g}", "schedule.lr_final": f"{peak / (100 if learnt == 'domain' else 10):.2g}"}
  options = [f"--config={practice.config}", *(f"--config.{key}={shlex.quote(str(value))}" for key, value in keys.items())]
  options += [f"--workdir=runs/{one.source}", "--dry_run"]
  return " \\\n    ".join(["cpt train", *options])


def _heldout(pair: dict[str, token_store.TokenStore], wanted: float) -> tuple[float, list[str]]:
  """`wanted`, or the least share (two digits, rounded up) at which every store holds a document out; what is in the way."""
  notes, least = [], 0.0
  for name, store in pair.items():
    if why := too_few_documents(store):
      notes.append(f"{name}: {why}")
    else:
      least = max(least, least_heldout_frac(store))
  if least < wanted:
    return wanted, notes
  step = 10 ** (math.floor(math.log10(least)) - 1)
  return round(math.ceil(least / step + 1e-6) * step, 6), notes
