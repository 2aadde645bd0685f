"""The table of every key of a run, once: default, meaning, unit, range, choices, and what a change of it alters.

Invariant: nothing else holds a default or a limit; default(), source(), the checks, the help and the reference follow from here.
"""

import dataclasses
import inspect
import numbers
from typing import Any

from ml_collections import ConfigDict

from cpt_jax.config.errors import did_you_mean
from cpt_jax.config.shares import Share


@dataclasses.dataclass(frozen=True)
class Key:
  """A key of the config, or a field of config.source()."""

  name: str
  default: Any
  text: str  # what it means, for people
  _: dataclasses.KW_ONLY
  unit: str = ""
  choices: tuple[str, ...] = ()
  at_least: float | None = None
  above: float | None = None
  at_most: float | None = None
  below: float | None = None
  reason: str = ""  # of the limits, where they do not speak for themselves
  # Is it a duration: "length" (steps or tokens), "share" (or a share of the run, too), "optional" (or empty); "" = no.
  duration: str = ""
  # What another value alters, which says where it may change. "rows": which rows are read, so that another run's texts are read
  # from the beginning. "run": every update, so that it is another run. "ahead": what lies ahead, when a run goes on; the past
  # stays. "nothing": no row, no update and nothing of the last evaluation, so that two trials with other values are the same.
  alters: str = "run"

  def range(self) -> str:
    """Its limits in words, empty where there are none."""
    limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
    return " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)

  def has_type(self, value: Any) -> bool:
    """Is a value of the default's type; a whole number is good for any number, a list for a tuple."""
    if isinstance(self.default, bool) or isinstance(value, bool):
      return isinstance(value, bool) and isinstance(self.default, bool)
    if isinstance(self.default, float):
      return isinstance(value, numbers.Real)
    return isinstance(value, (list, tuple) if isinstance(self.default, tuple) else type(self.default))

  def allows(self, value: float) -> bool:
    """Is a number within the limits; one that is not finite is not."""
    return (
      abs(value) < float("inf")
      and (self.at_least is None or value >= self.at_least)
      and (self.above is None or value > self.above)
      and (self.at_most is None or value <= self.at_most)
      and (self.below is None or value < self.below)
    )


_FORMS = ("float32", "bfloat16")
_REMAT = ("none", "dots", "attention_dots", "attended", "full")
_REMAT += ("dots_offload", "attention_dots_offload", "attended_offload", "full_offload")

SECTIONS = {  # what stands above a group of keys
  "start": "What the run starts from. The first that applies: the run's own checkpoint in workdir, resume, hf, weights, scratch.",
  "optimizer": "AdamW.",
  "guard": "What ends or changes a run that goes wrong; the rules stand in docs/guide/guards.md.",
  "mesh": "Devices along each axis; -1 (one axis at most) = the rest.",
  "plan": "What cpt plan writes into the config that it recommends; no run depends on it.",
}

