"""A base and the texts it is to learn -> what kind of continual pretraining this is and where to begin, with figures.

Invariant: nothing is trained; every verdict shows the rules that it follows from.

A source is a token store, or text to make one of. Exit codes: 0 done, 65 bad text, 74 disk, 78 wrong settings.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
import sys
from typing import Any

import rich.table
import rich.text
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone that is not installed

from cpt_jax import config as config_lib
from cpt_jax import durations
from cpt_jax.config import ConfigError, Problems
from cpt_jax.devices import environment
from cpt_jax.diagnosis import verdict as diagnosis
from cpt_jax.store import documents, prepare
from cpt_jax.store import store as stores

_HF = flags.DEFINE_string("hf", "", "The base: a Hugging Face directory.")
_SOURCES = flags.DEFINE_multi_string("sources", [], "NAME=STORE or NAME=TEXT, joined by commas; repeatable.")
_GENERAL = flags.DEFINE_string(
  "general", "", "The source that is like the base's own text; by default the one named general, else the first."
)
_TOKENS = flags.DEFINE_integer("tokens", 50_000, "Tokens of each source that the base is evaluated on, at most.", lower_bound=100)
_BUDGET = flags.DEFINE_string("budget", "", "Tokens of the run that is planned, e.g. '2B tokens'.")
_BASE_PEAK_LR = flags.DEFINE_float("base_peak_lr", None, "The peak rate of the base's own pretraining, where it is known.")
_HELDOUT_FRAC = flags.DEFINE_float("heldout_frac", 0.01, "Share of documents that the run holds out (data.heldout_frac).")
_ROW_LEN = flags.DEFINE_integer("row_len", 0, "Positions of an evaluation row (data.row_len); 0 = 2048, or the base's context.")
_OUTPUT = flags.DEFINE_string("output", "", "Where the result goes; by default diagnosis, or the first diagnosis_N that is free.")


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags, checked."""

  paths: dict[str, str]
  general: str
  budget_tokens: float | None
  output: pathlib.Path


def read_flags(problems: Problems) -> Request:
  """The flags; what is wrong with them goes to `problems`."""
  paths: dict[str, str] = {}
  for entry in (entry for flag in _SOURCES.value for entry in flag.split(",") if entry):
    name, equals, path = entry.partition("=")
    if not (equals and path and name.isidentifier()):
      problems.add(f"--sources {entry!r}: write NAME=STORE, the name of letters, digits and underscores, e.g. law=store/law")
    elif name in paths:
      problems.add(f"--sources {entry!r}: {name} is {paths[name]} already; give every source a name of its own")
    else:
      paths[name] = path
  if len(paths) < 2:
    problems.add("--sources: name the general source and at least one to learn, e.g. --sources general=store/en,domain=store/law")
  general = _GENERAL.value or ("general" if "general" in paths else next(iter(paths), ""))
  if paths and general not in paths:
    known = list(paths)
    problems.add(f"--general={general}: there is no such source.{config_lib.did_you_mean(general, known)} There are {known}.")
  budget_tokens = None
  if _BUDGET.value:
    try:
      budget_tokens = durations.parse_tokens(_BUDGET.value)
    except ValueError as error:
      problems.add(f"--budget={error}")
  if _BASE_PEAK_LR.value is not None and not 0 < _BASE_PEAK_LR.value < 1:
    problems.add(f"--base_peak_lr={_BASE_PEAK_LR.value}: a rate between 0 and 1, e.g. 3e-4")
  if not 0 < _HELDOUT_FRAC.value < 1:
    problems.add(f"--heldout_frac={_HELDOUT_FRAC.value}: must lie between 0 and 1, e.g. 0.01")
  output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else free_directory("diagnosis")
  if output.exists() and not output.is_dir():
    problems.add(f"--output={output}: is a file; name a directory")
  return Request(paths, general, budget_tokens, output)


def free_directory(name: str) -> pathlib.Path:
  """`name`, or the first of name_2, name_3, ... that does not exist."""
  number, path = 1, pathlib.Path(name)
  while path.exists():
    number += 1
    path = pathlib.Path(f"{name}_{number}")
  return path


def text_sources(request: Request, problems: Problems) -> dict[str, str]:
  """Sources that are text, with the stores to make of them; a directory is a store."""
  found = {}
  for name, path in request.paths.items():
    is_text = bool(documents.kind_of(path)) or any(c in path for c in "*?[")
    if pathlib.Path(path).is_dir() or not is_text:
      continue
    with problems.collect():
      documents.find_files([path], flag=f"--sources {name}")
      found[name] = str(request.output / "stores" / name)
  return found


