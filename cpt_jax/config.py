"""Every key of a run, once: its meaning, unit and range -> a checked, plain configuration.

Invariant: nothing else holds defaults; a key that is not here is refused; this module never imports jax.
Files in configs/ return `default()` with changes; main calls `resolve()`.
"""

import ast
import contextlib
import difflib
import itertools
import math
import numbers
import pathlib
import re
import runpy
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from cpt_jax import durations


class ConfigError(ValueError):
  """One or more mistakes that a person can mend; the message is a line for each, with key, value and fix."""

  exit_code = 78  # of a program that ends with it (sysexits.h: configuration)

  def __init__(self, text: str):
    super().__init__(text)
    self.lines = [text]  # one for each mistake


class Problems:
  """Collects what is wrong, so that a user mends everything in one go."""

  def __init__(self):
    self.lines: list[str] = []

  def add(self, text: str) -> None:
    """Notes a line, once."""
    if text not in self.lines:
      self.lines.append(text)

  @contextlib.contextmanager
  def collect(self) -> Iterator[None]:
    """Notes a ConfigError of the block, so that what comes after it is checked too."""
    try:
      yield
    except ConfigError as error:
      for line in error.lines:
        self.add(line)

  def raise_if_any(self) -> None:
    """Raises ConfigError with every collected line."""
    if self.lines:
      count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
      error = ConfigError("\n".join([f"{count} in the configuration:"] + [f"  {line}" for line in self.lines]))
      error.lines = self.lines
      raise error


CURVES = ("linear", "log", "hold")


class Share(tuple):
  """A source's share of the tokens: knots ((when, share, curve), ...).

  `when` is a duration, `curve` the way from the knot before to this one: "linear", which may be left out; "log", straight in
  the logarithm; "hold", the share before up to this time, then a jump. A type of its own so that the command line takes
  both forms: `--config.data.sources.zh.share=0.3` and `--config.data.sources.zh.share='[(0, 0.05), ("20%", 0.3)]'`.
  """

  def __new__(cls, value: Any) -> "Share":
    """From a number, knots, or the text of either."""
    if isinstance(value, str):
      try:
        value = ast.literal_eval(value)
      except (ValueError, SyntaxError):
        raise ValueError(_no_share(value)) from None
    if isinstance(value, numbers.Real):
      return super().__new__(cls, ((0, float(value), "linear"),))
    try:
      return super().__new__(cls, ((when, float(share), *(curve or ["linear"])) for when, share, *curve in value))
    except (TypeError, ValueError):
      raise ValueError(_no_share(value)) from None


def _no_share(value: Any) -> str:
  return f"{value!r} is no share; write 0.3 or [(0, 0.05), ('20%', 0.3)], a knot's third entry is one of {', '.join(CURVES)}"


class _ShareParser(flags.ArgumentParser):
  """What absl calls for a share on the command line, and for its default."""

  def parse(self, argument: Any) -> Share:
    """A Share from either form, or from one."""
    return Share(argument)


config_flags.register_flag_parser_for_type(Share, _ShareParser())


def source(
  *,
  store: str = "",
  text: str = "",
  role: str = "domain",
  share: float | tuple = 1.0,
  at_end: str = "repeat",
  max_epochs: float = 0.0,
  loss_weight: float = 1.0,
  min_tokens: int = 0,
  max_tokens: int = 0,
  length_shares: tuple = (),
  records: str = "text",
  text_field: str = "",
  answer_field: str = "answer",
  train_on: str = "all",
) -> Any:
  """One entry of `data.sources`."""
  return ConfigDict(
    dict(
      # Directory of a token store (tools/prepare_data.py or datatrove). Required.
      store=store,
      # "replay" (text like the base's own: its loss shows forgetting) or "domain" (what is to be learnt).
      role=role,
      # Share of the training tokens: a number, or knots [(0, 0.05), ("20%", 0.3)], linear between them; ("20%", 0.3, "log")
      # rises evenly in the logarithm, ("20%", 0.3, "hold") jumps. Shares are normalised over the sources at every step.
      # 0 = evaluated but never trained on.
      share=Share(share),
      # When all of it was read: "repeat" in another order, "stop" the run, "renormalise" (the others share what is left) or
      # "error" (the run is refused). About 4 repeats are nearly as good as new text (Muennighoff et al. 2305.16264).
      at_end=at_end,
      # When all of it was read: after so many epochs; 0 = after one, and with "repeat" never. "repeat" past this is refused.
      max_epochs=float(max_epochs),
      # Weight of its tokens in the objective, beside their share of the rows; 0 = read and measured, but nothing is learnt.
      loss_weight=float(loss_weight),
      # Training documents shorter or longer than this many tokens are left out; 0 = no limit.
      min_tokens=min_tokens,
      max_tokens=max_tokens,
      # Brackets (from_tokens, share of the source's tokens), e.g. ((0, 0.3), (4096, 0.7)): long documents are read more often
      # until they have their share (per-source length upsampling, Fu et al. 2402.10171). () = every document once an epoch.
      length_shares=tuple(length_shares),
      # Raw text to prepare into `store` when that does not exist yet: path or glob of .txt .jsonl .parquet files
      # (.gz .zst too). Empty: the store must exist. The keys below say how it is read.
      text=text,
      records=records,  # text, messages (conversations, by the tokenizer's chat template), prompt (with an answer)
      text_field=text_field,  # the field of records that holds the text, messages or prompt; empty = named like `records`
      answer_field=answer_field,  # of prompt records
      train_on=train_on,  # all, or answers: the loss leaves out what the model is asked
    ),
    type_safe=False,
  )


