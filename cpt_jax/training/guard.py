"""What a run measures -> whether it may go on as it is: skipped updates, forgetting past its budget, spikes of the loss.

Invariant: a decision follows from the settings, numbers that all hosts share, and the decisions before it, so every host and
every resume comes to the same; it is in guard.jsonl before it is acted upon.

The rules are written out for users in docs/guide/guards.md.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from cpt_jax import journal
from cpt_jax.journal import write_atomically
from cpt_jax.stream.sources import Knots, Source

FILE = "guard.jsonl"
# Of a checkpoint that was made before there were guards.
NO_STATE: dict[str, Any] = {"decisions": 0, "good": [], "in_a_row": 0, "windows": {}, "outside": {}}
# A loss that hardly moves has a MAD near 0, and any loss would be outside; chosen by hand, of the median.
_LEAST_MAD = 1e-3
_WINDOW_RECORDS, _LEAST_RECORDS = 50, 8  # of which a band is made: at most, and at least; chosen by hand


class Settings(NamedTuple):
  """The keys of `guard`, see config."""

  nonfinite_steps: int
  general_loss_rise: float
  on_collapse: str
  spike_mads: float
  spike_records: int
  on_spike: str
  max_rewinds: int

  @property
  def rewinds(self) -> bool:
    """May the run go back, so that it must keep checkpoints to go back to."""
    acts = [self.on_collapse] * (self.general_loss_rise > 0) + [self.on_spike] * (self.spike_mads > 0)
    return self.max_rewinds > 0 and not {"rewind", "skip"}.isdisjoint(acts)

  def describe(self, protected: Sequence[str], *, moves: bool) -> list[str]:
    """A line for each guard that is on; `moves`: does any share move ahead."""
    lines = [
      f"an update whose loss or gradient is not finite is skipped; {self.nonfinite_steps} in a row end the run (exit code 86)"
    ]
    if self.general_loss_rise > 0:
      lines.append(
        f"{self.on_collapse} when the held-out loss of {' or '.join(protected)} is more than {self.general_loss_rise:g} "
        f"nats/token above the base's{self._but(self.on_collapse, moves=moves)}"
      )
    if self.spike_mads > 0:
      lines.append(
        f"{self.on_spike} when a source's training loss is more than {self.spike_mads:g} MADs above the median of "
        f"{_WINDOW_RECORDS} records, {self.spike_records} times in a row{self._but(self.on_spike, moves=moves)}"
      )
    return lines

  def _but(self, act: str, *, moves: bool) -> str:
    if act in ("hold", "rewind") and not moves:
      return "; no share moves, so " + ("it stops" if act == "rewind" else "nothing can be held")
    return f"; back at most {self.max_rewinds} times, then stop" if act in ("rewind", "skip") else ""


def settings_from_config(config: Any) -> Settings:
  """The settings of a resolved config."""
  return Settings(**{key: config.guard[key] for key in Settings._fields})


def from_config(
  config: Any, loader: Any, decisions: Sequence[dict], asked: Mapping[str, Knots], *, state: dict | None, first_step: int
) -> "Watch":
  """The guards of a run whose `loader` (stream.pipeline) follows the `decisions`; the rest as for `Watch`."""
  protected = [source.name for source in loader.sources if source.role == "replay"]
  shares = {"asked": asked, "knots": {source.name: source.share for source in loader.sources}}
  begun = {"decisions": decisions, "state": state, "first_step": first_step}
  return Watch(settings_from_config(config), protected=protected, **shares, **begun, log_every=config.log.every)


def describe(config: Any, knots: Mapping[str, Knots], *, start_step: int) -> list[str]:
  """A line for each guard that is on; `knots` are the shares of the sources from `start_step` on."""
  protected = [name for name, entry in config.data.sources.items() if entry.role == "replay"]
  return settings_from_config(config).describe(protected, moves=moves(knots, start_step))


class Watch:
  """The guards of one start of a run at `first_step`.

  `knots` are the shares in force, `asked` those of the config; `decisions` are in force before `first_step`. `state` is what
  `Watch.state` gave when that step was saved; None where a run begins.
  """

  def __init__(
    self,
    settings: Settings,
    *,
    protected: Collection[str],
    asked: Mapping[str, Knots],
    knots: Mapping[str, Knots],
    decisions: Sequence[dict],
    state: dict | None,
    first_step: int,
    log_every: int,
  ):
    self.settings = settings
    self._protected, self._asked, self._knots = frozenset(protected), dict(asked), dict(knots)
    self._decisions, self._log_every, self._first_step = list(decisions), log_every, first_step
    state = state or {**NO_STATE, "good": [first_step]}
    self._good: list[int] = list(state["good"]) if settings.rewinds else []  # the last two steps to which the run may go back
    self.in_a_row: int = state["in_a_row"]  # updates that were skipped, up to the last one
    on = settings.spike_mads > 0
    self._windows: dict[str, list[float]] = {name: list(losses) for name, losses in state["windows"].items() if on}
    # Source -> [records in a row outside its band, step of the first of them].
    self._outside: dict[str, list[int]] = {name: list(found) for name, found in state["outside"].items() if on}
    self._over: dict[str, float] = {}

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, JSON-able."""
    kept = {"decisions": len(self._decisions), "good": self._good, "in_a_row": self.in_a_row}
    return {**kept, "windows": self._windows, "outside": self._outside}

  @property
  def needed(self) -> tuple[int, ...]:
    """Steps whose checkpoints must be kept."""
    return tuple(self._good)

  @property
  def is_lost(self) -> bool:
    """Were so many updates skipped in a row that the run must end."""
    return self.in_a_row >= self.settings.nonfinite_steps

  def reads_at(self, step: int) -> bool:
    """Must all records up to `step` be read before it is decided how to go on."""
    return self.settings.spike_mads > 0 and step % self._log_every == 0

  def saw(self, reading: Any, loader: Any) -> dict | None:
    """Takes in a training.metrics.Reading; returns a note for guard.jsonl where the update was skipped."""
    self.in_a_row = self.in_a_row + 1 if reading.not_finite else 0
    if reading.values is not None and self.settings.spike_mads:
      self._recorded(reading.step, reading.values["source_loss"])
    if not reading.not_finite:
      return None
    step, rows = reading.step - 1, loader.batch_rows
    before, after = (loader.order.positions(at) for at in (step, step + 1))
    return {
      "step": step,
      "kind": "skipped",
      **{key: value if math.isfinite(value) else str(value) for key, value in reading.not_finite.items()},
      "rows": [step * rows, (step + 1) * rows],
      "source_rows": {name: [before.get(name, 0), last] for name, last in after.items() if last > before.get(name, 0)},
      "in_a_row": self.in_a_row,
    }

  def _recorded(self, step: int, source_loss: Mapping[str, float]) -> None:
    for name, loss in source_loss.items():
      window = self._windows.get(name, [])
      if len(window) >= _LEAST_RECORDS and not loss <= upper(window, self.settings.spike_mads):
        num, first = self._outside.get(name, (0, step))
        self._outside[name] = [num + 1, first]
      else:
        self._outside.pop(name, None)
        self._windows[name] = [*window, loss][-_WINDOW_RECORDS:]

  def evaluated(self, step: int, losses: Mapping[str, Any], base_losses: Mapping[str, Any]) -> str:
    """Takes in held-out losses (training.perplexity.SourceLoss) of the state of `step`, and of the base.

    Returns what a person should know where the loss rose too far and `decide` will do nothing about it; else "".
    """
    rise, self._over = self.settings.general_loss_rise, {}
    if rise:
      changes = {name: losses[name].loss - base_losses[name].loss for name in sorted(self._protected & losses.keys())}
      self._over = {name: change for name, change in changes.items() if not change <= rise}
    # A record lies between two good steps, so that one of them is before a spike which the newest record does not show yet.
    is_apart = not self._good or step >= self._good[-1] + self._log_every
    if self.settings.rewinds and not self._over and not self._outside and is_apart:
      self._good = [*self._good[-1:], step]
    if self._over and self.settings.on_collapse == "hold" and not moves(self._knots, step):
      return f"step {step}: {rise_words(self._over, rise)}; no share moves any more, so there is nothing to hold"
    return ""

  def saves(self, step: int) -> bool:
    """Must there be a checkpoint of `step` to go back to."""
    return step in self._good

  def decide(self, step: int, loader: Any) -> dict | None:
    """What must be done at `step`, as guard.jsonl keeps it; None = go on as before."""
    spiking = {name: first for name, (num, first) in self._outside.items() if num >= self.settings.spike_records}
    if spiking:
      before = min(spiking.values()) - self._log_every
      good = [g for g in self._good if g <= before]
      return self._decision(step, {"guard": "spike", "outside_since": spiking}, self.settings.on_spike, good, loader)
    if self._over:
      seen = {"guard": "collapse", "rise": self._over, "limit": self.settings.general_loss_rise}
      return self._decision(step, seen, self.settings.on_collapse, self._good, loader)
    return None

  def _decision(self, step: int, seen: dict, asked: str, good: Sequence[int], loader: Any) -> dict | None:
    if asked == "hold" and not moves(self._knots, step):
      return None
    why = self._why_not(asked, good) if asked in ("rewind", "skip") else ""
    act = "stop" if why else asked
    rewinds = self._num_rewinds() + (act in ("rewind", "skip"))
    to_step = good[-1] if act in ("rewind", "skip") else step
    record = {"step": step, "kind": "decision", **seen, "asked_for": asked, "act": act, "why": why, "to_step": to_step}
    record["rewinds"] = rewinds
    if act == "hold":
      record |= self._new_shares(held(self._knots, step))
    elif act == "rewind":
      record |= self._new_shares(slower(self._knots, to_step, until=step))
    elif act == "skip":
      before, after = (loader.order.positions(at) for at in (to_step, step))
      record["source_rows"] = {name: [before.get(name, 0), n] for name, n in after.items() if n > before.get(name, 0)}
    return record

  def _why_not(self, act: str, good: Sequence[int]) -> str:
    if self._num_rewinds() >= self.settings.max_rewinds:
      return f"it has gone back guard.max_rewinds={self.settings.max_rewinds} times already"
    if not good:
      return "no checkpoint from before it is kept"
    if act == "rewind" and not moves(self._knots, good[-1]):
      return f"no share moves after step {good[-1]}, so nothing can be slowed"
    return ""

  def _num_rewinds(self) -> int:
    return self._decisions[-1]["rewinds"] if self._decisions else 0

  def _new_shares(self, knots: Mapping[str, Knots]) -> dict:
    return {"config_shares": _plain(self._asked), "shares": _plain(knots)}