def run(request: Request, base: Any, opened: dict[str, stores.TokenStore]) -> dict[str, Any]:
  """Measures, judges and prints; returns the record."""
  from cpt_jax.diagnosis import measure
  from cpt_jax.training import checkpoint, console

  row_len = measure.row_len(base, _ROW_LEN.value)
  config = config_lib.default()
  samples, held = {}, {}
  with console.progress() as bar:
    task = bar.add_task("read the texts", total=len(opened))
    for number, (name, store) in enumerate(opened.items()):
      samples[name] = measure.describe(store, base)
      held[name] = measure.hold_out(
        name, number, store, base, max_tokens=_TOKENS.value, heldout_frac=_HELDOUT_FRAC.value, row_len=row_len
      )
      bar.advance(task)
    task = bar.add_task("evaluate the base", total=sum(len(rows.batches) for rows, _ in held.values()))
    losses = measure.evaluate(base, held, config=config, on_batch=lambda: bar.advance(task))
  figures = measure.gather(samples, losses, general=request.general, vocab_size=base.spec.vocab_size)
  verdicts = [
    diagnosis.judge(figures[name], figures[request.general], budget_tokens=request.budget_tokens)
    for name in figures
    if name != request.general
  ]
  commands = {v.source: command(v, request, base, opened) for v in verdicts if v.practice}
  show_base(base, request)
  show_figures(figures, request.general)
  show_rules(verdicts)
  for verdict in verdicts:
    show_verdict(verdict, commands.get(verdict.source, ""))
  return {
    "command": sys.argv,
    "base": {"path": base.path, "context": base.spec.max_positions, "tokenizer": base.tokenizer.fingerprint}
    | {"peak_lr": _BASE_PEAK_LR.value},
    "general": request.general,
    "settings": {
      "tokens": _TOKENS.value,
      "heldout_frac": _HELDOUT_FRAC.value,
      "row_len": row_len,
      "budget_tokens": request.budget_tokens,
    },
    "sources": {name: plain(figure) for name, figure in figures.items()},
    "rules": [plain(rule) for rule in diagnosis.RULES.values()],
    "verdicts": [
      plain(v._replace(findings=()))
      | {"findings": {f.rule.name: {"value": f.value, "met": f.met} for f in v.findings}}
      | {"begin": plain(diagnosis.PRACTICES[v.practice]) if v.practice else None}
      | {"next_command": commands.get(v.source)}
      for v in verdicts
    ],
    "versions": checkpoint.versions(),
  }