def default() -> Any:
  """Every key with its default."""
  c = ConfigDict()
  # Seed of initialisation and shuffles. The same seed gives the same run.
  c.seed = 0

  # What the run starts from. The first that applies: the run's own checkpoint in workdir, `resume`, `hf`, `weights`, scratch.
  c.start = ConfigDict()
  c.start.resume = ""  # another run's directory: parameters, step and (by `optimizer`) moments
  c.start.hf = ""  # a Hugging Face directory: config.json, *.safetensors, tokenizer files
  c.start.weights = ""  # another run's directory: parameters only
  # With `hf`, where its vocabulary was grown: the directory of the run that it was before. What both have keeps its moments; rows
  # of new pieces begin without.
  c.start.moments = ""
  c.start.optimizer = "keep"  # with `resume`: "keep" or "reset" the moments (a reset also restarts the step count)

  c.model = ConfigDict()
  # Start from scratch: a Hugging Face config.json (path of the file) that says the architecture.
  c.model.scratch = ""
  c.model.compute_dtype = "auto"  # auto (bfloat16 on GPU and TPU, float32 on CPU), float32, bfloat16
  # What the forward pass keeps of each layer for the backward pass, which computes the rest again; most memory first. With
  # width D, mlp width F, N and K query and key/value heads of H, c bytes of a number of compute_dtype, a position keeps (bytes)
  #   none            c(4D + (3N+2K)H + 3F) + 4N   all that derivatives read, but not inside norms; casts of parameters again
  #   dots            c(2D + (2N+2K)H + 2F) + 4N   products with parameters and what was attended: norms, rotations, gates again
  #   attention_dots  c(2D + (2N+2K)H) + 4N        those of the attention: the mlp's first two products again, too
  #   attended        c(D + NH) + 4N               what was attended: all products but the mlp's last again, but not attention
  #   full            cD                           the layer's input: the whole layer again
  # and dots_offload, attention_dots_offload, attended_offload, full_offload: the same, but it waits in the host's memory, where a
  # GPU or TPU fetches it from; a CPU has no other memory, and runs them (and says so) as the choice without _offload.
  c.model.remat = "none"
  # auto (the fastest that can run here), plain, blockwise (memory linear in row length; any chip), flash and cudnn (NVIDIA GPUs),
  # splash (TPU). One that cannot run gives way to the next with a warning that says why.
  c.model.attention = "auto"
  # The layers in a loop, which compiles once for any depth; False: each by itself, faster steps on GPUs and a longer start.
  c.model.scan = True
  # Positions of each device, whatever rows they are in, whose logits exist at once; 0 = 256 on CPU, 4096 on GPU and TPU.
  c.model.loss_chunk = 0

  c.data = ConfigDict()
  # Tokenizer directory or file; empty = that of start.hf.
  c.data.tokenizer = ""
  c.data.row_len = 2048  # positions in a row, T
  c.data.packing = (
    "best_fit"  # concat (documents joined and cut), best_fit (cut only what does not fit), pad (one document a row)
  )
  c.data.cross_documents = False  # may a document attend to the one before it in its row
  c.data.split_positions = "restart"  # positions of a document's later pieces: restart (at 0) or continue
  c.data.heldout_frac = 0.01  # share of documents, by hash of their text, kept for evaluation and never trained on
  c.data.prefetch = 16  # rows read ahead, and the number of reader threads
  c.data.sources = ConfigDict(type_safe=False)  # name = config.source(...)
  # Shares of all sources at once, from a time on, e.g. ((0, {"en": 0.9, "zh": 0.1}), ("20%", {"en": 0.3, "zh": 0.7})); whoever
  # is not named has none. () = each source's own `share`.
  c.data.stages = ()
  c.data.on_bad = "skip"  # a record that cannot be read: skip (it is listed in the store's bad_records.jsonl) or fail
  c.data.max_bad = -1  # more bad records than this are an error; -1 = no limit

  c.train = ConfigDict()
  c.train.length = "1000 steps"  # duration: steps or tokens
  c.train.batch_rows = 8  # rows in a step, B, over all devices
  c.train.microbatches = 1  # gradient accumulation: the step's rows in this many parts
  # What the sum over microbatches is kept in: float32, or bfloat16 (2 bytes a parameter less, rounded after each part)
  c.train.accumulate_dtype = "float32"
  # Stages, one after the other: (what is trained, how long, lr_peak), and as a fourth entry other keys of `schedule`, e.g.
  #   (("new_rows", "20%", 2e-3, {"name": "constant"}), ("embeddings", "20%", 1e-3), ("all", "rest", 5e-4))
  # What: new_rows (of the pieces that tools/grow_vocab.py added), embeddings (and the head), all; or path patterns, where :new
  # stands for the rows of new pieces alone, ("embedding:new", "head"). The rest keeps every bit, its moments too. How long: a
  # duration; of the last stage also "rest". Each goes through `schedule` as a run of its length would; lr_start, lr_const and
  # lr_final keep their ratio to lr_peak. () = everything all the time.
  c.train.stages = ()
  c.train.z_loss = 0.0  # weight of the squared log-partition (PaLM 2204.02311 sec. 5 uses 1e-4)

  c.schedule = ConfigDict()
  # constant, linear, cosine, wsd, rewarm (linear up, cosine down), infinite (up, cool down, constant, anneal)
  c.schedule.name = "rewarm"
  c.schedule.lr_peak = 3e-4  # the largest rate
  c.schedule.lr_start = 0.0  # rate before step 0 of the warm-up; the base's last rate re-warms without a dip
  c.schedule.lr_const = 1e-4  # infinite only: the rate of the constant phase
  c.schedule.lr_final = 3e-5  # the last rate
  c.schedule.warmup = "1%"  # duration of the rise
  c.schedule.cooldown = "20%"  # infinite only: duration of the fall to lr_const
  c.schedule.anneal = "20%"  # wsd, infinite: duration of the last fall
  c.schedule.shape = "1-sqrt"  # wsd's fall: linear or 1-sqrt (Haegele et al. 2405.18392)

  c.optimizer = ConfigDict()  # AdamW
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.95
  c.optimizer.eps = 1e-8
  c.optimizer.mu_dtype = "float32"  # what the first moment is kept in: float32, or bfloat16 (2 bytes a parameter less)
  c.optimizer.weight_decay = 0.1
  c.optimizer.clip_norm = 1.0  # global norm of the gradient; 0 = no clipping
  # Path rules (pattern, multiplier), first full match of the leaf's path wins, every leaf must match one.
  c.optimizer.decay_rules = ((r".*norm|layers\.b[qkv]", 0.0), (r".*", 1.0))
  c.optimizer.rate_rules = ((r"embedding|head", 1.0), (r".*", 1.0))
  # Rate multiplier of each layer, lowest first; two numbers = first and last layer, linear between; () = all 1.
  c.optimizer.layer_rates = ()
  c.optimizer.frozen = ()  # path patterns that are not trained (no moments are kept for them)

  c.eval = ConfigDict()
  c.eval.every = "10%"  # duration between evaluations; there is always one before the first step and one at the end
  c.eval.tokens = 100_000  # held-out tokens per source, at most (whole documents)
  c.eval.bytes = 0  # held-out bytes of text per source instead: the same documents whatever the tokenizer; 0 = eval.tokens
  c.eval.batch_rows = 0  # rows of an evaluation batch; 0 = train.batch_rows / train.microbatches

  # What ends or changes a run that goes wrong; the rules stand in docs/guards.md.
  c.guard = ConfigDict()
  # An update whose loss or gradient is not finite is always skipped; so many in a row (1 or more) end the run with exit code 86.
  c.guard.nonfinite_steps = 3
  # Nats per token that the held-out loss of a replay source may rise above the base's, looked at in each evaluation; 0 = any.
  c.guard.general_loss_rise = 0.0
  # When it rose more: stop (saved, exit code 88), hold (the shares stay as they are), rewind (back to the last evaluation that
  # was within; from there the shares move at half the speed).
  c.guard.on_collapse = "stop"
  # A source's training loss is outside its band when it is more than so many median absolute deviations above the median of its
  # last 50 records inside (log.every steps each; from 8 records on); 0 = no band. Try 15.
  c.guard.spike_mads = 0.0
  c.guard.spike_records = 3  # records in a row outside that make a spike
  # At a spike: skip (back to the last good evaluation before it; the rows read since are passed over), or as on_collapse.
  c.guard.on_spike = "skip"
  c.guard.max_rewinds = 2  # how often a run may go back, for either reason; then it stops

  c.checkpoint = ConfigDict()
  c.checkpoint.every = "10%"  # duration between checkpoints; there is always one at the end
  c.checkpoint.keep_last = 2  # newest checkpoints kept
  c.checkpoint.keep_every = ""  # duration: checkpoints at its multiples are kept for good; empty = none
  c.checkpoint.best_metric = ""  # keep the checkpoint with the lowest e.g. "eval/domain/loss"; empty = none
  c.checkpoint.export_hf = True  # write a Hugging Face directory at the end

  c.mesh = ConfigDict()  # devices along each axis; -1 (one axis at most) = the rest
  c.mesh.data = -1  # replicas
  c.mesh.fsdp = 1  # parameters, gradients and moments sharded
  c.mesh.context = 1  # positions of a row sharded
  c.mesh.tensor = 1  # heads, mlp width and vocabulary sharded

  c.log = ConfigDict()
  c.log.every = 10  # steps between lines of metrics.jsonl
  c.log.tensorboard = False  # also write TensorBoard events (extra [tensorboard])

  # What tools/plan.py writes into the config that it recommends; no run depends on it.
  c.plan = ConfigDict()
  c.plan.losses = ()  # predicted final losses, ((source, nats per token, low, high), ...): shown beside the measured ones
  c.plan.made_by = ""  # the plan that they come from

  c.debug = ConfigDict()
  c.debug.stop_after = 0  # end after this step without touching the schedules; 0 = off
  c.debug.no_jit = False  # run the step op by op
  c.lock()  # a misspelt key in a config file is refused
  c.data.sources.unlock()  # but sources are the user's to name
  return c