# ---- a robust band ----


def upper(losses: Sequence[float], mads: float) -> float:
  """The upper border of a band around losses: their median and so many median absolute deviations (not scaled to a sigma)."""
  middle = statistics.median(losses)
  mad = statistics.median(abs(loss - middle) for loss in losses)
  return middle + mads * max(mad, _LEAST_MAD * abs(middle))


# ---- shares, in steps of the run ----


def moves(knots: Mapping[str, Knots], step: int) -> bool:
  """Does any source's share change in the steps from `step` on, against the step before."""
  return any(_Path(k).moves_after(step - 0.5) for k in knots.values())


def held(knots: Mapping[str, Knots], step: int) -> dict[str, Knots]:
  """From `step` on every source's share is that of the step before."""
  return {name: ((0.0, _Path(k).before(step - 0.5), "linear"),) for name, k in knots.items()}


def slower(knots: Mapping[str, Knots], step: int, *, until: int) -> dict[str, Knots]:
  """From `step` on every share moves at half its speed, along the same path: what the shares were is where they come by.

  With c = step - 0.5, the middle of the last step before, a time x of the old schedule comes at c + 2 (x - c): linear ramps have
  half the slope, logarithmic ones half the slope of the logarithm. A jump has no slope to halve. Seen over the steps from `step`
  to `until` it is a rise over until - step steps, so it becomes a linear ramp of 2 (until - step) steps, during which the
  other sources' shares stand still, and all that comes after it comes so much later.
  """
  cut = step - 0.5
  paths = {name: _Path(k) for name, k in knots.items()}
  jumps = sorted({time for path in paths.values() for time in path.jumps() if time > cut})
  ramp_steps = 2.0 * (until - step)
  return {name: _slowed(path, cut, jumps, ramp_steps) for name, path in paths.items()}