# fmt: off
_KEYS = [
  Key("seed", 0, "Seed of initialisation and shuffles. The same seed gives the same run.", alters="rows"),
  Key("start.resume", "", "another run's directory: parameters, step and (by `optimizer`) moments"),
  Key("start.hf", "", "a Hugging Face directory: config.json, *.safetensors, tokenizer files"),
  Key("start.weights", "", "another run's directory: parameters only"),
  Key("start.moments", "", text=
    "With `hf`, where its vocabulary was grown: the directory of the run that it was before. What both have keeps its "
    "moments; rows of new pieces begin without."),
  Key("start.optimizer", "keep", choices=("keep", "reset"), text=
    "with `resume`: keep or reset the moments (a reset also restarts the step count)"),
  Key("model.scratch", "", "Start from scratch: a Hugging Face config.json (path of the file) that says the architecture."),
  Key("model.compute_dtype", "auto", choices=("auto", *_FORMS), text=
    "auto (bfloat16 on GPU and TPU, float32 on CPU), float32, bfloat16"),
  Key("model.remat", "none", choices=_REMAT, alters="nothing", text=
    "What the forward pass keeps of each layer for the backward pass, which computes the rest again; most memory first. "
    "With width D, mlp width F, N and K query and key/value heads of H, c bytes a number of compute_dtype, a position keeps"
    " (bytes)\n"
    "  none            c(4D + (3N+2K)H + 3F) + 4N   all that derivatives read, but not inside norms; casts of parameters again\n"
    "  dots            c(2D + (2N+2K)H + 2F) + 4N   products with parameters, what was attended: norms, rotations, gates\n"
    "  attention_dots  c(2D + (2N+2K)H) + 4N        those of the attention: the mlp's first two products again, too\n"
    "  attended        c(D + NH) + 4N               what was attended: all products but the mlp's last again, but not attention\n"
    "  full            cD                           the layer's input: the whole layer again\n"
    "and dots_offload, attention_dots_offload, attended_offload, full_offload: the same, but it waits in the host's memory,"
    " where a GPU or TPU fetches it from; a CPU has no other memory, and runs them (and says so) as the choice without "
    "_offload."),
  Key("model.attention", "auto", choices=("auto", "plain", "blockwise", "flash", "cudnn", "splash"), alters="nothing", text=
    "auto (the fastest that can run here), plain, blockwise (memory linear in row length; any chip), flash and cudnn "
    "(NVIDIA GPUs), splash (TPU). One that cannot run gives way to the next with a warning that says why."),
  Key("model.scan", True, text=
    "The layers in a loop, which compiles once for any depth; False: each by itself, faster steps on GPUs and a longer "
    "start."),
  Key("model.loss_chunk", 0, unit="positions", at_least=0, alters="nothing", text=
    "Positions of each device, whatever rows they are in, whose logits exist at once; 0 = 256 on CPU, 4096 on GPU and TPU."),
  Key("data.tokenizer", "", "Tokenizer directory or file; empty = that of start.hf."),
  Key("data.row_len", 2048, "positions in a row, T", unit="positions", at_least=2, alters="rows"),
  Key("data.packing", "best_fit", choices=("concat", "best_fit", "pad"), alters="rows", text=
    "concat (documents joined and cut), best_fit (cut only what does not fit), pad (one document a row)"),
  Key("data.cross_documents", False, "may a document attend to the one before it in its row", alters="rows"),
  Key("data.split_positions", "restart", choices=("restart", "continue"), alters="rows", text=
    "positions of a document's later pieces: restart (at 0) or continue"),
  Key("data.heldout_frac", 0.01, above=0.0, below=1.0, reason="forgetting is measured on it; e.g. 0.01", text=
    "share of documents, by hash of their text, kept for evaluation and never trained on"),
  Key("data.prefetch", 16, "rows read ahead, and the number of reader threads", unit="rows", at_least=1, alters="nothing"),
  Key("data.shares", (), alters="ahead", text=
    'Shares of all sources at once, from a time on, e.g. ((0, {"en": 0.9, "zh": 0.1}), ("20%", {"en": 0.3, "zh": 0.7})); '
    "whoever is not named has none. () = each source's own `share`."),
  Key("data.on_bad", "skip", choices=("skip", "fail"), alters="nothing", text=
    "a record that cannot be read: skip (it is listed in the store's bad_records.jsonl) or fail"),
  Key("data.max_bad", -1, unit="records", at_least=-1, alters="nothing", text=
    "more bad records than this are an error; -1 = no limit"),
  Key("train.length", "1000 steps", "how long the run is", above=0, duration="length", alters="ahead"),
  Key("train.batch_rows", 8, "rows in a step, B, over all devices", unit="rows", at_least=1, alters="rows"),
  Key("train.microbatches", 1, "gradient accumulation: the step's rows in this many parts", at_least=1),
  Key("train.accumulate_dtype", "float32", choices=_FORMS, text=
    "what the sum over microbatches is kept in: float32, or bfloat16 (2 bytes a parameter less, rounded after each part)"),
  Key("train.stages", (), text=
    "Stages, one after the other: (what is trained, how long, lr_peak), and as a fourth entry other keys of `schedule`, "
    "e.g.\n"
    '  (("new_rows", "20%", 2e-3, {"name": "constant"}), ("embeddings", "20%", 1e-3), ("all", "rest", 5e-4))\n'
    "What: new_rows (of the pieces that cpt vocab grow added), embeddings (and the head), all; or path patterns, where :new"
    ' stands for the rows of new pieces alone, ("embedding:new", "head"). The rest keeps every bit, its moments too. How '
    'long: a duration; of the last stage also "rest". Each goes through `schedule` as a run of its length would; lr_start, '
    "lr_const and lr_final keep their ratio to lr_peak. () = everything all the time."),
  Key("train.z_loss", 0.0, "weight of the squared log-partition (PaLM 2204.02311 sec. 5 uses 1e-4)", at_least=0.0),
  Key("schedule.name", "rewarm", choices=("constant", "linear", "cosine", "wsd", "rewarm", "infinite"), text=
    "constant, linear, cosine, wsd, rewarm (linear up, cosine down), infinite (up, cool down, constant, anneal)"),
  Key("schedule.lr_peak", 3e-4, "the largest rate", above=0.0, at_most=10.0, reason=
    "AdamW moves each weight by about the rate, and weights are well below 1; e.g. 3e-4"),
  Key("schedule.lr_start", 0.0, "rate before step 0 of the warm-up; the base's last rate re-warms without a dip", at_least=0.0),
  Key("schedule.lr_const", 1e-4, "infinite only: the rate of the constant phase", at_least=0.0),
  Key("schedule.lr_final", 3e-5, "the last rate", at_least=0.0),
  Key("schedule.warmup", "1%", "length of the rise", duration="share"),
  Key("schedule.cooldown", "20%", "infinite only: length of the fall to lr_const", duration="share"),
  Key("schedule.anneal", "20%", "wsd, infinite: length of the last fall", duration="share"),
  Key("schedule.shape", "1-sqrt", "wsd's fall: linear or 1-sqrt (Haegele et al. 2405.18392)", choices=("linear", "1-sqrt")),
  Key("optimizer.b1", 0.9, "decay of the first moment", at_least=0.0, below=1.0),
  Key("optimizer.b2", 0.95, "decay of the second moment", at_least=0.0, below=1.0),
  Key("optimizer.eps", 1e-8, "added to the root of the second moment", above=0.0, reason="e.g. 1e-8"),
  Key("optimizer.mu_dtype", "float32", choices=_FORMS, text=
    "what the first moment is kept in: float32, or bfloat16 (2 bytes a parameter less)"),
  Key("optimizer.weight_decay", 0.1, "decoupled from the gradient, times the rate", at_least=0.0),
  Key("optimizer.clip_norm", 1.0, "global norm of the gradient; 0 = no clipping", at_least=0.0),
  Key("optimizer.decay_rules", ((r".*norm|layers\.b[qkv]", 0.0), (r".*", 1.0)), text=
    "Path rules (pattern, multiplier of weight_decay), first full match of the leaf's path wins, every leaf must match one."),
  Key("optimizer.rate_rules", ((r"embedding|head", 1.0), (r".*", 1.0)), text=
    "Path rules (pattern, multiplier of the rate), as decay_rules."),
  Key("optimizer.layer_rates", (), text=
    "Rate multiplier of each layer, lowest first; two numbers = first and last layer, linear between; () = all 1."),
  Key("optimizer.frozen", (), "path patterns that are not trained (no moments are kept for them)"),
  Key("eval.every", "10%", above=0, duration="share", alters="nothing", text=
    "time between evaluations; there is always one before the first step and one at the end"),
  # The base was measured on those documents, so that they cannot change under way.
  Key("eval.tokens", 100_000, "held-out tokens per source, at most (whole documents)", unit="tokens", at_least=1),
  Key("eval.bytes", 0, unit="bytes", at_least=0, text=
    "held-out bytes of text per source instead: the same documents whatever the tokenizer; 0 = eval.tokens"),
  Key("eval.batch_rows", 0, unit="rows", at_least=0, alters="nothing", text=
    "rows of an evaluation batch; 0 = train.batch_rows / train.microbatches"),
  Key("guard.nonfinite_steps", 3, unit="steps", at_least=1, alters="ahead", text=
    "An update whose loss or gradient is not finite is always skipped; so many in a row end the run with exit code 86."),
  Key("guard.general_loss_rise", 0.0, unit="nats per token", at_least=0.0, alters="ahead", text=
    "what the held-out loss of a replay source may rise above the base's, looked at in each evaluation; 0 = any"),
  Key("guard.on_collapse", "stop", choices=("stop", "hold", "rewind"), alters="ahead", text=
    "When it rose more: stop (saved, exit code 88), hold (the shares stay as they are), rewind (back to the last evaluation"
    " that was within; from there the shares move at half the speed)."),
  Key("guard.spike_mads", 0.0, at_least=0.0, alters="ahead", text=
    "A source's training loss is outside its band when it is more than so many median absolute deviations above the median "
    "of its last 50 records inside (log.every steps each; from 8 records on); 0 = no band. Try 15."),
  Key("guard.spike_records", 3, "records in a row outside that make a spike", unit="records", at_least=1, alters="ahead"),
  Key("guard.on_spike", "skip", choices=("skip", "stop", "hold", "rewind"), alters="ahead", text=
    "At a spike: skip (back to the last good evaluation before it; the rows read since are passed over), or as on_collapse."),
  Key("guard.max_rewinds", 2, "how often a run may go back, for either reason; then it stops", at_least=0, alters="ahead"),
  Key("checkpoint.every", "10%", above=0, duration="share", alters="nothing", text=
    "time between checkpoints; there is always one at the end"),
  Key("checkpoint.keep_last", 2, "newest checkpoints kept", at_least=1, alters="nothing"),
  Key("checkpoint.keep_every", "", above=0, duration="optional", alters="nothing", text=
    "checkpoints at its multiples are kept for good; empty = none"),
  Key("checkpoint.best_metric", "", alters="nothing", text=
    'keep the checkpoint with the lowest e.g. "eval/domain/loss"; empty = none'),
  Key("checkpoint.export_hf", True, "write a Hugging Face directory at the end", alters="nothing"),
  Key("mesh.data", -1, "replicas", unit="devices", alters="nothing"),
  Key("mesh.fsdp", 1, "parameters, gradients and moments sharded", unit="devices", alters="nothing"),
  Key("mesh.context", 1, "positions of a row sharded", unit="devices", alters="nothing"),
  Key("mesh.tensor", 1, "heads, mlp width and vocabulary sharded", unit="devices", alters="nothing"),
  Key("log.every", 10, "steps between lines of metrics.jsonl", unit="steps", at_least=1, alters="nothing"),
  Key("log.tensorboard", False, "also write TensorBoard events (extra [tensorboard])", alters="nothing"),
  Key("plan.losses", (), alters="nothing", text=
    "predicted final losses, ((source, nats per token, low, high), ...): shown beside the measured ones"),
  Key("plan.made_by", "", "the plan that they come from", alters="nothing"),
  Key("debug.stop_after", 0, unit="steps", at_least=0, alters="nothing", text=
    "end after this step without touching the schedules; 0 = off"),
  Key("debug.no_jit", False, "run the step op by op", alters="nothing"),
]

