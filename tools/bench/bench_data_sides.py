"""Rows, stores or texts -> how fast one reader or tokenizer, of cpt_jax or of a peer, goes through them.

Invariant: every reader of a group reads the same rows and gives the same batches, int32 [8, 2048], in a process of its own; a
peer that is not installed is skipped by name.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tools.bench import bench_samples
from tools.bench.bench_samples import status

BATCH_ROWS, ROW_LEN = 8, 2048
RAMPED_STEPS, RAMPED_ROWS = 1_000_000, 1024  # a million steps that hold row 10**9
POSITIONS = (0, 10**6, 10**9)
_NUM_STEPS = 1 << 28  # of mixtures with constant shares: more than is read of anything
_APART = 81_920  # rows between the samples of a position, so that no sample finds what another one has worked out
_AHEAD = dict(num_threads=2, prefetch_buffer_size=2)  # what Loader.batches uses for 8 rows

Rows = list[np.ndarray]  # of each source, int32 [rows, T]: a row begins with its source and its number


def shares(num_sources: int) -> list[float]:
  """Source m's share of the rows, in proportion to m + 1."""
  return [2 * (m + 1) / (num_sources * (num_sources + 1)) for m in range(num_sources)]


def _constant(num_sources: int) -> list[list[tuple[int, int]]]:
  """Knots of these shares, as whole numbers: only fractions of a small denominator have a period, however long the run is."""
  return [[(0, m + 1)] for m in range(num_sources)]


def ramps(num_sources: int, *, num_steps: int) -> list[list[tuple[float, float]]]:
  """Knots of the same shares, moving to their mirror image over the run."""
  return [[(0, m + 1.0), (float(num_steps), float(num_sources - m))] for m in range(num_sources)]