def _slowed(path: "_Path", cut: float, jumps: Sequence[float], ramp_steps: float) -> Knots:
  made: list[tuple[float, float, str]] = [(cut, path.after(cut), "linear")]
  if not path.moves_after(cut):
    return tuple(made)
  later, last = 0.0, max(time for time, _, _ in path.knots)
  for time in sorted({time for time, _, _ in path.knots if time > cut} | {time for time in jumps if time < last}):
    now = cut + 2 * (time - cut) + later
    made.append((now, path.before(time), path.curve_to(time)))
    if time in jumps:
      later += ramp_steps
      made.append((now + ramp_steps, path.after(time), "linear"))
  return tuple(made)


class _Path:
  """A source's share as a function of time, with both sides of its jumps; see stream.quotas.Knot."""

  def __init__(self, knots: Knots):
    self.knots = knots

  def before(self, time: float) -> float:
    """The share as the time comes near."""
    left, right = self._around(time)
    return right[1] if left is right else _between(left, right, time)

  def after(self, time: float) -> float:
    """The share from that time on: of several knots the last."""
    here = [share for when, share, _ in self.knots if when == time]
    return here[-1] if here else self.before(time)

  def jumps(self) -> list[float]:
    """Times at which the share is another one from one moment to the next."""
    return sorted({time for time, _, _ in self.knots[1:] if self.before(time) != self.after(time)})

  def moves_after(self, time: float) -> bool:
    """Is the share another one at any time after."""
    now = self.after(time)
    return any(share != now for when, share, _ in self.knots if when > time)

  def curve_to(self, time: float) -> str:
    """On which curve the share comes to `time`."""
    left, right = self._around(time)
    return "log" if left is not right and right[2] == "log" else "linear"

  def _around(self, time: float) -> tuple[tuple, tuple]:
    """The last knot before `time` and the first not before it; twice the same where there is no other."""
    before = [knot for knot in self.knots if knot[0] < time]
    behind = [knot for knot in self.knots if knot[0] >= time]
    return (before or behind)[-1 if before else 0], (behind or before)[0 if behind else -1]


