"""A Hugging Face directory <-> the parameter tree, streamed: a tensor at a time on the host, straight into and out of shards.

Invariant: what is read is exactly what the spec asks for, or an error that names every difference; import then export in the
stored dtypes gives the same bytes.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich import console, progress

from cpt_jax import trees
from cpt_jax.config import ConfigError
from cpt_jax.model import hf_files
from cpt_jax.model.spec import ARCHITECTURES, ModelSpec, from_hf, scaling_to_hf

Entries = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> (safetensors dtype, shape)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Old Llama files hold the rotary frequencies, which follow from the configuration; transformers passes over them too.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq")
# Chosen by hand: small beside the stacked tensors of real models, large enough that calls and page faults cost nothing.
_READ_BYTES, _WRITE_BYTES = 8 << 20, 64 << 20


@dataclasses.dataclass(frozen=True)
class _Layout:
  """One kind of tensor. `theirs` are its dims in the file, each one or more of our letters: "NH D" is a matrix [N * H, D]."""

  name: str  # in the file; {} stands for the layer
  theirs: str
  ours: str  # without the layers' dim

  @property
  def is_stacked(self) -> bool:
    return "{}" in self.name

  @property
  def split(self) -> str:
    """The letters of the file's tensor, products taken apart."""
    return self.theirs.replace(" ", "")


_LAYOUTS = {
  "embedding": _Layout(_EMBEDDING, "V D", "VD"),
  "layers.attn_norm": _Layout("model.layers.{}.input_layernorm.weight", "D", "D"),
  "layers.wq": _Layout("model.layers.{}.self_attn.q_proj.weight", "NH D", "DNH"),
  "layers.wk": _Layout("model.layers.{}.self_attn.k_proj.weight", "KH D", "DKH"),
  "layers.wv": _Layout("model.layers.{}.self_attn.v_proj.weight", "KH D", "DKH"),
  "layers.wo": _Layout("model.layers.{}.self_attn.o_proj.weight", "D NH", "NHD"),
  "layers.bq": _Layout("model.layers.{}.self_attn.q_proj.bias", "NH", "NH"),
  "layers.bk": _Layout("model.layers.{}.self_attn.k_proj.bias", "KH", "KH"),
  "layers.bv": _Layout("model.layers.{}.self_attn.v_proj.bias", "KH", "KH"),
  "layers.q_norm": _Layout("model.layers.{}.self_attn.q_norm.weight", "H", "H"),
  "layers.k_norm": _Layout("model.layers.{}.self_attn.k_norm.weight", "H", "H"),
  "layers.mlp_norm": _Layout("model.layers.{}.post_attention_layernorm.weight", "D", "D"),
  "layers.w_gate": _Layout("model.layers.{}.mlp.gate_proj.weight", "F D", "DF"),
  "layers.w_up": _Layout("model.layers.{}.mlp.up_proj.weight", "F D", "DF"),
  "layers.w_down": _Layout("model.layers.{}.mlp.down_proj.weight", "D F", "FD"),
  "final_norm": _Layout("model.norm.weight", "D", "D"),
  "head": _Layout(_HEAD, "V D", "DV"),
}


def _sizes(spec: ModelSpec) -> dict[str, int]:
  num_heads = {"N": spec.num_heads, "K": spec.num_kv_heads, "H": spec.head_dim}
  return {"V": spec.vocab_size, "D": spec.width, "F": spec.mlp_width, "L": spec.num_layers, **num_heads}


def _layouts(spec: ModelSpec) -> dict[str, _Layout]:
  """Path in our tree -> layout, for the leaves that a model of this spec has."""
  absent = set() if spec.qkv_bias else {"layers.bq", "layers.bk", "layers.bv"}
  absent |= set() if spec.qk_norm else {"layers.q_norm", "layers.k_norm"}
  absent |= {"head"} if spec.tied else set()
  return {path: layout for path, layout in _LAYOUTS.items() if path not in absent}


def _tensors(spec: ModelSpec) -> dict[str, tuple[str, int]]:
  """Name in the file -> (path in our tree, layer), in the order in which transformers keeps them."""
  layouts = _layouts(spec)
  stacked = [(path, layout) for path, layout in layouts.items() if layout.is_stacked]
  names = {_EMBEDDING: ("embedding", 0)}
  names |= {layout.name.format(i): (path, i) for i in range(spec.num_layers) for path, layout in stacked}
  return names | {layout.name: (path, 0) for path, layout in layouts.items() if not layout.is_stacked}