CHOICES = {
  "start.optimizer": ("keep", "reset"),
  "model.compute_dtype": ("auto", "float32", "bfloat16"),
  "model.remat": ("none", "dots", "attention_dots", "attended", "full")
  + ("dots_offload", "attention_dots_offload", "attended_offload", "full_offload"),
  "model.attention": ("auto", "plain", "blockwise", "flash", "cudnn", "splash"),
  "data.packing": ("concat", "best_fit", "pad"),
  "data.split_positions": ("restart", "continue"),
  "data.on_bad": ("skip", "fail"),
  "train.accumulate_dtype": ("float32", "bfloat16"),
  "optimizer.mu_dtype": ("float32", "bfloat16"),
  "guard.on_collapse": ("stop", "hold", "rewind"),
  "guard.on_spike": ("skip", "stop", "hold", "rewind"),
  "schedule.name": ("constant", "linear", "cosine", "wsd", "rewarm", "infinite"),
  "schedule.shape": ("linear", "1-sqrt"),
}
NEW_ROWS = ":new"  # behind a path pattern in a stage: of the leaves that it matches, the rows of new pieces
STAGES = {"new_rows": (f"embedding{NEW_ROWS}", f"head{NEW_ROWS}"), "embeddings": ("embedding", "head"), "all": (".*",)}
_SOURCE_CHOICES = {
  "role": ("replay", "domain"),
  "at_end": ("repeat", "stop", "renormalise", "error"),
  "records": ("text", "messages", "prompt"),
  "train_on": ("all", "answers"),
}
_SOURCE_AT_LEAST = {"max_epochs": 0.0, "loss_weight": 0.0, "min_tokens": 0, "max_tokens": 0}
_AT_LEAST = {
  "model.loss_chunk": 0,
  "data.row_len": 2,
  "data.prefetch": 1,
  "data.max_bad": -1,
  "train.batch_rows": 1,
  "train.microbatches": 1,
  "train.z_loss": 0.0,
  "schedule.lr_start": 0.0,
  "schedule.lr_final": 0.0,
  "schedule.lr_const": 0.0,
  "optimizer.weight_decay": 0.0,
  "optimizer.clip_norm": 0.0,
  "eval.tokens": 1,
  "eval.bytes": 0,
  "eval.batch_rows": 0,
  "guard.nonfinite_steps": 1,
  "guard.general_loss_rise": 0.0,
  "guard.spike_mads": 0.0,
  "guard.spike_records": 1,
  "guard.max_rewinds": 0,
  "checkpoint.keep_last": 1,
  "log.every": 1,
  "debug.stop_after": 0,
}
_DURATIONS = {  # key -> may it be a share of the run
  "train.length": False,
  "schedule.warmup": True,
  "schedule.cooldown": True,
  "schedule.anneal": True,
  "eval.every": True,
  "checkpoint.every": True,
}