def _between(left: tuple, right: tuple, time: float) -> float:
  (begin, share, _), (end, last, curve) = left, right
  part = (time - begin) / (end - begin)
  if curve == "hold":
    return share
  if part == 1.0:
    return last
  return share * (last / share) ** part if curve == "log" else share + (last - share) * part


# ---- guard.jsonl ----


def read(run_dir: pathlib.Path) -> list[dict]:
  """All records: decisions, and notes of skipped updates."""
  return journal.read(run_dir / FILE)


def decisions(run_dir: pathlib.Path | None, *, step: int | None = None) -> list[dict]:
  """The decisions in force when a run goes on at `step` (None: all); later ones belong to a future that is given up."""
  found = [record for record in read(run_dir) if record["kind"] == "decision"] if run_dir else []
  return [decision for decision in found if step is None or decision["to_step"] <= step]


def drop_after(run_dir: pathlib.Path, step: int) -> None:
  """Of a run that goes on at `step`, removes the notes of what it does again, and marks decisions not in force as undone."""
  records, kept = read(run_dir), []
  for record in records:
    if record["kind"] == "decision" and record["to_step"] > step:
      kept.append({**record, "kind": "undone"})
    elif record["kind"] != "skipped" or record["step"] < step:
      kept.append(record)
  if kept != records:
    _write(run_dir, kept)


def add(run_dir: pathlib.Path, record: dict) -> None:
  """Appends a record, durable when this returns; the same decision made again, after a restart, is written once."""
  records = read(run_dir)
  if json.loads(json.dumps(record)) not in records[-1:]:
    _write(run_dir, [*records, record])


def _write(run_dir: pathlib.Path, records: Sequence[dict]) -> None:
  write_atomically(run_dir / FILE, "".join(json.dumps(record) + "\n" for record in records).encode())


def is_void(step: int, *, num_decisions: int, found: Sequence[dict]) -> bool:
  """Was a checkpoint of `step`, saved when so many decisions had been made, given up by a later one."""
  return any(decision["to_step"] < step for decision in found[num_decisions:])