_FIELDS = [
  Key("store", "", "Directory of a token store (cpt prepare, or datatrove). Required."),
  Key("role", "domain", choices=("replay", "domain"), text=
    "replay (text like the base's own: its loss shows forgetting) or domain (what is to be learnt)"),
  Key("share", Share(1.0), at_least=0.0, at_most=1.0, text=
    'Share of the rows, and of the tokens where rows are equally full: a number from 0 to 1, or knots [(0, 0.05), ("20%", '
    '0.3)], linear between them; ("20%", 0.3, "log") rises evenly in the logarithm, ("20%", 0.3, "hold") jumps. Shares are '
    "normalised over the sources at every step. 0 = evaluated but never trained on."),
  Key("at_end", "repeat", choices=("repeat", "stop", "renormalise", "error"), text=
    "When all of it was read: repeat in another order, stop the run, renormalise (the others share what is left) or error "
    "(the run is refused). About 4 repeats are nearly as good as new text (Muennighoff et al. 2305.16264)."),
  Key("max_epochs", 0.0, unit="epochs", at_least=0.0, text=
    "When all of it was read: after so many epochs; 0 = after one, and with at_end='repeat' never. Repeat past this is "
    "refused."),
  Key("loss_weight", 1.0, at_least=0.0, text=
    "Weight of its tokens in the objective, beside their share of the rows; 0 = read and measured, but nothing is learnt."),
  Key("min_tokens", 0, "training documents shorter than this are left out; 0 = no limit", unit="tokens", at_least=0),
  Key("max_tokens", 0, "training documents longer than this are left out; 0 = no limit", unit="tokens", at_least=0),
  Key("length_shares", (), text=
    "Brackets (from_tokens, share of the source's tokens), e.g. ((0, 0.3), (4096, 0.7)): long documents are read more often"
    " until they have their share (per-source length upsampling, Fu et al. 2402.10171). () = every document once an epoch."),
  Key("text", "", text=
    "Raw text to prepare into `store` when that does not exist yet: path or glob of .txt .jsonl .parquet files (.gz .zst "
    "too). Empty: the store must exist. The fields below say how it is read."),
  Key("records", "text", choices=("text", "messages", "prompt"), text=
    "text, messages (conversations, by the tokenizer's chat template), prompt (with an answer)"),
  Key("text_field", "", "the field of records that holds the text, messages or prompt; empty = named like `records`"),
  Key("answer_field", "answer", "of prompt records"),
  Key("train_on", "all", "all, or answers: the loss leaves out what the model is asked", choices=("all", "answers")),
]
# fmt: on