def check_overrides(argv: list[str]) -> None:
  """Looks at `--config=FILE --config.key=value ...` before the flags are parsed.

  Raises:
    ConfigError: the file cannot be read or run, or keys do not exist: all of them, with what was probably meant.
  """
  overrides = [m.group(1) for arg in argv if (m := re.match(r"--?(?:no)?config\.([\w.]+)", arg))]
  files = [m.group(1) for arg in argv if (m := re.match(r"--?config=([^:]*)", arg))]
  files += [after for arg, after in itertools.pairwise(argv) if arg in ("--config", "-config")]
  if not files:
    return
  known = leaf_keys(load_file(files[-1]))
  problems = Problems()
  for key in overrides:
    if key not in known:
      problems.add(unknown_key(key, known))
  problems.raise_if_any()


def load_file(path: str) -> ConfigDict:
  """Runs a config file; its mistakes become ConfigErrors that name the line."""
  if not pathlib.Path(path).is_file():
    here = sorted(str(p) for p in pathlib.Path(path).parent.glob("*.py"))
    raise ConfigError(
      f"--config={path}: no such file.{did_you_mean(path, here)}" + (f" There are {', '.join(here)}." if here else "")
    )
  try:
    config = runpy.run_path(path)["get_config"]()
  except KeyError as error:
    if error.args == ("get_config",):
      raise ConfigError(
        f"{path}: a config file defines get_config(), which returns cpt_jax.config.default() with changes"
      ) from None
    raise _at_line(path, error) from error
  except (AttributeError, TypeError, ValueError, NameError, SyntaxError, ImportError) as error:
    raise _at_line(path, error) from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(f"{path}: get_config() returned {type(config).__name__}; return the ConfigDict of cpt_jax.config.default()")
  return config