def plain(value: Any) -> Any:
  """NamedTuples as objects, for JSON."""
  if hasattr(value, "_asdict"):
    return {key: plain(entry) for key, entry in value._asdict().items()}
  if isinstance(value, dict):
    return {key: plain(entry) for key, entry in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None  # an error that cannot be told
  return [plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def show_base(base: Any, request: Request) -> None:
  """The base and what is compared with what."""
  from cpt_jax.model import spec as spec_lib
  from cpt_jax.training import console

  spec = base.spec
  parameters = console.count(spec_lib.num_parameters(spec))
  console.say(f"base     {base.path}: {spec.family}, {parameters} parameters, context {spec.max_positions:,}")
  console.say(f"tokens   {base.tokenizer.vocab_size:,} in the vocabulary of {base.tokenizer.name}")
  console.say(f"general  {request.general} (what the base is taken to know; the others are compared with it)\n")


def show_figures(figures: dict[str, diagnosis.Figures], general: str) -> None:
  """Three tables: the base's loss, the vocabulary, the documents."""
  from cpt_jax.training import console

  rows = []
  for name, figure in figures.items():
    loss, (ratio, _) = figure.base, diagnosis.loss_ratio(figure, figures[general])
    rows.append(
      [name, f"{loss.loss:.3f} +-{2 * loss.loss_error:.3f}", f"{loss.bits_per_byte:.3f} +-{2 * loss.bits_per_byte_error:.3f}"]
      + [f"{figure.compressed.bits_per_byte:.3f}", f"{loss.bits_per_byte / figure.compressed.bits_per_byte:.2f}"]
      + ["" if name == general else f"{ratio:.2f}", f"{loss.tokens:,}", loss.sample]
    )
  console.table(
    "the base on each source, +- two standard errors",
    ["source", "nats/token", "bits/byte", "xz bits/byte", "base/xz", "x general", "tokens", "measured on"],
    rows,
  )
  console.say("base/xz: the base's bits/byte over those of xz, which knows nothing; it compares between texts of any language\n")
  rows = []
  for name, figure in figures.items():
    vocabulary, store, saving = figure.vocabulary, figure.store, figure.vocabulary.own_saving_frac
    rows.append(
      [
        name,
        f"{store.tokens_per_byte:.3f}",
        f"{1 / store.tokens_per_byte:.2f}",
        f"{figure.text.fertility:.2f} a {figure.text.unit}",
      ]
      + [f"{vocabulary.byte_frac:.1%}", f"{vocabulary.unknown_frac:.1%}", f"{vocabulary.used_frac:.0%}"]
      + [
        "?" if saving is None else f"{round(saving, 2) + 0.0:.0%}",
        f"{figure.distance.bits:.3f}",
        f"{figure.distance.floor_bits:.3f}",
      ]
    )
  console.table(
    "how the base's vocabulary fits",
    ["source", "tokens/byte", "bytes/token", "tokens", "byte tokens", "unknown", "vocab used", "own saves", "JS bits", "noise"],
    rows,
  )
  rows = []
  for name, figure in figures.items():
    lengths, store = figure.lengths, figure.store
    scripts = [f"{script} {share:.0%}" for script, share in figure.text.scripts.items() if share >= 0.01][:3]
    rows.append(
      [name, console.count(store.documents), console.count(store.tokens)]
      + [f"{lengths.median:,.0f}", f"{lengths.p90:,.0f}", f"{lengths.p99:,.0f}"]
      + [f"{share:.0%}" for share in lengths[4:]]
      + [", ".join(scripts) or "no letters"]
    )
  console.table(
    "documents, in tokens; shares of the tokens",
    ["source", "documents", "tokens", "median", "p90", "p99", "in > 4k", "in > 32k", "in > context", "past context", "letters"],
    rows,
  )


def show_rules(verdicts: list[diagnosis.Verdict]) -> None:
  """Every rule, its threshold and the figures; met ones are marked."""
  from cpt_jax.training import console

  shown = 6  # sources beside each other in a table that fits a screen
  for first in range(0, len(verdicts), shown):
    part = verdicts[first : first + shown]
    rows = []
    for number, rule in enumerate(diagnosis.RULES.values()):
      found = [verdict.findings[number] for verdict in part]
      cells = [f"{amount(f.value, rule.unit)}{' ' + f.note if f.note else ''} {'*' if f.met else ' '}" for f in found]
      rows.append([rule.name, rule.figure, f"{rule.sign} {amount(rule.threshold, rule.unit)}", *cells])
    console.table("rules (* = met)", ["rule", "figure", "threshold", *(f"{v.source}  " for v in part)], rows, left=2)
  console.say("where the thresholds come from (docs/diagnose.md)")
  for rule in diagnosis.RULES.values():
    console.say(f"  {rule.name:<13} {rule.basis}")
  console.say("")


def amount(value: float | None, unit: str) -> str:
  """A figure in its unit."""
  from cpt_jax.training import console

  if value is None:
    return "?"
  return {"%": f"{value:.1%}", "tokens": console.count(value)}.get(unit, f"{value:.2f} {unit}")


def show_verdict(verdict: diagnosis.Verdict, next_command: str) -> None:
  """What it is, why, and where to begin."""
  from cpt_jax.training import console

  grid = rich.table.Table.grid(padding=(0, 2), pad_edge=False)
  grid.add_column(style="dim", no_wrap=True)
  grid.add_column(overflow="fold")
  lines = [("kind", " + ".join(verdict.kinds).upper()), ("because", verdict.because)]
  lines += [("vocabulary", verdict.vocabulary.upper()), ("because", verdict.vocabulary_because)]
  if verdict.practice:
    practice = diagnosis.PRACTICES[verdict.practice]
    lines += [("rate", f"{rates_text(practice)}  [{practice.rate_basis}]")]
    lines += [("replay", f"{replay_text(practice)}  [{practice.replay_basis}]"), ("advice", practice.advice)]
    if diagnosis.LONG in verdict.kinds:
      lines += [("long", LONG_ADVICE)]
    lines += [("config", practice.config)]
  for label, text in lines:
    grid.add_row(label, rich.text.Text(text))
  console.console.rule(rich.text.Text(f" {verdict.source} ", style="bold"), align="left", characters="-")
  console.console.print(grid)
  if next_command:
    console.say(f"\n{next_command}\n")


LONG_ADVICE = (
  "a stage of its own, after the rest, in rows as long as data.row_len, which a run takes up to the base's context; to go past "
  "that the base's rotary positions must be rescaled first, which this version does not do"
)


def rates_text(practice: diagnosis.Practice) -> str:
  """The range of rates, absolute where the base's peak is known."""
  least, start, most = (f"1/{round(1 / x)}" if x < 1 else "1" for x in practice.rate)
  if _BASE_PEAK_LR.value is None:
    return f"begin at {start} of the base's peak, {least} to {most}; its peak is unknown here: --base_peak_lr makes it a rate"
  low, begin, high = (f"{x * _BASE_PEAK_LR.value:.2g}" for x in practice.rate)
  return f"begin at {begin}, {low} to {high} ({start}, {least} to {most} of the base's peak {_BASE_PEAK_LR.value:g})"


def replay_text(practice: diagnosis.Practice) -> str:
  """The range of shares."""
  least, start, most = (f"{x:.0%}" for x in practice.replay)
  return f"begin with {start} of the tokens, {least} to {most}"


def command(verdict: diagnosis.Verdict, request: Request, base: Any, opened: dict[str, stores.TokenStore]) -> str:
  """The command that says what the run would do, ready to be given."""
  practice = diagnosis.PRACTICES[verdict.practice]
  learnt = "language" if verdict.practice == "language" else "domain"
  recipe = config_lib.load_file(str(ROOT / practice.config))
  row_len = base.spec.max_positions if verdict.practice == "long" else min(recipe.data.row_len, base.spec.max_positions)
  keys: dict[str, Any] = {
    "start.hf": base.path,
    "data.sources.general.store": str(opened[request.general].path),
    f"data.sources.{learnt}.store": str(opened[verdict.source].path),
  }
  if learnt == "domain":  # the language recipe has a ramp
    share = practice.replay[1]
    keys |= {"data.sources.general.share": f"{share:g}", "data.sources.domain.share": f"{1 - share:g}"}
  if row_len != recipe.data.row_len:
    keys["data.row_len"] = row_len
  heldout_frac = enough_heldout([opened[request.general], opened[verdict.source]], _HELDOUT_FRAC.value)
  if heldout_frac != config_lib.default().data.heldout_frac:
    keys["data.heldout_frac"] = f"{heldout_frac:g}"
  if request.budget_tokens is not None:
    keys["train.length"] = f"{request.budget_tokens:g} tokens"
  if _BASE_PEAK_LR.value is not None:
    peak = practice.rate[1] * _BASE_PEAK_LR.value
    keys |= {"schedule.lr_peak": f"{peak:.2g}", "schedule.lr_final": f"{peak / (100 if learnt == 'domain' else 10):.2g}"}
  options = [f"--config={practice.config}", *(f"--config.{key}={shlex.quote(str(value))}" for key, value in keys.items())]
  options += [f"--workdir=runs/{verdict.source}", "--dry_run"]
  return " \\\n    ".join(["python -m cpt_jax.main", *options])


def enough_heldout(found: list[stores.TokenStore], wanted: float) -> float:
  """`wanted`, or the least share (two digits, rounded up) at which every store holds a document out."""
  from cpt_jax.stream.sources import mix64

  least = max(float(mix64(store.doc_hashes()[store.lengths > 1]).min()) / 2**64 for store in found)
  if least < wanted:
    return wanted
  step = 10 ** (math.floor(math.log10(least)) - 1)
  return round(math.ceil(least / step + 1e-6) * step, 6)


def diagnose() -> None:
  """The whole job, as the flags say.

  Raises:
    ConfigError: all that is wrong with the flags, the base and the sources.
  """
  problems = Problems()
  request = read_flags(problems)
  from cpt_jax.diagnosis import measure

  base = measure.open_base(_HF.value, problems)
  texts = text_sources(request, problems)
  opened = {name: measure.open_store(name, path, base, problems) for name, path in request.paths.items() if name not in texts}
  problems.raise_if_any()  # before anything is prepared
  for name, output in texts.items():
    report = prepare.prepare([request.paths[name]], tokenizer=_HF.value, output=output)
    print("\n".join(report.lines()))
    opened[name] = measure.open_store(name, output, base, problems)
  problems.raise_if_any()
  request.output.mkdir(parents=True, exist_ok=True)
  record = run(request, base, {name: opened[name] for name in request.paths})
  file = request.output / "diagnosis.json"
  stores.write_atomically(file, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
  print(f"wrote {file}")
  commands = [verdict["next_command"] for verdict in record["verdicts"] if verdict["next_command"]]
  if commands:
    print(f"next: the command above, which says what the run would do{'' if len(commands) == 1 else ' (one for each source)'}")


def main(argv: list[str]) -> int:
  """Exit code, after printing the diagnosis or what is wrong."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # the libraries' own diaries come with --verbosity=0
  try:
    if len(argv) > 1:
      raise ConfigError(f"unexpected arguments {argv[1:]}: quote the list of --sources against the shell")
    diagnose()
  except documents.DataError as error:
    print(error, file=sys.stderr)
    return 65
  except ConfigError as error:
    print(error, file=sys.stderr)
    return error.exit_code
  except OSError as error:
    print(error, file=sys.stderr)
    return 74
  return 0


if __name__ == "__main__":
  environment.prepare(os.environ)
  app.run(main)
