"""Rows, stores and texts made here -> how fast cpt_jax mixes, packs, seeks and prepares, beside its peers.

Invariant: each side is measured in fresh processes that take turns, on rows and texts that all sides share.
"""

import collections
import gzip
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from cpt_jax.training import console
from tools.bench import bench_data_sides, bench_samples
from tools.bench.bench_samples import Section

OPEN_SECS, OPEN_BYTES, SEEK_SECS, PACKED_RATE = 5.0, 200e6, 0.05, 5e6  # the bars

_CLOCKS = ("wall_secs", "cpu_secs")


def measure_mixture(bench: Any) -> Section:
  """Rows a second of fixed rows mixed by each reader, and of packed rows of `Loader.batches`."""
  counts, window_secs, rounds = ([2, 3], 0.02, 1) if bench.quick else ([2, 8, 64], 0.7, 3)
  num_rows = 256 if bench.quick else 2048
  shapes = [(8, 2048), (16, 256)]
  for num_sources in counts:
    if not (bench.directory / f"rows_{num_sources}").exists():
      bench_data_sides.make_rows(bench.directory, num_sources, num_rows=num_rows)
    make_stores(bench, num_sources)
  sides = [side for side in bench_data_sides.READERS if bench.peers or side.startswith(("cpt_jax", "grain"))]
  skipped, samples = {}, {side: [] for side in sides}
  packed: list[list[dict[str, Any]]] = []
  for side in bench_samples.in_turns([*sides, "packed"], rounds=rounds):
    options = dict(sources=counts, window_secs=window_secs)
    if side == "packed":
      packed.append(_run_side(bench, "read_packed", **options, shapes=shapes))
    elif side not in skipped:
      found = _run_side(bench, "read", **options, side=side, num_rows=num_rows)
      if "skipped" in found:
        skipped[side] = found["skipped"]
      else:
        samples[side].append(found)
  samples = {side: turns for side, turns in samples.items() if side not in skipped}
  _check_shares(samples, num_rows=num_rows)
  fixed, table = [], []
  for nth, num_sources in enumerate(counts):
    of_side = {side: [turn[nth] for turn in turns] for side, turns in samples.items()}
    for side, turns in of_side.items():
      entry = {"sources": num_sources, "side": side, **_rates(turns, row_len=bench_data_sides.ROW_LEN)}
      peer, cells = bench_data_sides.PAIRS.get(side), ["", "", ""]
      if peer:
        entry["speed_ratio"] = {"peer": peer, **_speed_ratios(turns, of_side[peer])}
        held = statistics.median(entry["speed_ratio"]["cpu_secs"]) >= 1
        cells = [*bench_samples.ratio_cells(entry["speed_ratio"]), "yes" if held else "NO"]
      fixed.append(entry)
      table.append([num_sources, side, *_rate_cells(entry), *cells])
  table += [["", side, f"skipped: {why}", *[""] * 7] for side, why in skipped.items()]
  packed_entries = []
  for of_kind in zip(*packed, strict=True):
    first = of_kind[0]
    entry = {key: first[key] for key in ("sources", "rows_a_batch", "row_len", "filled")}
    entry |= _rates(list(of_kind), row_len=first["row_len"])
    packed_entries.append(entry)
    held = "" if first["row_len"] < 2048 else "yes" if entry["positions_per_cpu_sec"] >= PACKED_RATE else "NO"
    name = f"cpt_jax Loader, packed, {first['rows_a_batch']} x {first['row_len']}"
    table.append([first["sources"], name, *_rate_cells(entry), "", "", held])
  return {"row_len": bench_data_sides.ROW_LEN, "fixed": fixed, "packed": packed_entries, "skipped": skipped}, table