def _at_line(path: str, error: Exception) -> ConfigError:
  """What went wrong in a config file, with its line; ConfigDict's own list of all fields is cut off."""
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
  match = re.search(r'Key "(\w+)" does not exist', str(error))
  text = f"{match.group(1)}: there is no such key here.{_meant(match.group(1))}" if match else f"{type(error).__name__}: {error}"
  return ConfigError(f"{path}:{lines[-1] if lines else '?'}: {text}")


def _meant(name: str) -> str:
  last = {key.rsplit(".", 1)[-1]: key for key in leaf_keys(default())}
  close = difflib.get_close_matches(name, last, n=1)
  return f" Did you mean {last[close[0]]}?" if close else ""


def get(config: Any, key: str) -> Any:
  """The value of a dotted key."""
  for part in key.split("."):
    config = config[part]
  return config


def leaf_keys(config: Any) -> list[str]:
  """Dotted names of all leaves."""
  keys = []
  for name in config:
    value = config[name]
    keys += [f"{name}.{k}" for k in leaf_keys(value)] if isinstance(value, ConfigDict) else [name]
  return keys


def resolve(config: Any, *, needs_data: bool = True) -> ConfigDict:
  """Checks every key that needs no file and no device; returns a locked copy. Without `needs_data` there need be no sources.

  Raises:
    ConfigError: with a line for each problem.
  """
  problems = Problems()
  config = config.copy_and_resolve_references()
  config.unlock()
  _check_keys(config, problems)
  problems.raise_if_any()  # the checks below read keys
  _check_values(config, problems)
  if needs_data or config.data.sources:
    _check_sources(config, problems)
  _check_predictions(config, problems)
  problems.raise_if_any()
  config.lock()
  return config


def tokens_per_step(config: Any) -> int:
  """Positions that a step trains on, padding counted."""
  return config.train.batch_rows * config.data.row_len


def num_steps(config: Any) -> int:
  """Length of the run in steps."""
  return durations.whole_steps(config.train.length, tokens_per_step=tokens_per_step(config))


def steps_of(config: Any, key: str) -> int:
  """Steps of the duration at a dotted key."""
  return durations.whole_steps(get(config, key), tokens_per_step=tokens_per_step(config), run_steps=num_steps(config))


def steps_at(config: Any, when: str | int | float) -> float:
  """A time of the run in steps, not rounded."""
  return durations.parse(when).steps(tokens_per_step=max(tokens_per_step(config), 1), run_steps=num_steps(config))


class Stage(NamedTuple):
  """One of train.stages, or the whole run where there are none."""

  trains: Any  # a name of STAGES, or path patterns
  first: int  # its first step
  end: int  # the first step behind it
  schedule: dict[str, Any]  # keys of `schedule` that are its own

  def describe(self) -> str:
    """What it trains, for people."""
    return self.trains if isinstance(self.trains, str) else ", ".join(self.trains)


def stages(config: Any) -> list[Stage]:
  """The stages of a resolved config, at least one."""
  if not config.train.stages:
    return [Stage("all", 0, num_steps(config), {})]
  return _parse_stages(config)


def of_stage(config: Any, stage: Stage) -> Any:
  """The config of a run that would be that stage: its length and its schedule."""
  c = config.copy_and_resolve_references()
  with c.unlocked():
    c.train.length, c.train.stages = f"{stage.end - stage.first} steps", ()
    times = stage.schedule.get("lr_peak", c.schedule.lr_peak) / c.schedule.lr_peak
    for key in ("lr_start", "lr_const", "lr_final"):
      c.schedule[key] *= times
    c.schedule.update(stage.schedule)
  return c


def _parse_stages(config: Any) -> list[Stage]:
  """Raises ValueError for a length that is none."""
  found, end, run_steps = [], 0.0, num_steps(config)
  for i, (what, length, lr_peak, *more) in enumerate(config.train.stages):
    is_rest = length == "rest" and i == len(config.train.stages) - 1
    first, end = end, float(run_steps) if is_rest else end + steps_at(config, length)
    # Rounded as borders, not as lengths: three thirds are a whole.
    found.append(Stage(what, round(first), round(end), {"lr_peak": lr_peak, **(dict(more[0]) if more else {})}))
  return found


def did_you_mean(name: str, known: list[str]) -> str:
  """' Did you mean x?' or ''."""
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  return f" Did you mean {close[0]}?" if close else ""


def completed(record: dict[str, Any]) -> ConfigDict:
  """A config that a run of this version or an older one recorded, with the defaults of keys that were not there."""

  def fill(values: dict[str, Any], defaults: Any) -> dict[str, Any]:
    known = {name: fill(values.get(name, {}), value) for name, value in defaults.items() if isinstance(value, ConfigDict)}
    return {name: value for name, value in defaults.items() if name not in known} | values | known

  return ConfigDict(fill(record, default()))


def unknown_key(key: str, known: list[str]) -> str:
  """The line for a key that does not exist."""
  return f"{key}: there is no such key.{did_you_mean(key, known)} cpt_jax/config.py lists them all."