KEYS = {key.name: key for key in _KEYS}
FIELDS = {field.name: dataclasses.replace(field, alters="ahead") for field in _FIELDS}  # of data.sources.NAME


def default() -> Any:
  """Every key with its default: a ConfigDict to change and return from get_config()."""
  c: Any = ConfigDict()
  for key in KEYS.values():
    group, _, leaf = key.name.rpartition(".")
    if group and group not in c:
      c[group] = ConfigDict()
    (c[group] if group else c)[leaf] = key.default
  c.data.sources = ConfigDict(type_safe=False)  # name = config.source(...)
  c.lock()  # a misspelt key in a config file is refused
  c.data.sources.unlock()  # but sources are the user's to name
  return c


def source(**fields: Any) -> Any:
  """One entry of `data.sources`."""
  for name in fields:
    if name not in FIELDS:
      raise TypeError(f"config.source() has no field {name}.{did_you_mean(name, FIELDS)} There are {', '.join(FIELDS)}")
  values = {name: fields.get(name, field.default) for name, field in FIELDS.items()}
  values |= {"share": Share(values["share"]), "length_shares": tuple(values["length_shares"])}
  values |= {name: float(values[name]) for name in ("max_epochs", "loss_weight")}
  return ConfigDict(values, type_safe=False)


source.__signature__ = inspect.Signature(
  [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default) for f in FIELDS.values()]
)


def of(name: str) -> Key | None:
  """The key of a dotted name, also data.sources.NAME.field; None where there is none."""
  parts = name.split(".")
  if parts[:2] == ["data", "sources"]:
    return FIELDS.get(parts[3]) if len(parts) == 4 else None
  return KEYS.get(name)