def measure_seek(bench: Any) -> Section:
  """Time to the first batch at a row far into the run, in a fresh process and after other seeks, and what opening costs."""
  rounds, furthest = (1, 1000) if bench.quick else (2, max(bench_data_sides.POSITIONS))
  if not (bench.directory / "rows_8").exists():
    bench_data_sides.make_rows(bench.directory, 8, num_rows=256 if bench.quick else 2048)
  make_stores(bench, 64)
  peers = bench_data_sides.SEEKERS.items()
  limits = {side: min(limit, furthest) for side, (_, limit) in peers if bench.peers or side.startswith(("cpt_jax", "grain"))}
  rows_of = {side: sorted({p for p in bench_data_sides.POSITIONS if p <= limit} | {limit}) for side, limit in limits.items()}
  runs = [(side, row) for side, rows in rows_of.items() for row in rows]
  skipped, samples = {}, collections.defaultdict(list)
  for side, row in bench_samples.in_turns(runs, rounds=rounds):
    # Of a side that has to walk there, one seek a process is enough.
    is_exact = side.startswith(("cpt_jax", "grain"))
    if side not in skipped and (is_exact or len(samples[side, row]) < 2):
      furthest_row = limits[side] if is_exact else row
      found = _run_side(bench, "seek", side=side, row=row, furthest=furthest_row, again=3 if is_exact else 0)
      if "skipped" in found:
        skipped[side] = found["skipped"]
      else:
        samples[side, row].append(found)
  result: dict[str, Any] = {"sides": [], "skipped": skipped}
  table = []
  for side in (side for side in limits if side not in skipped):
    turns = {row: samples[side, row] for row in rows_of[side]}
    costs = [turn["open"] for turn in turns[limits[side]]]
    opened = {key: bench_samples.stats([cost[key] for cost in costs]) for key in costs[0]}
    rows = [_at(turns, row) for row in bench_data_sides.POSITIONS]
    result["sides"].append({"side": side, "open": opened, "rows": rows, "samples": turns})
    held = ""
    if side.startswith("cpt_jax"):
      is_held = all(row["first"]["cpu_secs"] < SEEK_SECS for row in rows)
      if "64" in side:
        is_held &= opened["cpu_secs"]["median"] < OPEN_SECS and opened["peak_bytes"]["median"] < OPEN_BYTES
      held = "yes" if is_held else "NO"
    cells = [f"{opened['wall_secs']['median']:.2f}", f"{opened['cpu_secs']['median']:.2f}"]
    cells.append(f"{opened['peak_bytes']['median'] / 1e6:.0f}")
    table.append([side, *cells, *map(_seek_cell, rows), held])
  table += [[side, f"skipped: {why}", *[""] * 6] for side, why in skipped.items()]
  return result, table


def measure_prepare(bench: Any) -> Section:
  """Text a second of cpt prepare, of its work without the start, of datatrove's tokenizer step, and peaks of memory."""
  text, turns = bench.directory / "prepare.jsonl", (1, 2, 2, 1)
  num_bytes = write_varied(text, bench.texts.values(), min_bytes=200_000 if bench.quick else 20_000_000)
  tokenizer = bench_samples.ROOT / "examples/base"
  secs: dict[int, dict[str, list[float]]] = {number: {"wall_secs": [], "cpu_secs": []} for number in (1, 2)}
  for turn, workers in enumerate(turns[: 2 if bench.quick else 4]):
    store = bench.directory / f"prepared_{turn}"
    command = [sys.executable, "-m", "cpt_jax.cli", "prepare", f"--input={text}", f"--tokenizer={tokenizer}"]
    with bench_samples.timed(secs[workers]):
      bench_samples.call([*command, f"--output={store}", f"--num_workers={workers}"], env={**os.environ})
  manifest = json.loads((store / "store.json").read_text())
  totals = {key: manifest[key] for key in ("num_documents", "num_tokens", "num_bytes")}
  workers, table = {}, []
  for number, samples in secs.items():
    wall, cpu = bench_samples.stats(samples["wall_secs"]), bench_samples.stats(samples["cpu_secs"])
    speed = num_bytes / 1e6 / wall["median"]
    workers[str(number)] = {"wall_secs": wall, "cpu_secs": cpu, "mb_per_sec": speed, "samples": samples}
    table.append([f"cpt prepare, the command, workers: {number}", *_prepare_cells(num_bytes, samples), "", "", ""])
  tokenized, skipped = _tokenize(bench, text, tokenizer)
  ratios = {}
  for side, samples in tokenized.items():
    cells = ["", ""]
    if side == "cpt_jax" and "datatrove" in tokenized:
      for clock in _CLOCKS:  # of speeds, so theirs over ours
        ratios[clock] = [t[clock] / o[clock] for o, t in zip(samples, tokenized["datatrove"], strict=True)]
      cells = bench_samples.ratio_cells(ratios)
    spent = {clock: [s[clock] for s in samples] for clock in _CLOCKS}
    name = {"cpt_jax": "prepare() alone, one process", "datatrove": "datatrove DocumentTokenizer, one process"}[side]
    peak = statistics.median(s["peak_bytes"] for s in samples)
    table.append([name, *_prepare_cells(num_bytes, spent), *cells, f"{peak / 1e6:.0f}"])
  table += [[side, f"skipped: {why}", *[""] * 7] for side, why in skipped.items()]
  large = bench.directory / "prepare_large.jsonl"
  large_bytes = write_varied(large, bench.texts.values(), min_bytes=1_000_000 if bench.quick else 200_000_000)
  grown = _run_side(bench, "tokenize", side="cpt_jax", text=str(large), tokenizer=str(tokenizer), output=f"{large}_store")
  spent = {clock: [grown[clock]] for clock in _CLOCKS}
  table.append(
    ["prepare() alone, a larger text", *_prepare_cells(large_bytes, spent), "", "", f"{grown['peak_bytes'] / 1e6:.0f}"]
  )
  result = {"text_bytes": num_bytes, "store": totals, "workers": workers, "tokenized": tokenized, "speed_ratio": ratios}
  return result | {"large_bytes": large_bytes, "large": grown, "skipped": skipped}, table