def _check_keys(config: Any, problems: Problems) -> None:
  expected = default()
  known = leaf_keys(expected)
  found = [k for k in leaf_keys(config) if not k.startswith("data.sources.")]
  for key in found:
    if key not in known and key != "data.sources":
      problems.add(unknown_key(key, known))
  for key in known:
    if key not in found:
      problems.add(f"{key}: missing; start the config file from cpt_jax.config.default()")
    elif not _same_type(get(config, key), get(expected, key)):
      wanted, value = get(expected, key), get(config, key)
      problems.add(f"{key}={value!r}: expected {type(wanted).__name__}, e.g. {wanted!r}; found {type(value).__name__}")
  if not isinstance(config.get("data", {}).get("sources"), ConfigDict):
    problems.add("data.sources: expected entries name = config.source(store=..., role=..., share=...)")
    return
  fields = list(source())
  for name, entry in config.data.sources.items():
    if not isinstance(entry, ConfigDict):
      problems.add(f"data.sources.{name}={entry!r}: expected config.source(store=..., role=..., share=...)")
      continue
    for field in entry:
      if field not in fields:
        problems.add(unknown_key(f"data.sources.{name}.{field}", [f"data.sources.{name}.{f}" for f in fields]))
    for field, value in source().items():
      if field not in entry:
        problems.add(f"data.sources.{name}.{field}: missing; make the entry with config.source(...)")
      elif field != "share" and not _same_type(entry[field], value):
        problems.add(
          f"data.sources.{name}.{field}={entry[field]!r}: expected {type(value).__name__}, found {type(entry[field]).__name__}"
        )


def _same_type(value: Any, wanted: Any) -> bool:
  if isinstance(wanted, bool) or isinstance(value, bool):
    return isinstance(value, bool) and isinstance(wanted, bool)
  if isinstance(wanted, float):
    return isinstance(value, numbers.Real)
  return isinstance(value, (list, tuple)) if isinstance(wanted, tuple) else isinstance(value, type(wanted))


def _check_values(config: Any, problems: Problems) -> None:
  _check_choices(config, problems)
  _check_rates(config, problems)
  for key in ("optimizer.b1", "optimizer.b2"):
    if not 0 <= get(config, key) < 1:
      problems.add(f"{key}={get(config, key)}: must be at least 0 and below 1")
  if config.optimizer.eps <= 0:
    problems.add(f"optimizer.eps={config.optimizer.eps}: must be above 0, e.g. 1e-8")
  if not 0 < config.data.heldout_frac < 1:
    problems.add(
      f"data.heldout_frac={config.data.heldout_frac}: must lie between 0 and 1, e.g. 0.01; forgetting is measured on it"
    )
  _check_durations(config, problems)
  if not any(line.startswith(("train.length", "schedule.lr_peak")) for line in problems.lines):
    _check_train_stages(config, problems)
  if config.train.batch_rows % max(config.train.microbatches, 1):
    problems.add(
      f"train.microbatches={config.train.microbatches} does not divide train.batch_rows={config.train.batch_rows}; "
      f"use {_divisors(config.train.batch_rows)}"
    )
  starts = [k for k in ("start.resume", "start.hf", "start.weights") if get(config, k)]
  if not starts and not config.model.scratch:
    problems.add(
      "start.hf is empty: name a Hugging Face directory to continue, or model.scratch=config.json to train from scratch"
    )
  if len(starts) > 1:
    problems.add(f"{' and '.join(starts)} are all set: a run starts from one of them; empty the others")
  for axis, devices in config.mesh.items():
    if devices == 0 or devices < -1:
      problems.add(f"mesh.{axis}={devices}: a number of devices from 1 up, or -1 for the rest")
  if list(config.mesh.values()).count(-1) > 1:
    problems.add(f"mesh={dict(config.mesh)}: one axis at most may be -1 (the rest)")


def _check_choices(config: Any, problems: Problems, *, only: str = "") -> None:
  """Of the keys that begin with `only`."""
  for key, choices in CHOICES.items():
    value = get(config, key)
    if key.startswith(only) and value not in choices:
      problems.add(f"{key}={value!r}: choose one of {', '.join(choices)}.{did_you_mean(str(value), list(choices))}")
  for key, low in _AT_LEAST.items():
    value = get(config, key)
    if key.startswith(only) and not (math.isfinite(value) and value >= low):
      problems.add(f"{key}={value}: must be at least {low}")


def _check_rates(config: Any, problems: Problems) -> None:
  if not (math.isfinite(config.schedule.lr_peak) and config.schedule.lr_peak > 0):
    problems.add(f"schedule.lr_peak={config.schedule.lr_peak}: must be above 0, e.g. 3e-4")
  for key in ("schedule.lr_start", "schedule.lr_const", "schedule.lr_final"):
    used = key != "schedule.lr_const" or config.schedule.name == "infinite"
    if used and get(config, key) > config.schedule.lr_peak:
      problems.add(f"{key}={get(config, key):g}: above schedule.lr_peak={config.schedule.lr_peak:g}; lower it or raise the peak")