def make_rows(directory: pathlib.Path, num_sources: int, *, num_rows: int) -> None:
  """Writes `rows_{M}/{m}.npy`, about `num_rows` together, each source's as many as its share says."""
  folder = directory / f"rows_{num_sources}"
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for m, share in enumerate(shares(num_sources)):
    rows = rng.integers(0, 1 << 16, (-(-int(num_rows * share * 1000) // 1000) + 1, ROW_LEN), np.int32)
    rows[:, 0], rows[:, 1] = m, np.arange(len(rows))
    np.save(folder / f"{m}.npy", rows)


def _rows(directory: pathlib.Path, num_sources: int) -> Rows:
  # Plain arrays over the maps: slices of the subclass np.memmap are slow, for all sides alike.
  return [np.asarray(np.load(directory / f"rows_{num_sources}" / f"{m}.npy", mmap_mode="r")) for m in range(num_sources)]


# Readers: the directory and the number of sources -> batches int32 [8, 2048] without end.


class _Mixed:
  """Batches of fixed rows by cpt_jax's mixture, by number."""

  def __init__(self, rows: Rows, knots: Any, *, num_steps: int, is_shuffled: bool = False):
    from cpt_jax.stream.mixture import Mixture
    from cpt_jax.stream.shuffle import Shuffle

    self._rows, self._num_steps = rows, num_steps
    self._mixture = Mixture(knots, num_steps=num_steps, batch_rows=BATCH_ROWS)
    self._orders = [Shuffle(len(of_m), name=str(m), seed=0) for m, of_m in enumerate(rows)] if is_shuffled else None

  def __len__(self) -> int:
    return self._num_steps

  def __getitem__(self, step: int) -> np.ndarray:
    batch = np.empty((BATCH_ROWS, ROW_LEN), np.int32)
    for b in range(BATCH_ROWS):
      m, nth = self._mixture.locate(step * BATCH_ROWS + b)
      rows = self._rows[m]
      batch[b] = rows[self._orders[m][nth] if self._orders else nth % len(rows)]
    return batch


def _mixed(directory: pathlib.Path, num_sources: int, *, is_shuffled: bool = False) -> _Mixed:
  rows = _rows(directory, num_sources)
  return _Mixed(rows, _constant(num_sources), num_steps=_NUM_STEPS, is_shuffled=is_shuffled)


def _ours(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  return map(_mixed(directory, num_sources).__getitem__, itertools.count())


def _ours_shuffled(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  return map(_mixed(directory, num_sources, is_shuffled=True).__getitem__, itertools.count())


def _ours_ramped(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  num_steps = 100_000
  mixed = _Mixed(_rows(directory, num_sources), ramps(num_sources, num_steps=num_steps), num_steps=num_steps)
  return map(mixed.__getitem__, itertools.count())


def _ours_ahead(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  import grain

  source = grain.MapDataset.source(_mixed(directory, num_sources))
  return iter(source.to_iter_dataset(grain.ReadOptions(**_AHEAD)))


def _grain_dataset(directory: pathlib.Path, num_sources: int, *, is_shuffled: bool = False) -> Any:
  import grain

  sources = [grain.MapDataset.source(rows) for rows in _rows(directory, num_sources)]
  sources = [s.seed(m).shuffle() if is_shuffled else s for m, s in enumerate(sources)]
  return grain.MapDataset.mix([s.repeat() for s in sources], weights=shares(num_sources)).batch(BATCH_ROWS)


def _grain(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  return map(_grain_dataset(directory, num_sources).__getitem__, itertools.count())


def _grain_shuffled(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  return map(_grain_dataset(directory, num_sources, is_shuffled=True).__getitem__, itertools.count())


def _grain_ahead(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  import grain

  return iter(_grain_dataset(directory, num_sources).to_iter_dataset(grain.ReadOptions(**_AHEAD)))


def _hf_sources(directory: pathlib.Path, num_sources: int) -> list[Any]:
  import datasets

  datasets.disable_progress_bars()
  folder, found = directory / f"hf_{num_sources}", []
  features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("int32"), length=ROW_LEN)})
  for m, rows in enumerate(_rows(directory, num_sources)):
    if not (folder / str(m)).exists():
      datasets.Dataset.from_dict({"tokens": rows}, features=features).save_to_disk(str(folder / str(m)))
    found.append(datasets.load_from_disk(str(folder / str(m))))
  return found


def _hf_map(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  import datasets

  sources = _hf_sources(directory, num_sources)
  mixed = datasets.interleave_datasets(
    sources, probabilities=shares(num_sources), seed=0, stopping_strategy="all_exhausted"
  ).with_format("numpy", dtype=np.int32)
  while True:
    for first in range(0, len(mixed) - BATCH_ROWS + 1, BATCH_ROWS):
      yield mixed[first : first + BATCH_ROWS]["tokens"]


def _hf_interleaved(directory: pathlib.Path, num_sources: int) -> Any:
  import datasets

  sources = [s.to_iterable_dataset().repeat(None) for s in _hf_sources(directory, num_sources)]
  return datasets.interleave_datasets(sources, probabilities=shares(num_sources), seed=0).with_format("numpy")


def _hf_iterable(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  for batch in _hf_interleaved(directory, num_sources).iter(batch_size=BATCH_ROWS):
    yield batch["tokens"].astype(np.int32)  # its numpy format is int64


def _mosaic_files(directory: pathlib.Path, num_sources: int) -> list[str]:
  import streaming

  folders = [str(directory / f"mds_{num_sources}" / str(m)) for m in range(num_sources)]
  for folder, rows in zip(folders, _rows(directory, num_sources), strict=True):
    if not os.path.exists(folder):
      with streaming.MDSWriter(out=folder, columns={"tokens": f"ndarray:int32:{ROW_LEN}"}) as writer:
        for row in rows:
          writer.write({"tokens": row})
  return folders


def _mosaic_dataset(directory: pathlib.Path, num_sources: int, *, epoch_rows: int | None = None) -> Any:
  import streaming

  streaming.base.util.clean_stale_shared_memory()
  folders = _mosaic_files(directory, num_sources)
  streams = [streaming.Stream(local=f, proportion=share) for f, share in zip(folders, shares(num_sources), strict=True)]
  num_rows = epoch_rows or sum(map(len, _rows(directory, num_sources)))
  # Unshuffled it would read one stream after the other.
  return streaming.StreamingDataset(streams=streams, batch_size=BATCH_ROWS, shuffle=True, epoch_size=num_rows)


def _mosaic_batches(dataset: Any) -> Iterator[np.ndarray]:
  samples = iter(dataset)
  while rows := [sample["tokens"] for sample in itertools.islice(samples, BATCH_ROWS)]:
    yield np.stack(rows)


def _mosaic(directory: pathlib.Path, num_sources: int) -> Iterator[np.ndarray]:
  dataset = _mosaic_dataset(directory, num_sources)
  while True:
    yield from _mosaic_batches(dataset)


READERS: dict[str, Callable[[pathlib.Path, int], Iterator[np.ndarray]]] = {
  "cpt_jax": _ours,
  "cpt_jax, shuffled": _ours_shuffled,
  "cpt_jax, shares that move": _ours_ramped,
  "cpt_jax, read ahead": _ours_ahead,
  "grain mix": _grain,
  "grain mix, shuffled": _grain_shuffled,
  "grain mix, read ahead": _grain_ahead,
  "HF interleave, map-style": _hf_map,
  "HF interleave, iterable": _hf_iterable,
  "mosaic StreamingDataset, shuffled": _mosaic,
}
PAIRS = {  # ours, and the one that it is held against
  "cpt_jax": "grain mix",
  "cpt_jax, shares that move": "grain mix",
  "cpt_jax, shuffled": "grain mix, shuffled",
  "cpt_jax, read ahead": "grain mix, read ahead",
}


def make_stores(directory: pathlib.Path, num_sources: int, *, texts: Iterator[str], tokenizer: pathlib.Path) -> None:
  """Writes token stores `stores_{M}/{m}`, the texts dealt out in turn."""
  from cpt_jax.store import token_files, tokenization

  loaded = tokenization.load(str(tokenizer))
  every = list(texts)
  for m in range(num_sources):
    store, part = directory / f"stores_{num_sources}" / str(m), every[m::num_sources]
    store.mkdir(parents=True)
    dtype = token_files.token_dtype(loaded.vocab_size)
    writer = token_files.TokenFileWriter(store / "00000.ds", dtype=dtype, tokenizer_name=loaded.name)
    for ids, text in zip(loaded.encode_documents(part).ids, part, strict=True):
      writer.add(ids, num_bytes=len(text.encode()), text_hash=token_files.text_hash(text))
    about = {"vocab_size": loaded.vocab_size, "tokenizer_fingerprint": loaded.fingerprint, "eos_id": loaded.require_eos()}
    token_files.write_manifest(store, files=[writer.close()], **about, extra={"inputs": [], "bad_records": {"num": 0}})


def _loader(directory: pathlib.Path, knots: Any, *, num_steps: int, batch_rows: int, row_len: int) -> Any:
  """A loader of the stores of as many sources as `knots`; best_fit, 2% held out, as configs are by default."""
  from cpt_jax import config as config_lib
  from cpt_jax.store import token_store
  from cpt_jax.stream import pipeline, sources

  c = config_lib.default()
  c.train.length, c.train.batch_rows, c.data.row_len, c.data.heldout_frac = f"{num_steps} steps", batch_rows, row_len, 0.02
  found = []
  for m, of_m in enumerate(knots):
    store = directory / f"stores_{len(knots)}" / str(m)
    c.data.sources[str(m)] = entry = config_lib.source(store=str(store), share=[(f"{step} steps", *rest) for step, *rest in of_m])
    options = {key: entry[key] for key in ("role", "at_end", "max_epochs", "loss_weight", "min_tokens", "max_tokens")}
    share = sources.knots(c, str(m))
    # Not by sources.from_config, which refuses stores that are too small to hold a document out: nothing is evaluated here.
    found.append(
      sources.Source(str(m), token_store.open_store(store), share=share, heldout_frac=0.02, length_shares=(), **options)
    )
  return pipeline.from_config(c, found, vocab_size=found[0].store.vocab_size)


# What is measured of a side.


class _Clock:
  """Wall and CPU time of this process since it was made."""

  def __init__(self):
    self._cpu_secs, self._start_secs = time.process_time(), time.perf_counter()

  def secs(self) -> dict[str, float]:
    wall_secs = time.perf_counter() - self._start_secs
    return {"wall_secs": wall_secs, "cpu_secs": time.process_time() - self._cpu_secs}


def _rate(batches: Iterator[Any], num_rows: Callable[[Any], int], *, window_secs: float) -> dict[str, float]:
  clock, rows = _Clock(), 0
  begin = time.perf_counter()
  while time.perf_counter() - begin < window_secs:
    rows += num_rows(next(batches))
  return {"rows": rows, **clock.secs()}


def read(directory: pathlib.Path, *, side: str, sources: list[int], num_rows: int, window_secs: float) -> list[dict[str, Any]]:
  """For each number of sources: rows read in the window after a first pass of `num_rows` rows, which counts them by source."""
  results = []
  for num_sources in sources:
    batches, counts = READERS[side](directory, num_sources), collections.Counter()
    for _ in range(-(-num_rows // BATCH_ROWS)):
      batch = next(batches)
      assert batch.shape == (BATCH_ROWS, ROW_LEN) and batch.dtype == np.int32, f"{side}: {batch.shape} {batch.dtype}"
      counts.update(batch[:, 0].tolist())
    rate = _rate(batches, len, window_secs=window_secs)
    results.append({"sources": num_sources, "first_rows": [counts[m] for m in range(num_sources)], **rate})
  return results


def read_packed(
  directory: pathlib.Path, *, sources: list[int], shapes: list[tuple[int, int]], window_secs: float
) -> list[dict[str, Any]]:
  """For each number of sources and shape (rows, positions): rows read in the window from `Loader.batches`."""
  results = []
  for num_sources, (batch_rows, row_len) in itertools.product(sources, shapes):
    loader = _loader(directory, _constant(num_sources), num_steps=_NUM_STEPS, batch_rows=batch_rows, row_len=row_len)
    batches = loader.batches(0)
    filled = sum(float((next(batches).segments_BT > 0).mean()) for _ in range(20)) / 20
    rate = _rate(batches, lambda batch: len(batch.source_B), window_secs=window_secs)
    results.append({"sources": num_sources, "rows_a_batch": batch_rows, "row_len": row_len, "filled": filled, **rate})
    batches.close()
  return results


# Seekers: the directory and the furthest row that is sought -> what gives the first batch at a row.

Seek = Callable[[int], Any]


def _seek_loader(directory: pathlib.Path, furthest: int) -> Seek:
  num_steps = min(RAMPED_STEPS, max(2 * furthest // RAMPED_ROWS, 1000))
  loader = _loader(directory, ramps(64, num_steps=num_steps), num_steps=num_steps, batch_rows=RAMPED_ROWS, row_len=ROW_LEN)

  def seek(row: int) -> Any:
    step, first = divmod(row // BATCH_ROWS * BATCH_ROWS, RAMPED_ROWS)
    return next(loader.batches(step, rows=slice(first, first + BATCH_ROWS)))

  return seek


def _seek_mixed(directory: pathlib.Path, furthest: int) -> Seek:
  mixed = _mixed(directory, 8)
  return lambda row: mixed[row // BATCH_ROWS]


def _seek_grain(directory: pathlib.Path, furthest: int) -> Seek:
  dataset = _grain_dataset(directory, 8)
  return lambda row: dataset[row // BATCH_ROWS]


def _seek_grain_state(directory: pathlib.Path, furthest: int) -> Seek:
  import grain

  dataset = _grain_dataset(directory, 8).to_iter_dataset(grain.ReadOptions(**_AHEAD))

  def seek(row: int) -> Any:
    iterator = iter(dataset)
    iterator.set_state(iterator.get_state() | {"next_index": row // BATCH_ROWS})
    return next(iterator)

  return seek


def _seek_hf_skip(directory: pathlib.Path, furthest: int) -> Seek:
  dataset = _hf_interleaved(directory, 8)
  return lambda row: next(dataset.skip(row).iter(batch_size=BATCH_ROWS))


def _seek_hf_state(directory: pathlib.Path, furthest: int) -> Seek:
  dataset, states = _hf_interleaved(directory, 8), {}
  for number, _ in enumerate(dataset):  # a state can only be had by going there
    if number in (0, furthest):
      states[number] = dataset.state_dict()
    if number == furthest:
      break

  def seek(row: int) -> Any:
    dataset.load_state_dict(states[row])
    return next(dataset.iter(batch_size=BATCH_ROWS))

  return seek


def _seek_mosaic(directory: pathlib.Path, furthest: int) -> Seek:
  dataset = _mosaic_dataset(directory, 8, epoch_rows=2 * furthest or None)

  def seek(row: int) -> Any:
    state = dataset.state_dict(0, from_beginning=True) | {"epoch": 0, "sample_in_epoch": row}
    dataset.load_state_dict(state)
    return next(_mosaic_batches(dataset))

  return seek


# With the furthest row that is measured, where going further would take minutes or more memory than there is.
SEEKERS: dict[str, tuple[Callable[[pathlib.Path, int], Seek], int]] = {
  "cpt_jax Loader, packed, 64 ramped sources": (_seek_loader, 10**9),
  "cpt_jax mixture, 8 sources": (_seek_mixed, 10**9),
  "grain mix, 8 sources, by index": (_seek_grain, 10**9),
  "grain mix, 8 sources, set_state": (_seek_grain_state, 10**9),
  "HF interleave, iterable, skip": (_seek_hf_skip, 10**5),
  "HF interleave, iterable, load_state_dict": (_seek_hf_state, 10**5),
  "mosaic StreamingDataset, load_state_dict": (_seek_mosaic, 10**6),
}


def seek(directory: pathlib.Path, *, side: str, row: int, furthest: int, again: int) -> dict[str, Any]:
  """Time and memory of opening a run of `furthest` rows and more, then the times to the first batch at `row`, and of seeks to
  `again` rows near it."""
  make, _ = SEEKERS[side]
  _warm(side, directory)
  (before_bytes,), clock = status("VmRSS"), _Clock()
  seeker = make(directory, furthest)
  opened = clock.secs()
  (peak_bytes,) = status("VmHWM")
  found = {"open": {**opened, "peak_bytes": peak_bytes - before_bytes}, "wall_secs": [], "cpu_secs": []}
  for nth in range(1 + again):
    clock = _Clock()
    seeker(row + nth * _APART)
    for key, value in clock.secs().items():
      found[key].append(value)
  return found


def _warm(side: str, directory: pathlib.Path) -> None:
  """Imports what the side needs and writes the files that it reads, so that opening is neither."""
  if "Loader" in side:
    _loader(directory, ramps(64, num_steps=1), num_steps=1, batch_rows=RAMPED_ROWS, row_len=ROW_LEN)
  elif side.startswith("HF"):
    _hf_sources(directory, 8)
  elif side.startswith("mosaic"):
    _mosaic_files(directory, 8)
  else:
    import grain  # noqa: F401


def tokenize(directory: pathlib.Path, *, side: str, text: str, tokenizer: str, output: str) -> dict[str, Any]:
  """Seconds of making a store of a text in this process, imports aside; its digest of tokens, and the peak of memory."""
  work = (_ours_tokenize if side == "cpt_jax" else _datatrove)(text, tokenizer=tokenizer, output=output)
  (before_bytes,), clock = status("VmRSS"), _Clock()
  work()
  spent = clock.secs()
  (peak_bytes,) = status("VmHWM")
  digest, num_bytes = hashlib.blake2b(digest_size=16), 0
  for path in sorted(pathlib.Path(output).glob("*.ds")):
    tokens = path.read_bytes()
    digest.update(tokens)
    num_bytes += len(tokens)
  return {**spent, "peak_bytes": peak_bytes, "before_bytes": before_bytes, "digest": digest.hexdigest(), "ds_bytes": num_bytes}


def _ours_tokenize(text: str, *, tokenizer: str, output: str) -> Callable[[], Any]:
  from cpt_jax.store import prepare

  return lambda: prepare.prepare([text], tokenizer=tokenizer, output=output, num_workers=1, progress=False)


def _datatrove(text: str, *, tokenizer: str, output: str) -> Callable[[], Any]:
  from datatrove.executor import LocalPipelineExecutor
  from datatrove.pipeline.readers import JsonlReader
  from datatrove.pipeline.tokens import DocumentTokenizer
  from datatrove.utils.logging import logger

  logger.remove()
  special = json.loads((pathlib.Path(tokenizer) / "special_tokens_map.json").read_text())
  eos = special["eos_token"]
  path = pathlib.Path(text)
  pipeline = [
    JsonlReader(str(path.parent), glob_pattern=path.name),
    DocumentTokenizer(
      output,
      tokenizer_name_or_path=str(pathlib.Path(tokenizer) / "tokenizer.json"),
      eos_token=eos if isinstance(eos, str) else eos["content"],
      shuffle_documents=False,
    ),
  ]
  executor = LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=f"{output}_logs")

  def work() -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      executor.run()

  return work


_MEASURE = {"read": read, "read_packed": read_packed, "seek": seek, "tokenize": tokenize}


def _main(what: str, directory: str, options: str) -> None:
  try:
    result = _MEASURE[what](pathlib.Path(directory), **json.loads(options))
  except ImportError as error:
    if (error.name or "").startswith("cpt_jax"):
      raise
    result = {"skipped": f"{type(error).__name__}: {error}"}
  print(json.dumps(result))


if __name__ == "__main__":
  bench_samples.take_cores(sys.argv[4])
  _main(*sys.argv[1:4])