def make_stores(bench: Any, num_sources: int) -> None:
  """Token stores of the shipped corpora, dealt out to so many sources, unless they are there."""
  if not (bench.directory / f"stores_{num_sources}").exists():
    texts = (text for corpus in bench.texts.values() for text in _texts(corpus))
    bench_data_sides.make_stores(bench.directory, num_sources, texts=texts, tokenizer=bench_samples.ROOT / "examples/base")


def write_varied(path: pathlib.Path, corpora: Iterable[pathlib.Path], *, min_bytes: int) -> int:
  """The corpora's documents over and over, each time turned at another word; bytes of text written."""
  texts = [text for corpus in corpora for text in _texts(corpus)]
  num_bytes = number = 0
  with open(path, "w", encoding="utf-8") as file:
    while num_bytes < min_bytes:
      text, turn = texts[number % len(texts)], number // len(texts)
      cut = text.find(" ", 97 * turn % len(text)) + 1
      text = text[cut:] + text[:cut]
      file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
      num_bytes += len(text.encode())
      number += 1
  return num_bytes


def _texts(corpus: pathlib.Path) -> Iterator[str]:
  with gzip.open(corpus, "rt", encoding="utf-8") if corpus.suffix == ".gz" else open(corpus, encoding="utf-8") as lines:
    for line in lines:
      yield json.loads(line)["text"]


