"""Import and export of Hugging Face directories: bytes, shardings, hygiene of the files, kills."""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cpt_jax import trees
from cpt_jax.config import ConfigError
from cpt_jax.devices import mesh as mesh_lib
from cpt_jax.model import hf_files, pretrained, transformer
from cpt_jax.model.spec import Llama3Scaling, ModelSpec, YarnScaling, from_hf

LLAMA = ModelSpec(
  family="llama",
  vocab_size=24,
  width=16,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,  # not width / num_heads
  mlp_width=20,
  max_positions=64,
)
SPECS = {
  "llama": LLAMA,
  "tied": dataclasses.replace(LLAMA, tied=True),
  "mistral": dataclasses.replace(LLAMA, family="mistral", windows=(32, 32, 32)),
  "qwen2": dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied=True, windows=(0, 32, 32)),
  "qwen3": dataclasses.replace(LLAMA, family="qwen3", qk_norm=True),
  "llama3": dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32)),
  "yarn": dataclasses.replace(LLAMA, rope_scaling=YarnScaling(4.0, 16, 1.2)),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
  """Names and shapes as transformers has them, written out without the code under test."""
  D, H, F = spec.width, spec.head_dim, spec.mlp_width
  NH, KH = spec.num_heads * H, spec.num_kv_heads * H
  shapes = {"model.embed_tokens.weight": (spec.vocab_size, D), "model.norm.weight": (D,)}
  for i in range(spec.num_layers):
    layer = {
      "input_layernorm.weight": (D,),
      "post_attention_layernorm.weight": (D,),
      "self_attn.q_proj.weight": (NH, D),
      "self_attn.k_proj.weight": (KH, D),
      "self_attn.v_proj.weight": (KH, D),
      "self_attn.o_proj.weight": (D, NH),
      "mlp.gate_proj.weight": (F, D),
      "mlp.up_proj.weight": (F, D),
      "mlp.down_proj.weight": (D, F),
    }
    if spec.qkv_bias:
      layer |= {"self_attn.q_proj.bias": (NH,), "self_attn.k_proj.bias": (KH,), "self_attn.v_proj.bias": (KH,)}
    if spec.qk_norm:
      layer |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  return shapes | ({} if spec.tied else {"lm_head.weight": (spec.vocab_size, D)})


def hf_tensors(spec: ModelSpec, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(DTYPES[dtype]) for name, shape in hf_shapes(spec).items()}


def write_hf(directory, spec, tensors, *, num_shards=1, dtype="float32"):
  """A directory as transformers would have written it."""
  directory.mkdir(parents=True, exist_ok=True)
  config = pretrained.to_hf(spec) | {"torch_dtype": dtype, "bos_token_id": 1, "eos_token_id": 2}
  (directory / "config.json").write_text(json.dumps(config))
  names = list(tensors)
  if num_shards == 1:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
  weight_map = {}
  for shard in range(num_shards):
    file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
    part = names[shard::num_shards]  # a layer's tensors in different files
    save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return directory


def read_hf(directory) -> dict[str, np.ndarray]:
  """Every tensor, by the safetensors library."""
  tensors = {}
  for path in sorted(directory.glob("*.safetensors")):
    with safe_open(path, framework="numpy") as file:
      assert file.metadata() == {"format": "pt"}
      tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
  return tensors


def load(directory, spec, *, dtype=jnp.float32, mesh=None):
  with jax.set_mesh(mesh or one_device()):
    abstract = transformer.abstract_params(spec)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), abstract)
    return pretrained.load_params(directory, spec, abstract)