def in_force(opened: Sequence[Source], found: Sequence[dict]) -> list[Source]:
  """The sources with the shares that the last decision gave them; with their own where the config asks for others since."""
  changed = [decision for decision in found if "shares" in decision]
  if not changed or not is_followed({source.name: source.share for source in opened}, found):
    return list(opened)
  shares = changed[-1]["shares"]
  return [dataclasses.replace(source, share=tuple(map(tuple, shares[source.name]))) for source in opened]


def is_followed(asked: Mapping[str, Knots], found: Sequence[dict]) -> bool:
  """Are these shares of the config those that the last change was made from; or was none made."""
  changed = [decision for decision in found if "shares" in decision]
  return not changed or changed[-1]["config_shares"] == _plain(asked)


def rows_to_skip(found: Sequence[dict], *, step: int) -> dict[str, int]:
  """How many rows each source passes over at `step`, where a run goes on that is saved as it was before."""
  total: dict[str, int] = {}
  for decision in found:
    for name, (first, stop) in (
      decision["source_rows"].items() if decision["act"] == "skip" and decision["to_step"] == step else ()
    ):
      total[name] = total.get(name, 0) + stop - first
  return total


def _plain(knots: Mapping[str, Knots]) -> dict[str, list]:
  return {name: [list(knot) for knot in k] for name, k in knots.items()}


# ---- for people ----


def words(record: Mapping[str, Any]) -> str:
  """What was seen and what is done, in a sentence."""
  if record["kind"] == "skipped":
    rows = ", ".join(f"{stop - first} of {name}" for name, (first, stop) in record["source_rows"].items())
    found = f"loss {record['loss']}, gradient norm {record['grad_norm']}"
    return f"step {record['step']}: {found} is not finite, so the update is skipped; its rows: {rows}"
  if record["guard"] == "collapse":
    seen = rise_words(record["rise"], record["limit"])
  else:
    seen = "training loss outside its band, " + ", ".join(f"{n} since step {s}" for n, s in record["outside_since"].items())
  done = {
    "stop": "saved and stopped",
    "hold": f"the shares stay as they are from step {record['to_step']} on",
    "rewind": f"back to step {record['to_step']}, from where the shares move at half their speed",
    "skip": f"back to step {record['to_step']}, from where the rows read since are passed over",
  }[record["act"]]
  why = f" ({record['asked_for']} was asked for, but {record['why']})" if record["why"] else ""
  return f"step {record['step']}: {seen}; {done}{why}" + " (undone by a later one)" * (record["kind"] == "undone")


def rise_words(rises: Mapping[str, float], limit: float) -> str:
  """By how much which losses rose, beside the limit."""
  found = ", ".join(f"{name} {rise:+.4f}" for name, rise in rises.items())
  return f"held-out loss over the base's {found} nats/token, guard.general_loss_rise={limit:g}"


def advice(record: Mapping[str, Any]) -> str:
  """What a person can do after a guard has stopped the run."""
  key = "guard.general_loss_rise" if record["guard"] == "collapse" else "guard.spike_mads"
  act = "guard.on_collapse=rewind" if record["guard"] == "collapse" else "guard.on_spike=skip"
  return (
    f"stopped by a guard at step {record['step']}, which is saved. Raise {key} to go on from here with the same command, or "
    f"train anew with a gentler ramp, more replay or a lower schedule.lr_peak; with {act}, set from a run's start on, it goes "
    "back by itself"
  )


def lost_words(in_a_row: int, step: int, run_dir: pathlib.Path) -> str:
  """Why a run ends after too many skipped updates."""
  return f"the last {in_a_row} updates, up to step {step}, were not finite and skipped (their rows: {run_dir / FILE})"


def summary(run_dir: pathlib.Path) -> list[str]:
  """A line for each decision of a run, and one for the updates that were skipped."""
  records = read(run_dir)
  lines = [words(record) for record in records if record["kind"] != "skipped"]
  skipped = [str(record["step"]) for record in records if record["kind"] == "skipped"]
  if skipped:
    more = ", ..." if len(skipped) > 10 else ""
    lines.append(f"{len(skipped)} updates skipped, not finite: steps {', '.join(skipped[:10])}{more}")
  return lines