def _shape(layout: _Layout, sizes: dict[str, int]) -> tuple[int, ...]:
  return tuple(math.prod(sizes[letter] for letter in dim) for dim in layout.theirs.split())


# ---- import ----


def check_files(hf_dir: str | os.PathLike, spec: ModelSpec) -> int:
  """Bytes of the tensors that `load_params` would read; looks at the files' headers alone and needs no device.
  Raises ConfigError: a line for each tensor that is missing, unknown, of another shape, or in a dtype that is not read."""
  files = hf_files.TensorFiles(hf_dir)
  return sum(files.entries[name].num_bytes for name in _match(files, spec).values())


def load_params(hf_dir: str | os.PathLike, spec: ModelSpec, abstract_params: Any) -> Any:
  """Reads float32, bfloat16 or float16 safetensors into arrays of the shapes, dtypes and shardings of `abstract_params`.

  Each process reads the parts that its own devices hold. Beside those, the host holds one stacked tensor's local part at a time.
  Raises ConfigError: as `check_files`; also tensors that hold NaN or infinity, all of them by name.
  """
  files = hf_files.TensorFiles(hf_dir)
  names = _match(files, spec)
  layouts, sizes = _layouts(spec), _sizes(spec)
  bad: list[str] = []

  def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    layout = layouts[path]
    expected = tuple(sizes[letter] for letter in ("L" if layout.is_stacked else "") + layout.ours)
    assert leaf.shape == expected, (path, leaf.shape, expected)
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # None is for shardings that do not cut
      key = tuple(dim.indices(size)[:2] for dim, size in zip(index, leaf.shape, strict=True))
      if key not in parts:  # replicas share one host copy
        parts[key] = _read_part(files, names, layout, sizes, key, leaf.dtype, bad=bad, advance=advance)
      return parts[key]

    array = jax.make_array_from_callback(leaf.shape, _sharding(leaf), part, dtype=leaf.dtype)
    return jax.block_until_ready(array)  # or the next leaf's host copy would come on top of this one's

  total = sum(_local_bytes(files, names, layouts[path], leaf) for path, leaf in trees.paths(abstract_params).items())
  with _progress(f"reading {files.directory}", total) as advance:
    params = trees.map_with_path(place, abstract_params)
  if bad:
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(abstract_params)}))
    heading = f"{files.directory}: tensors with NaN or infinity (as {dtypes}); download them again:"
    raise ConfigError("\n".join([heading, *hf_files.indent(bad)]))
  return params


def _sharding(leaf: jax.ShapeDtypeStruct) -> Any:
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if leaf.sharding is None else leaf.sharding


def _local_bytes(files: hf_files.TensorFiles, names: dict[str, str], layout: _Layout, leaf: jax.ShapeDtypeStruct) -> int:
  indices = _sharding(leaf).addressable_devices_indices_map(leaf.shape).values()
  keys = {tuple(dim.indices(size)[:2] for dim, size in zip(index, leaf.shape, strict=True)) for index in indices}
  itemsize = hf_files.DTYPES[files.entries[names[layout.name.format(0)]].dtype].itemsize
  return itemsize * sum(math.prod(stop - start for start, stop in key) for key in keys)