def random_params(spec, seed=0):
  """As `transformer.init`, which takes seconds to compile."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), transformer.abstract_params(spec))


def one_device():
  return mesh_lib.make_mesh(data=1, fsdp=1, context=1, tensor=1, devices=jax.devices()[:1])


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
  assert found.keys() == expected.keys()
  for name in expected:
    assert found[name].dtype == expected[name].dtype, name
    assert found[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture
def tied(tmp_path):
  """A small tied model on disk: (directory, spec, tensors)."""
  tensors = hf_tensors(SPECS["tied"])
  return write_hf(tmp_path / "base", SPECS["tied"], tensors), SPECS["tied"], tensors


# ---- values ----


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize(
  ("family", "dtype"), [("llama", "float32"), ("llama", "float16"), *((family, "bfloat16") for family in SPECS)]
)
def test_import_then_export_gives_the_same_bytes(tmp_path, family, num_shards, dtype):
  spec, tensors = SPECS[family], hf_tensors(SPECS[family], dtype)
  source = write_hf(tmp_path / "base", spec, tensors, num_shards=num_shards, dtype=dtype)
  params = load(source, spec)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  limit = 5_000_000_000 if num_shards == 1 else 2_000
  files = pretrained.save_params(params, spec, tmp_path / "out", source_dir=source, max_shard_bytes=limit)
  assert_same(read_hf(tmp_path / "out"), tensors)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
  weights = [file for file in files if file.suffix == ".safetensors"]
  assert (len(weights) > 1) == (num_shards > 1)
  if num_shards > 1:
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert [file.name for file in weights] == sorted(set(index["weight_map"].values()))
    largest = max(value.nbytes for value in tensors.values())
    for file in weights:
      held = sum(value.nbytes for name, value in tensors.items() if index["weight_map"][name] == file.name)
      assert held <= max(limit, largest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_finite_number_of_16_bits_survives(tmp_path, dtype):
  numbers = np.arange(65536, dtype=np.uint16)
  exponent = 0x7F80 if dtype == "bfloat16" else 0x7C00
  numbers = numbers[(numbers & exponent) != exponent].view(DTYPES[dtype])  # subnormals and -0 are in it
  spec = dataclasses.replace(SPECS["tied"], vocab_size=len(numbers) // SPECS["tied"].width)
  tensors = hf_tensors(spec, dtype) | {"model.embed_tokens.weight": numbers.reshape(spec.vocab_size, spec.width)}
  source = write_hf(tmp_path / "base", spec, tensors, dtype=dtype)
  pretrained.save_params(load(source, spec), spec, tmp_path / "out", source_dir=source)
  assert_same(read_hf(tmp_path / "out"), tensors)


def test_mixed_dtypes_keep_each_its_own_and_lie_aligned(tmp_path):
  spec = dataclasses.replace(SPECS["qwen3"], width=15, mlp_width=21)  # sizes that are odd
  tensors = hf_tensors(spec, "bfloat16")
  tensors |= {name: value.astype(np.float32) for name, value in tensors.items() if "norm" in name}
  source = write_hf(tmp_path / "base", spec, tensors, dtype="bfloat16")
  pretrained.save_params(load(source, spec), spec, tmp_path / "out", source_dir=source)
  assert_same(read_hf(tmp_path / "out"), tensors)
  for entry in hf_files.TensorFiles(tmp_path / "out").entries.values():
    assert entry.offset % hf_files.DTYPES[entry.dtype].itemsize == 0


def test_export_in_another_dtype_rounds_to_nearest_and_says_so(tied, tmp_path):
  directory, spec, tensors = tied
  pretrained.save_params(load(directory, spec), spec, tmp_path / "out", source_dir=directory, dtype="bfloat16")
  assert_same(read_hf(tmp_path / "out"), {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
  assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  with pytest.raises(ConfigError, match=r"int8.*choose one of float32, bfloat16, float16"):
    pretrained.save_params(load(directory, spec), spec, tmp_path / "other", source_dir=directory, dtype="int8")


def test_import_into_bfloat16(tied):
  directory, spec, tensors = tied
  params = load(directory, spec, dtype=jnp.bfloat16)
  expected = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
  assert np.asarray(params["embedding"]).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
  ("family", "axes"), [("qwen2", (1, 8, 1, 1)), ("qwen2", (2, 2, 1, 2)), ("qwen3", (2, 1, 2, 2)), ("llama", (8, 1, 1, 1))]
)
def test_shards_hold_and_export_the_same_as_one_device(tmp_path, family, axes, monkeypatch):
  monkeypatch.setattr(pretrained, "_WRITE_BYTES", 500)  # several slices a tensor, the last one not whole
  monkeypatch.setattr(pretrained, "_READ_BYTES", 300)
  spec = dataclasses.replace(SPECS[family], vocab_size=26)
  tensors = hf_tensors(spec, "bfloat16")
  save_file(tensors, tmp_path / "model.safetensors")
  mesh = mesh_lib.make_mesh(**dict(zip(mesh_lib.AXES, axes, strict=True)))
  params, alone = load(tmp_path, spec, mesh=mesh), load(tmp_path, spec)
  for path, leaf in trees.paths(params).items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.paths(alone)[path]), err_msg=path)
    assert leaf.sharding.mesh == mesh, path
  if axes[1] > 1:
    assert not params["layers"]["wq"].sharding.is_fully_replicated
  for where, tree in (("mesh", params), ("alone", alone)):
    pretrained.save_params(tree, spec, tmp_path / where, dtype="bfloat16")
    assert_same(read_hf(tmp_path / where), tensors)
  with jax.set_mesh(mesh):  # the loop exports with its mesh set
    pretrained.save_params(params, spec, tmp_path / "inside", dtype="bfloat16")
  assert_same(read_hf(tmp_path / "inside"), tensors)


def test_each_device_reads_its_own_part_and_replicas_share(tied, monkeypatch):
  directory, spec, _ = tied
  seen, read = [], pretrained._read_part
  monkeypatch.setattr(pretrained, "_read_part", lambda *args, **kwargs: seen.append(args[4]) or read(*args, **kwargs))
  load(directory, spec, mesh=mesh_lib.make_mesh(data=2, fsdp=2, context=1, tensor=2))
  embedding = [box for box in seen if box in [((v, v + 12), (d, d + 8)) for v in (0, 12) for d in (0, 8)]]
  assert len(embedding) == len(set(embedding)) == 4


def test_loaded_parameters_can_be_donated(tied):
  directory, spec, tensors = tied
  params = load(directory, spec)
  doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(params)
  np.testing.assert_array_equal(np.asarray(doubled["embedding"]), 2 * tensors["model.embed_tokens.weight"])


# ---- what does not fit ----


def test_every_difference_is_listed_at_once(tied):
  directory, spec, tensors = tied
  q, k = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
  del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
  tensors[q] = tensors[q][:, :8]
  tensors[k] = tensors[k].astype(np.int8)
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
  tensors["model.layers.3.input_layernorm.weight"] = np.zeros(16, np.float32)
  save_file(tensors, directory / "model.safetensors")
  with pytest.raises(ConfigError) as error:
    load(directory, spec)
  assert str(error.value).splitlines() == [
    f"{directory}: the files do not fit config.json:",
    "  model.layers.0.self_attn.k_proj.weight: stored as I8; expected F32, BF16 or F16 (take the model's unquantised files)",
    "  model.layers.1.self_attn.q_proj.weight: found shape [24, 8], expected [24, 16]",
    "  model.layers.2.mlp.up_proj.weight: missing; expected shape [20, 16]",
    "  model.norm.weight: missing; expected shape [16]",
    "  model.layers.0.self_attn.q_proj.bias: not part of this model; found shape [24], expected no such tensor",
    "  model.layers.3.input_layernorm.weight: not part of this model; found shape [16], expected no such tensor",
  ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
  tensors = hf_tensors(LLAMA, dtype)
  bad = ["lm_head.weight", "model.layers.2.self_attn.o_proj.weight", "model.layers.0.input_layernorm.weight"]
  for name in bad:
    tensors[name].reshape(-1)[-1] = value
  write_hf(tmp_path, LLAMA, tensors)
  with pytest.raises(ConfigError) as error:
    load(tmp_path, LLAMA)
  assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == sorted(bad)


def test_a_float32_too_large_for_float16_is_refused_both_ways(tied, tmp_path):
  directory, spec, tensors = tied
  tensors["model.norm.weight"][3] = 1e6
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(ConfigError, match=r"\(as float16\)(.|\n)*model\.norm\.weight"):
    load(directory, spec, dtype=jnp.float16)
  with pytest.raises(ConfigError, match=r"model.norm.weight: NaN or infinity in float16; nothing was exported"):
    pretrained.save_params(load(directory, spec), spec, tmp_path / "out", source_dir=directory, dtype="float16")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_tied_models_with_a_head_in_the_file(tied):
  directory, spec, tensors = tied
  embedding = tensors["model.embed_tokens.weight"]
  save_file(tensors | {"lm_head.weight": embedding}, directory / "model.safetensors")
  np.testing.assert_array_equal(np.asarray(load(directory, spec)["embedding"]), embedding)
  other = embedding.copy()
  other[-1, -1] += 1
  save_file(tensors | {"lm_head.weight": other}, directory / "model.safetensors")
  with pytest.raises(ConfigError, match=r"lm_head.weight: differs from model.embed_tokens.weight.*tie_word_embeddings to false"):
    load(directory, spec)
  del tensors["model.embed_tokens.weight"]  # transformers ties to whichever is there
  save_file(tensors | {"lm_head.weight": embedding}, directory / "model.safetensors")
  np.testing.assert_array_equal(np.asarray(load(directory, spec)["embedding"]), embedding)


def test_old_rotary_buffers_are_passed_over(tied):
  directory, spec, tensors = tied
  buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float64) for i in range(3)}
  save_file(tensors | buffers, directory / "model.safetensors")
  assert pretrained.check_files(directory, spec) == sum(value.nbytes for value in tensors.values())
  load(directory, spec)


# ---- malicious and broken directories ----


def sharded(tmp_path):
  tensors = hf_tensors(LLAMA)
  return write_hf(tmp_path / "base", LLAMA, tensors, num_shards=2), tensors


def edit_index(directory, change):
  path = directory / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


@pytest.mark.parametrize(
  ("file_name", "message"),
  [
    ("/etc/passwd", "expected a name that ends in .safetensors"),
    ("/etc/x.safetensors", "expected the name of a file in the same directory, found a path"),
    ("../x.safetensors", "expected the name of a file in the same directory, found a path"),
    ("..\\x.safetensors", "expected the name of a file in the same directory, found a path"),
    ("sub/x.safetensors", "expected the name of a file in the same directory, found a path"),
    ("..", "expected a name that ends in .safetensors"),
    ("", "expected a name that ends in .safetensors"),
    ("x\0.safetensors", "expected the name of a file in the same directory, found a path"),
    ("pytorch_model.bin", "expected a name that ends in .safetensors"),
    ("absent.safetensors", "absent.safetensors: missing; download it again"),
    ("folder.safetensors", "folder.safetensors: not a file"),
    ("link.safetensors", "outside the directory; put the file itself there"),
  ],
)
def test_an_index_cannot_point_elsewhere(tmp_path, file_name, message):
  directory, tensors = sharded(tmp_path)
  save_file(tensors, tmp_path / "x.safetensors")  # a file that would do, were it allowed
  (directory / "sub").mkdir()
  save_file(tensors, directory / "sub" / "x.safetensors")
  (directory / "folder.safetensors").mkdir()
  (directory / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
  edit_index(directory, lambda weight_map: weight_map.update({"model.norm.weight": file_name}))
  with pytest.raises(ConfigError) as error:
    load(directory, LLAMA)
  assert message in str(error.value) and "model.safetensors.index.json" in str(error.value)


def test_a_single_file_or_index_that_links_elsewhere_is_refused(tmp_path):
  tensors = hf_tensors(LLAMA)
  write_hf(tmp_path / "real", LLAMA, tensors)
  (tmp_path / "base").mkdir()
  (tmp_path / "base" / "model.safetensors").symlink_to(tmp_path / "real" / "model.safetensors")
  with pytest.raises(ConfigError, match=r"a link to .*real/model.safetensors, outside the directory"):
    load(tmp_path / "base", LLAMA)


def test_links_inside_the_directory_and_of_the_hubs_cache_are_read(tmp_path):
  tensors = hf_tensors(LLAMA)
  blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / "0123abcd"
  write_hf(blobs, LLAMA, tensors)
  (blobs / "model.safetensors").rename(blobs / "f00d")
  snapshot.mkdir(parents=True)
  (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
  params = load(snapshot, LLAMA)
  np.testing.assert_array_equal(np.asarray(params["embedding"]), tensors["model.embed_tokens.weight"])
  (tmp_path / "alias").symlink_to(snapshot)  # the directory itself may be a link
  load(tmp_path / "alias", LLAMA)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form_is_refused(tmp_path, content):
  directory, _ = sharded(tmp_path)
  (directory / "model.safetensors.index.json").write_text(content)
  with pytest.raises(ConfigError, match=r"model.safetensors.index.json: expected"):
    load(directory, LLAMA)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"weight_map": {"a": "x", "a": "y"}}'])
def test_an_index_that_is_no_json_is_refused(tmp_path, content):
  directory, _ = sharded(tmp_path)
  (directory / "model.safetensors.index.json").write_bytes(content)
  with pytest.raises(ConfigError, match=r"model.safetensors.index.json: not readable as JSON"):
    load(directory, LLAMA)


def test_an_oversized_index_is_refused_unread(tmp_path):
  directory, _ = sharded(tmp_path)
  with (directory / "model.safetensors.index.json").open("wb") as file:
    file.truncate(1 << 40)  # sparse
  with pytest.raises(ConfigError, match=r"1099511627776 bytes, expected at most"):
    load(directory, LLAMA)


def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path):
  directory, tensors = sharded(tmp_path)
  first, second = list(tensors)[:2]

  def change(weight_map):
    weight_map["model.ghost.weight"] = weight_map[first]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]
    del weight_map["lm_head.weight"]

  edit_index(directory, change)
  with pytest.raises(ConfigError) as error:
    load(directory, LLAMA)
  text = str(error.value)
  assert f"{first}: found in model-00001-of-00002.safetensors, the index has it in model-00002-of-00002.safetensors" in text
  assert f"{second}: found in model-00002-of-00002.safetensors, the index has it in model-00001-of-00002.safetensors" in text
  assert "lm_head.weight: found in model-0000" in text and "the index does not list it" in text
  assert "model.ghost.weight: the index has it in model-00001-of-00002.safetensors, which does not hold it" in text
  assert len(text.splitlines()) == 5


def header(value) -> bytes:
  text = json.dumps(value).encode()
  return struct.pack("<Q", len(text)) + text


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
  "content",
  [
    b"",
    struct.pack("<Q", 1 << 60),
    struct.pack("<Q", 200_000_000) + b"{}",
    header({"a": F32}),  # no body
    header({"a": F32}) + bytes(17),
    header({"a": F32 | {"shape": [5]}}) + bytes(16),
    header({"a": F32 | {"shape": [1 << 40, 1 << 40]}}) + bytes(16),
    header({"a": F32 | {"data_offsets": [8, 24]}}) + bytes(24),
    header({"a": F32, "b": F32}) + bytes(16),
    header({"a": F32 | {"dtype": "PICKLE"}}) + bytes(16),
    header({"a": F32})[:-1] + b"!" + bytes(16),
  ],
)
def test_damaged_files_are_refused_by_name(tmp_path, content):
  (tmp_path / "model.safetensors").write_bytes(content)
  with pytest.raises(ConfigError, match=r"model.safetensors: not a whole safetensors file \(.*download it again"):
    load(tmp_path, LLAMA)


def test_directories_without_safetensors_say_what_to_do(tmp_path):
  with pytest.raises(ConfigError, match=r"absent: no such directory"):
    load(tmp_path / "absent", LLAMA)
  with pytest.raises(ConfigError, match=r"neither model.safetensors nor model.safetensors.index.json .* found no file"):
    load(tmp_path, LLAMA)
  (tmp_path / "adapter_model.safetensors").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"found adapter_model.safetensors"):
    load(tmp_path, LLAMA)
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ConfigError, match=r"PyTorch pickles only \(adapter.*pytorch_model.bin\).*run code(.|\n)*save_pretrained"):
    load(tmp_path, LLAMA)


# ---- what an export holds, and when it appears ----


def test_tokenizer_generation_and_licence_files_travel_and_nothing_else(tied, tmp_path):
  directory, spec, _ = tied
  wanted = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt"]
  wanted += ["added_tokens.json", "chat_template.jinja", "generation_config.json", "LICENSE", "LICENSE.txt"]
  unwanted = ["pytorch_model.bin", "modeling_x.py", "chat_template.py", "optimizer.pt", "README.md", "LICENSE.bin"]
  for name in wanted + unwanted:
    (directory / name).write_text(f"content of {name}")
  (tmp_path / "secret").write_text("of another directory")
  (directory / "chat_template.json").symlink_to(tmp_path / "secret")
  files = pretrained.save_params(load(directory, spec), spec, tmp_path / "out", source_dir=directory)
  names = {path.name for path in files}
  assert names == {*wanted, "config.json", "model.safetensors", hf_files.MANIFEST}
  assert all((tmp_path / "out" / name).read_text() == f"content of {name}" for name in wanted)


def test_config_is_carried_along_but_for_code_and_vocabulary(tied, tmp_path):
  directory, spec, _ = tied
  config = json.loads((directory / "config.json").read_text()) | {"_name_or_path": "x/y", "auto_map": {}}
  (directory / "config.json").write_text(json.dumps(config))
  params = load(directory, spec)
  params["embedding"] = jnp.concatenate([params["embedding"]] * 2)
  grown = dataclasses.replace(spec, vocab_size=2 * spec.vocab_size)
  pretrained.save_params(params, grown, tmp_path / "out", source_dir=directory)
  del config["auto_map"]
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"vocab_size": 2 * spec.vocab_size}
  np.testing.assert_array_equal(np.asarray(load(tmp_path / "out", grown)["embedding"]), np.asarray(params["embedding"]))


@pytest.mark.parametrize("family", SPECS)
def test_a_model_from_scratch_gets_a_config_of_its_own(tmp_path, family):
  spec = SPECS[family]
  params = random_params(spec)
  tokenizer = tmp_path / "tokenizer"
  tokenizer.mkdir()
  (tokenizer / "tokenizer.json").write_text("{}")
  pretrained.save_params(params, spec, tmp_path / "out", source_dir=tokenizer)
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert from_hf(config) == spec and config["torch_dtype"] == "float32"
  assert (tmp_path / "out" / "tokenizer.json").exists()
  again = load(tmp_path / "out", spec)
  for path, leaf in trees.paths(again).items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(trees.paths(params)[path]), err_msg=path)
  # A tokenizer may be one file, or lie beside the weights of another model.
  pretrained.save_params(params, spec, tmp_path / "file", source_dir=tokenizer / "tokenizer.json", hf_config=config)
  assert (tmp_path / "file" / "tokenizer.json").exists()
  other = dataclasses.replace(spec, num_layers=1, windows=spec.windows[-1:])
  write_hf(tokenizer, other, hf_tensors(other, "bfloat16"), dtype="bfloat16")
  pretrained.save_params(params, spec, tmp_path / "beside", source_dir=tokenizer)
  config = json.loads((tmp_path / "beside" / "config.json").read_text())
  assert from_hf(config) == spec and (config["torch_dtype"], config["eos_token_id"]) == ("float32", 2)


def test_only_an_earlier_export_is_replaced(tied, tmp_path):
  directory, spec, _ = tied
  params, out = load(directory, spec), tmp_path / "out"
  out.mkdir()  # an empty one is as good as none
  pretrained.save_params(params, spec, out, source_dir=directory)
  params["final_norm"] = 2 * params["final_norm"]
  pretrained.save_params(params, spec, out, source_dir=directory, max_shard_bytes=2_000)
  np.testing.assert_array_equal(read_hf(out)["model.norm.weight"], np.asarray(params["final_norm"]))
  assert not (out / "model.safetensors").exists()
  (out / "notes.txt").write_text("mine")
  with pytest.raises(ConfigError, match=r"out: not empty, and no export wrote notes.txt"):
    pretrained.save_params(params, spec, out, source_dir=directory)
  (out / "notes.txt").unlink()
  (out / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match=r"out: not empty, and no export wrote config.json as found there"):
    pretrained.save_params(params, spec, out, source_dir=directory)
  with pytest.raises(ConfigError, match=r"base: not empty"):
    pretrained.save_params(params, spec, directory, source_dir=directory)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ConfigError, match=r"a file of that name is there"):
    pretrained.save_params(params, spec, tmp_path / "file", source_dir=directory)
  with pytest.raises(ConfigError, match=r"gone: not there any more"):
    pretrained.save_params(params, spec, tmp_path / "new", source_dir=tmp_path / "gone")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "out"]


def test_a_full_disk_is_known_beforehand(tied, tmp_path, monkeypatch):
  directory, spec, _ = tied
  params = load(directory, spec)
  monkeypatch.setattr(hf_files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
  with pytest.raises(ConfigError, match=r"out: needs 0.00 GB, the disk has 0.00 GB free"):
    pretrained.save_params(params, spec, tmp_path / "out", source_dir=directory)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize("function", ["write_safetensors", "write_file", "copy_file", "_sync_directory"])
def test_an_export_that_fails_leaves_what_was_there(tied, tmp_path, monkeypatch, function, has_old):
  directory, spec, tensors = tied
  (directory / "generation_config.json").write_text("{}")
  params = load(directory, spec)
  if has_old:
    pretrained.save_params(params, spec, tmp_path / "out", source_dir=directory)

  def fail(path, *args):
    if function == "write_safetensors":
      path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(hf_files, function, fail)
  with pytest.raises(OSError, match=r"No space left"):
    pretrained.save_params(jax.tree.map(jnp.zeros_like, params), spec, tmp_path / "out", source_dir=directory)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["base", *(["out"] if has_old else [])]
  if has_old:
    assert_same(read_hf(tmp_path / "out"), tensors)


_EXPORT_SLOWLY = """
import sys, time
import jax, numpy as np
from cpt_jax.model import hf_files, pretrained, transformer
from cpt_jax.model.spec import ModelSpec
spec = ModelSpec(family="llama", vocab_size=24, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20,
                 max_positions=64)