def _run_side(bench: Any, what: str, **options: Any) -> Any:
  cores = ",".join(map(str, bench.cores))
  command = bench_samples.command("bench_data_sides", what, bench.directory, json.dumps(options), cores)
  environment = bench_samples.environment(bench.cores) | {"RAYON_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
  return json.loads(bench_samples.call(command, env=environment).splitlines()[-1])


def _tokenize(bench: Any, text: pathlib.Path, tokenizer: pathlib.Path) -> tuple[dict[str, list[Any]], dict[str, str]]:
  """Samples of cpt_jax and of datatrove, and who was left out; both must have written the same tokens."""
  sides, rounds = ["cpt_jax", *["datatrove"] * bench.peers], 1 if bench.quick else 2
  found: dict[str, list[Any]] = {side: [] for side in sides}
  skipped = {}
  for turn, side in enumerate(bench_samples.in_turns(sides, rounds=rounds)):
    output = bench.directory / f"tokenized_{turn}"
    options = dict(side=side, text=str(text), tokenizer=str(tokenizer), output=str(output))
    sample = _run_side(bench, "tokenize", **options)
    if "skipped" in sample:
      skipped[side] = sample["skipped"]
    else:
      found[side].append(sample)
  found = {side: samples for side, samples in found.items() if samples}
  digests = {side: {s["digest"] for s in samples} for side, samples in found.items()}
  if len(set.union(*digests.values())) != 1:
    raise RuntimeError(f"the sides do not write the same tokens, so their times mean nothing: {digests}")
  return found, skipped


def _check_shares(samples: dict[str, list[Any]], *, num_rows: int) -> None:
  """Did every side read what it should: each source's rows among the first, random draws within six standard deviations."""
  for side, turns in samples.items():
    for found in turns[0]:
      shares = bench_data_sides.shares(found["sources"])
      for m, (count, share) in enumerate(zip(found["first_rows"], shares, strict=True)):
        if abs(count - num_rows * share) > 6 * (num_rows * share) ** 0.5 + 8:
          raise RuntimeError(f"{side} read {count} rows of source {m} of {found['sources']}, not {num_rows * share:.0f}")


def _rates(turns: list[dict[str, Any]], *, row_len: int) -> dict[str, Any]:
  rates = [turn["rows"] / turn["wall_secs"] for turn in turns]
  cpu_rates = [turn["rows"] / turn["cpu_secs"] for turn in turns]
  return {
    "rows_per_sec": bench_samples.stats(rates),
    "rows_per_cpu_sec": bench_samples.stats(cpu_rates),
    "positions_per_sec": statistics.median(rates) * row_len,
    "positions_per_cpu_sec": statistics.median(cpu_rates) * row_len,
    "samples": {key: [turn[key] for turn in turns] for key in ("rows", "wall_secs", "cpu_secs")},
  }


def _rate_cells(entry: dict[str, Any]) -> list[str]:
  speed, cpu = entry["rows_per_sec"], entry["rows_per_cpu_sec"]
  cells = [f"{speed['median']:,.0f}", f"{speed['mad']:,.0f}", console.count(entry["positions_per_sec"])]
  return [*cells, f"{cpu['median']:,.0f}", console.count(entry["positions_per_cpu_sec"])]


def _speed_ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, list[float]]:
  """Rows a second of ours over theirs, of each pair that had the same turn, by either clock."""
  return {clock: [a["rows"] / a[clock] / (b["rows"] / b[clock]) for a, b in zip(ours, theirs, strict=True)] for clock in _CLOCKS}


def _at(turns: dict[int, list[dict[str, Any]]], row: int) -> dict[str, Any]:
  """Median seconds at a row, of first seeks and of later ones.

  Where a side did not go there, on the line through its nearest and its furthest row; as at the furthest one if that took less
  than twice the nearest's time, since a line through noise says nothing.
  """

  def median(of_row: int, clock: str, which: slice) -> float | None:
    found = [s for turn in turns[of_row] for s in turn[clock][which]]
    return statistics.median(found) if found else None

  furthest, kinds = max(turns), {"first": slice(0, 1), "later": slice(1, None)}
  if row in turns:
    found = {kind: {clock: median(row, clock, which) for clock in _CLOCKS} for kind, which in kinds.items()}
    return {"row": row, "measured_at": row, **found}
  line = {}
  for clock in _CLOCKS:
    near, far = median(0, clock, kinds["first"]), median(furthest, clock, kinds["first"])
    line[clock] = near + (far - near) / furthest * row if far > 2 * near else far
  return {"row": row, "measured_at": furthest, "first": line, "later": dict.fromkeys(_CLOCKS)}


def _seek_cell(at: dict[str, Any]) -> str:
  first, cpu, later = at["first"]["wall_secs"], at["first"]["cpu_secs"], at["later"]["wall_secs"]
  if at["measured_at"] != at["row"]:
    return f"~{_secs(first)} (from {at['measured_at']:,})"
  return f"{_secs(first)}, CPU {_secs(cpu)}" + (f"; {_secs(later)}" if later is not None else "")


def _secs(secs: float) -> str:
  return f"{secs * 1e3:,.1f} ms" if secs < 1 else f"{secs:,.1f} s"


def _prepare_cells(num_bytes: int, samples: dict[str, list[float]]) -> list[str]:
  wall, cpu = bench_samples.stats(samples["wall_secs"]), bench_samples.stats(samples["cpu_secs"])
  cells = [f"{num_bytes / 1e6:.1f}", f"{wall['median']:.2f}", f"{wall['mad']:.2f}", f"{cpu['median']:.2f}"]
  return [*cells, f"{num_bytes / 1e6 / cpu['median']:.2f}"]