def _check_train_stages(config: Any, problems: Problems) -> None:
  """Their form, lengths that make up the run, and the schedule of each."""
  num_before = len(problems.lines)
  for i, entry in enumerate(config.train.stages):
    _check_stage(f"train.stages[{i}]", entry, problems)
  if len(problems.lines) > num_before or not config.train.stages:
    return
  try:
    found = _parse_stages(config)
  except ValueError as error:
    problems.add(f"train.stages: {error}; the last stage may be as long as the 'rest'")
    return
  for i, stage in enumerate(found):
    own = Problems()
    if stage.end <= stage.first:
      own.add(
        f"from step {stage.first} to {stage.end}: there is no step in it; make it or the run longer, or the stages before shorter"
      )
    else:
      as_run = of_stage(config, stage)
      _check_choices(as_run, own, only="schedule.")
      _check_rates(as_run, own)
      _check_durations(as_run, own)
    for line in own.lines:
      problems.add(f"train.stages[{i}]: {line}")
  if found[-1].end != num_steps(config):
    problems.add(
      f"train.stages take {found[-1].end} steps, the run has {num_steps(config)}; the last stage may be as long as the 'rest'"
    )


def _check_stage(key: str, entry: Any, problems: Problems) -> None:
  is_stage = isinstance(entry, (list, tuple)) and len(entry) in (3, 4) and isinstance(entry[2], numbers.Real)
  if not (is_stage and isinstance(entry[-1], (dict, ConfigDict) if len(entry) == 4 else numbers.Real)):
    problems.add(
      f"{key}: {entry!r} is no stage; write (what is trained, how long, lr_peak), e.g. ('new_rows', '20%', 1e-3), and as a "
      "fourth entry other keys of the schedule, {'name': 'constant'}"
    )
    return
  what, _, lr_peak, *more = entry
  if isinstance(what, str) and what not in STAGES:
    problems.add(
      f"{key}: {what!r}: choose one of {', '.join(STAGES)}, or give path patterns, ({what!r},).{did_you_mean(what, list(STAGES))}"
    )
  elif not (isinstance(what, (str, list, tuple)) and what and all(isinstance(pattern, str) for pattern in what)):
    problems.add(
      f"{key}: {what!r} names nothing to train; give one of {', '.join(STAGES)}, or path patterns, ('embedding:new', 'head')"
    )
  if not (math.isfinite(lr_peak) and lr_peak > 0):
    problems.add(f"{key}: lr_peak={lr_peak}: must be above 0, e.g. 3e-4")
  own = default().schedule
  for name, value in (more[0] if more else {}).items():
    if name == "lr_peak":
      problems.add(f"{key}: lr_peak stands twice; it is the third entry")
    elif name not in own:
      problems.add(f"{key}: schedule has no key {name}.{did_you_mean(name, list(own))}")
    elif not _same_type(value, own[name]):
      problems.add(f"{key}: {name}={value!r}: expected {type(own[name]).__name__}, found {type(value).__name__}")


def _check_durations(config: Any, problems: Problems) -> None:
  for key, may_be_share in (_DURATIONS | ({"checkpoint.keep_every": True} if config.checkpoint.keep_every else {})).items():
    try:
      duration = durations.parse(get(config, key))
      if duration.unit == "%" and not may_be_share:
        problems.add(f"{key}={get(config, key)!r}: the run's own length is in steps or tokens, e.g. '1000 steps' or '2B tokens'")
      if duration.amount <= 0 and key in ("train.length", "eval.every", "checkpoint.every", "checkpoint.keep_every"):
        problems.add(f"{key}={get(config, key)!r}: must be above 0")
    except ValueError as error:
      problems.add(f"{key}: {error}")


def _check_sources(config: Any, problems: Problems) -> None:
  if not config.data.sources:
    problems.add("data.sources is empty: name at least one source, data.sources.domain = config.source(store=...)")
    return
  largest = _check_stages(config, problems)
  for name, entry in config.data.sources.items():
    key = f"data.sources.{name}"
    if not name.isidentifier():
      problems.add(f"{key}: a source's name is letters, digits and underscores, as in a Python name")
    for field, choices in _SOURCE_CHOICES.items():
      if entry[field] not in choices:
        problems.add(f"{key}.{field}={entry[field]!r}: choose {' or '.join(choices)}.{did_you_mean(entry[field], list(choices))}")
    for field, low in _SOURCE_AT_LEAST.items():
      if not (math.isfinite(entry[field]) and entry[field] >= low):
        problems.add(f"{key}.{field}={entry[field]}: must be {low:g} or above")
    if not entry.store:
      problems.add(f"{key}.store is empty: make one with tools/prepare_data.py --input ... --tokenizer ... --output STORE")
    if entry.records == "text" and entry.train_on == "answers":
      problems.add(f"{key}.train_on='answers': plain texts have no answers; set records to messages or prompt")
    _check_length_shares(f"{key}.length_shares", entry.length_shares, problems)
    try:
      entry.share = Share(entry.share)
    except ValueError as error:
      problems.add(f"{key}.share: {error}")
      continue
    if config.data.stages and entry.share != Share(1.0):
      problems.add(f"{key}.share={tuple(entry.share)}: data.stages gives the shares of this run; leave one of the two out")
    largest = max(largest, _check_knots(config, f"{key}.share", entry.share, problems))
  metrics = [f"eval/{name}/loss" for name in config.data.sources]
  if config.checkpoint.best_metric and config.checkpoint.best_metric not in metrics:
    problems.add(f"checkpoint.best_metric={config.checkpoint.best_metric!r}: choose one of {', '.join(metrics)}")
  if largest == 0 and not problems.lines:
    problems.add("every source's share is 0: nothing would be trained on; give at least one a share above 0")
  _check_guard(config, problems)
  weights = [entry.loss_weight for entry in config.data.sources.values()]
  if max(weights) == 0 and not problems.lines:
    problems.add("every source's loss_weight is 0: nothing would be learnt; give at least one a weight above 0")