write, stop_in = hf_files.write_safetensors, sys.argv[2]
def slowly(path, entries, chunks):
  def stop():
    for i, chunk in enumerate(chunks):
      if i == 5 and stop_in == "tensors":
        print("now", flush=True)
        time.sleep(60)
      yield chunk
  write(path, entries, stop())
hf_files.write_safetensors = slowly
replace = hf_files.os.replace
def slow_replace(source, target):
  replace(source, target)
  if stop_in == "renames" and str(target).endswith(".old"):
    print("now", flush=True)
    time.sleep(60)
hf_files.os.replace = slow_replace
zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), transformer.abstract_params(spec))
pretrained.save_params(zeros, spec, sys.argv[1])
"""


@pytest.mark.parametrize("stop_in", ["tensors", "renames"])
def test_a_killed_export_leaves_no_half_directory_and_the_next_one_cleans_up(tmp_path, root, stop_in):
  params, out = random_params(LLAMA), tmp_path / "out"
  if stop_in == "renames":
    pretrained.save_params(params, LLAMA, out)
  process = subprocess.Popen(
    [sys.executable, "-c", _EXPORT_SLOWLY, str(out), stop_in], cwd=root, stdout=subprocess.PIPE, text=True, env=os.environ
  )
  with process:
    assert process.stdout.readline() == "now\n"
    if stop_in == "tensors":  # a running export is left alone
      pretrained.save_params(params, LLAMA, out)
      assert len(list(tmp_path.glob(".out.partial-*"))) == 1
      hf_files.shutil.rmtree(out)
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not out.exists() and list(tmp_path.iterdir())
  if stop_in == "renames":  # the export before is not lost, whatever becomes of the next
    with pytest.raises(ConfigError, match=r"model.norm.weight: NaN"):
      pretrained.save_params(params | {"final_norm": params["final_norm"] * np.nan}, LLAMA, out)
    np.testing.assert_array_equal(read_hf(out)["model.embed_tokens.weight"], np.asarray(params["embedding"]))
  pretrained.save_params(params, LLAMA, out)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  np.testing.assert_array_equal(read_hf(out)["model.embed_tokens.weight"], np.asarray(params["embedding"]))


def test_a_terminal_gets_a_progress_bar_and_a_log_gets_silence(tied, tmp_path, monkeypatch, capfd):
  directory, spec, _ = tied
  load(directory, spec)
  assert capfd.readouterr() == ("", "")
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  pretrained.save_params(load(directory, spec), spec, tmp_path / "out", source_dir=directory)
  shown = capfd.readouterr()
  assert shown.out == "" and "reading" in shown.err and "writing" in shown.err