def _read_part(
  files: hf_files.TensorFiles,
  names: dict[str, str],
  layout: _Layout,
  sizes: dict[str, int],
  box: tuple[tuple[int, int], ...],
  dtype: Any,
  *,
  bad: list[str],
  advance: Callable[[int], None],
) -> np.ndarray:
  """The values of a leaf between `box`'s (start, stop) along each dimension; names of tensors that are not finite go to `bad`."""
  out = np.empty([stop - start for start, stop in box], dtype)
  layers = range(*box[0]) if layout.is_stacked else (0,)
  bounds = dict(zip(layout.ours, box[1:] if layout.is_stacked else box, strict=True))
  lead = layout.split[0]  # the file's rows: read in their order, a few megabytes at a time
  row_bytes = math.prod(stop - start for letter, (start, stop) in bounds.items() if letter != lead) * np.dtype(dtype).itemsize
  num_rows = max(1, _READ_BYTES // max(row_bytes, 1))
  to_theirs = [layout.ours.index(letter) for letter in layout.split]
  for at, layer in enumerate(layers):
    name = names[layout.name.format(layer)]
    source = files.view(name).reshape([sizes[letter] for letter in layout.split])
    target = (out[at] if layout.is_stacked else out).transpose(to_theirs)
    rest = tuple(slice(*bounds[letter]) for letter in layout.split[1:])
    start, stop = bounds[lead]
    for low in range(start, stop, num_rows):
      high = min(low + num_rows, stop)
      rows = target[low - start : high - start]
      with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by name
        rows[...] = source[(slice(low, high), *rest)]
        if not np.isfinite(rows).all() and name not in bad:
          bad.append(name)
      advance(rows.size * source.dtype.itemsize)
    files.release(name)
  return out


def _match(files: hf_files.TensorFiles, spec: ModelSpec) -> dict[str, str]:
  """Name that the spec asks for -> name in the files; they differ only where a tied head stands in for the embedding."""
  expected, entries, sizes = _tensors(spec), files.entries, _sizes(spec)
  layouts = _layouts(spec)
  names, lines = {}, []
  for name, (path, _) in expected.items():
    found = _HEAD if spec.tied and name == _EMBEDDING and name not in entries and _HEAD in entries else name
    shape = _shape(layouts[path], sizes)
    if found not in entries:
      lines.append(f"{name}: missing; expected shape {list(shape)}")
    elif entries[found].dtype not in hf_files.DTYPES:
      dtype = entries[found].dtype
      lines.append(f"{found}: stored as {dtype}; expected F32, BF16 or F16 (take the model's unquantised files)")
    elif entries[found].shape != shape:
      lines.append(f"{found}: found shape {list(entries[found].shape)}, expected {list(shape)}")
    names[name] = found
  for name, entry in entries.items():
    if name not in names.values() and not _HARMLESS.fullmatch(name):
      if name == _HEAD and spec.tied:
        if not lines and not _same(files, name, _EMBEDDING):
          lines.append(f"{name}: differs from {_EMBEDDING}, though config.json ties them; set tie_word_embeddings to false")
      else:
        lines.append(f"{name}: not part of this model; found shape {list(entry.shape)}, expected no such tensor")
  if lines:
    raise ConfigError("\n".join([f"{files.directory}: the files do not fit config.json:", *hf_files.indent(lines)]))
  return names


def _same(files: hf_files.TensorFiles, name: str, other: str) -> bool:
  first, second = files.view(name), files.view(other)
  step = max(1, _READ_BYTES // max(first[:1].nbytes, 1))
  same = first.shape == second.shape and all(
    np.array_equal(first[i : i + step], second[i : i + step]) for i in range(0, len(first), step)
  )
  files.release(name)
  files.release(other)
  return same


# ---- export ----


def save_params(
  params: Any,
  spec: ModelSpec,
  output_dir: str | os.PathLike,
  *,
  source_dir: str | os.PathLike | None = None,
  hf_config: dict[str, Any] | None = None,
  dtype: str | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> list[pathlib.Path]:
  """Writes a directory that transformers loads; returns the files in it. Every process calls it, the first one writes.

  `source_dir` is the Hugging Face directory that the run started from, or a tokenizer's: tokenizer, generation and licence files
  are carried along. `hf_config` is the config.json to write (default: that of `source_dir`); where it is not of this model, one
  is made from the spec. `dtype`: float32, bfloat16 or float16; by default each tensor's own in `source_dir`, float32 if the model
  is not from there. The directory appears whole or not at all, and replaces none but an earlier export.
  Raises ConfigError: `output_dir` holds something else, no space, NaN or infinity in a tensor, or no such `source_dir`.
  """
  if dtype is not None and dtype not in hf_files.DTYPE_NAMES:
    raise ConfigError(f"dtype={dtype!r}: choose one of {', '.join(hf_files.DTYPE_NAMES)}")
  output = pathlib.Path(output_dir)
  source = pathlib.Path(source_dir) if source_dir else None
  if source is not None and not source.exists():
    raise ConfigError(f"{source}: not there any more; the export takes the tokenizer and config.json from it")
  config, is_same = _config(spec, source, hf_config)
  dtypes = stored_dtypes(spec, source if is_same else None, dtype)
  if dtype is not None or not is_same:
    config = _with_dtype(config, dtypes)
  shards = plan_shards(spec, dtypes, max_shard_bytes=max_shard_bytes)
  total = sum(_num_bytes(entry) for entries in shards.values() for entry in entries.values())
  is_writer = jax.process_index() == 0
  with _progress(f"writing {output}", total) as advance, contextlib.ExitStack() as stack:
    partial = stack.enter_context(hf_files.atomic_directory(output, num_bytes=total)) if is_writer else None
    for file_name, entries in shards.items():
      chunks = _chunks(params, spec, entries, advance=advance)
      if partial is not None:
        hf_files.write_safetensors(partial / file_name, entries, chunks)
      else:
        collections.deque(chunks, maxlen=0)  # the gathers in it need every process
    if partial is not None:
      if len(shards) > 1:
        weight_map = {name: file_name for file_name, entries in shards.items() for name in entries}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        hf_files.write_file(partial / hf_files.INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
      hf_files.write_file(partial / "config.json", json.dumps(config, indent=2).encode() + b"\n")
      for path in hf_files.carried_files(source) if source is not None else []:
        hf_files.copy_file(path, partial / path.name)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("export")
  return sorted(output.iterdir()) if is_writer else []


def _config(spec: ModelSpec, source: pathlib.Path | None, hf_config: dict[str, Any] | None) -> tuple[dict[str, Any], bool]:
  """config.json to write, and whether `source` holds this very model (another vocabulary size aside)."""
  of_source = hf_files.load_json(source / "config.json") if source is not None and (source / "config.json").exists() else None
  config = of_source if hf_config is None else hf_config
  is_same = of_source is not None and _describes(of_source, spec)
  if config is not None and _describes(config, spec):
    return {key: value for key, value in config.items() if key != "auto_map"} | {"vocab_size": spec.vocab_size}, is_same
  ids = {key: (config or {})[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in (config or {})}
  return to_hf(spec) | ids, is_same


def _describes(config: dict[str, Any], spec: ModelSpec) -> bool:
  try:
    return dataclasses.replace(from_hf(config), vocab_size=spec.vocab_size) == spec
  except ConfigError:  # a model of another kind, whose tokenizer alone is used
    return False


def to_hf(spec: ModelSpec) -> dict[str, Any]:
  """The config.json of a spec: `from_hf(to_hf(spec)) == spec`."""
  config: dict[str, Any] = {"architectures": [f"{ARCHITECTURES[spec.family]}ForCausalLM"], "model_type": spec.family}
  config |= {"hidden_act": "silu", "vocab_size": spec.vocab_size, "hidden_size": spec.width, "intermediate_size": spec.mlp_width}
  config |= {"num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads}
  config |= {"num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "max_position_embeddings": spec.max_positions}
  config |= {"rms_norm_eps": spec.norm_eps, "rope_theta": spec.rope_theta, "rope_scaling": scaling_to_hf(spec.rope_scaling)}
  config |= {"tie_word_embeddings": spec.tied, "initializer_range": spec.init_std}
  config |= {key: getattr(spec, key) for key in ("true_vocab_size", "base_vocab_size") if getattr(spec, key)}
  if spec.family != "llama":
    config["sliding_window"] = max(spec.windows, default=0) or None
  if spec.family in ("qwen2", "qwen3"):
    kinds = ["sliding_attention" if window else "full_attention" for window in spec.windows]
    config |= {"use_sliding_window": bool(kinds), "layer_types": kinds or ["full_attention"] * spec.num_layers}
  assert from_hf(config) == spec, (config, spec)
  return config


def stored_dtypes(spec: ModelSpec, source: pathlib.Path | None, dtype: str | None) -> dict[str, str]:
  """Tensor name -> safetensors dtype to write: `dtype`, or by default what `source` has; float32 without a source."""
  names = list(_tensors(spec))
  if dtype is not None:
    return dict.fromkeys(names, hf_files.DTYPE_NAMES[dtype])
  if source is None:
    return dict.fromkeys(names, "F32")
  entries = hf_files.TensorFiles(source).entries
  found = {name: entries[name].dtype for name in names if name in entries}
  if not found:
    return dict.fromkeys(names, "F32")
  common = collections.Counter(found.values()).most_common(1)[0][0]
  return {name: found.get(name, common) for name in names}


def _with_dtype(config: dict[str, Any], dtypes: dict[str, str]) -> dict[str, Any]:
  common = collections.Counter(dtypes.values()).most_common(1)[0][0]
  name = next(long for long, short in hf_files.DTYPE_NAMES.items() if short == common)
  # transformers 5 writes `dtype`, before it `torch_dtype`; both read the older key.
  keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
  return config | dict.fromkeys(keys, name)


def _num_bytes(entry: tuple[str, tuple[int, ...]]) -> int:
  return hf_files.DTYPES[entry[0]].itemsize * math.prod(entry[1])


def plan_shards(spec: ModelSpec, dtypes: dict[str, str], *, max_shard_bytes: int) -> dict[str, Entries]:
  """File name -> its tensors in the order of writing; `dtypes` is tensor name -> safetensors dtype."""
  layouts, sizes = _layouts(spec), _sizes(spec)
  groups: list[Entries] = [{}]
  group_bytes = 0
  for name, (path, _) in _tensors(spec).items():
    entry = (dtypes[name], _shape(layouts[path], sizes))
    if groups[-1] and group_bytes + _num_bytes(entry) > max_shard_bytes:
      groups.append({})
      group_bytes = 0
    groups[-1][name] = entry
    group_bytes += _num_bytes(entry)
  # Wider items first, so that each tensor starts at a multiple of its item's size.
  groups = [dict(sorted(group.items(), key=lambda item: -hf_files.DTYPES[item[1][0]].itemsize)) for group in groups]
  if len(groups) == 1:
    return {hf_files.SINGLE: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _chunks(params: Any, spec: ModelSpec, entries: Entries, *, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
  """The tensors' values in the file's layout and dtype, rows after rows."""
  leaves, layouts, tensors = trees.paths(params), _layouts(spec), _tensors(spec)
  for name, (dtype, shape) in entries.items():
    path, layer = tensors[name]
    leaf, layout = leaves[path], layouts[path]
    dim = layout.ours.index(layout.split[0]) + layout.is_stacked
    size, quantum = leaf.shape[dim], leaf.sharding.num_devices
    row_bytes = leaf.itemsize * math.prod(shape) // size
    # A multiple of the devices, since a slice of a sharded dimension must divide as the dimension does.
    num_rows = min(size, max(_WRITE_BYTES // row_bytes // quantum, 1) * quantum)
    # Replicated over the leaf's own devices: every process has the values then, whatever its part of them was.
    place = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.P()) if hasattr(leaf.sharding, "mesh") else leaf.sharding
    for low in range(0, size, num_rows):
      start = min(low, size - num_rows)  # the last slice is as long as the others: one program serves all
      rows = _rows(leaf, layer, start, layout=layout, num_rows=num_rows, dtype=hf_files.DTYPES[dtype], place=place)
      chunk = np.asarray(rows.addressable_data(0))[low - start :]
      if not np.isfinite(chunk).all():
        raise ConfigError(f"{name}: NaN or infinity in {chunk.dtype}; nothing was exported")
      yield chunk
      advance(chunk.nbytes)


@functools.partial(jax.jit, static_argnames=("layout", "num_rows", "dtype", "place"))
def _rows(leaf: jax.Array, layer: int, start: int, *, layout: _Layout, num_rows: int, dtype: Any, place: Any) -> jax.Array:
  """`num_rows` rows of one layer's tensor in the file's layout, of a leaf [L, ...] or [...].

  Cast on the device, which halves the traffic; exact as numpy's cast is.
  """
  if layout.is_stacked:
    leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
  leaf = jax.lax.dynamic_slice_in_dim(leaf, start, num_rows, axis=layout.ours.index(layout.split[0]))
  leaf = leaf.transpose([layout.ours.index(letter) for letter in layout.split]).astype(dtype)
  return leaf if isinstance(place, jax.sharding.SingleDeviceSharding) else jax.sharding.reshard(leaf, place)


@contextlib.contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
  """A bar on a terminal, nothing elsewhere; yields the function to call with bytes done."""
  if not sys.stderr.isatty() or jax.process_index() != 0:
    yield lambda num_bytes: None
    return
  columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
  columns += (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
  with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
    task = bar.add_task(what, total=total_bytes)
    yield lambda num_bytes: bar.advance(task, num_bytes)