def _check_predictions(config: Any, problems: Problems) -> None:
  for entry in config.plan.losses:
    is_entry = isinstance(entry, (list, tuple)) and len(entry) == 4 and isinstance(entry[0], str)
    if not (is_entry and all(isinstance(x, numbers.Real) and math.isfinite(x) for x in entry[1:])):
      problems.add(f"plan.losses: {entry!r} is no prediction; write (source, loss, low, high), e.g. ('law', 2.91, 2.88, 2.95)")
    elif entry[0] not in config.data.sources:
      problems.add(f"plan.losses: there is no source {entry[0]}.{did_you_mean(entry[0], list(config.data.sources))}")


def _check_stages(config: Any, problems: Problems) -> float:
  """Checks data.stages; returns the largest share."""
  largest = 0.0
  for stage in config.data.stages:
    if not (isinstance(stage, (list, tuple)) and len(stage) == 2 and isinstance(stage[1], (dict, ConfigDict))):
      problems.add(
        f"data.stages: {stage!r} is no stage; write (when, {{name: share, ...}}), e.g. ('20%', {{'en': 0.3, 'zh': 0.7}})"
      )
      return largest
  for when, shares in config.data.stages:
    for name, share in shares.items():
      if name not in config.data.sources:
        problems.add(f"data.stages at {when!r}: there is no source {name}.{did_you_mean(name, list(config.data.sources))}")
      if not (isinstance(share, (int, float)) and math.isfinite(share) and share >= 0):
        problems.add(f"data.stages at {when!r}: {name}={share!r}; shares are numbers, finite and not negative")
  if config.data.stages and not problems.lines:
    knots = [(when, max(shares.values(), default=0.0), "hold") for when, shares in config.data.stages]
    largest = _check_knots(config, "data.stages", knots, problems)
    if durations.parse(knots[0][0]).amount != 0:
      problems.add(f"data.stages begin at {knots[0][0]!r}; the first stage begins at 0")
  return largest


def _check_guard(config: Any, problems: Problems) -> None:
  """Checks that what a guard watches is in this run."""
  sources = config.data.sources.values()
  if config.guard.general_loss_rise > 0 and not any(entry.role == "replay" for entry in sources):
    problems.add(
      f"guard.general_loss_rise={config.guard.general_loss_rise:g}: no source has role 'replay', whose loss it could watch; give "
      "general text that role (share=0.0 only evaluates it), or set it to 0"
    )


def _check_knots(config: Any, key: str, knots: Any, problems: Problems) -> float:
  """Checks times, shares and curves; returns the largest share."""
  steps, largest = [], 0.0
  for i, (when, share, *curve) in enumerate(knots):
    if not (math.isfinite(share) and share >= 0):
      problems.add(f"{key}={share}: shares are finite and not negative (they are normalised over the sources)")
      continue
    largest = max(largest, share)
    if len(curve) != 1 or curve[0] not in CURVES:
      problems.add(f"{key}: the knot at {when!r} has {tuple(curve)} behind its share; write one of {', '.join(CURVES)}")
    elif curve[0] == "log" and (i == 0 or not min(share, knots[i - 1][1]) > 0):
      problems.add(f"{key}: the log curve to the knot at {when!r} runs between two shares above 0, e.g. from 0.001")
    if any(line.startswith("train.length") for line in problems.lines):
      continue  # a knot's time cannot be placed in a run of unknown length
    try:
      steps.append(steps_at(config, when))
    except ValueError as error:
      problems.add(f"{key}: {error}")
  if steps != sorted(steps) or any(steps.count(step) > 2 for step in steps):
    problems.add(f"{key}={tuple(knots)}: the knots' times must rise (twice the same time is a jump)")
  return largest


def _check_length_shares(key: str, brackets: Any, problems: Problems) -> None:
  """Their form; data.selection looks at the numbers."""
  if not all(isinstance(b, (list, tuple)) and len(b) == 2 and all(isinstance(x, numbers.Real) for x in b) for b in brackets):
    problems.add(f"{key}={brackets!r}: write brackets (from_tokens, share), e.g. ((0, 0.3), (4096, 0.7))")


def _divisors(n: int) -> str:
  return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
