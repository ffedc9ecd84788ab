"""Promises that files keep: config.json, telemetry.jsonl, phases.jsonl, and the learning rate that they tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from opt_ops.contract.phases import PhaseName
from opt_ops.core.schedule import PlannedLr
from opt_ops.core.values import Schedule
from opt_ops.runfolder.trainer_files import FileTrainer
from opt_ops.trainer_check.findings import Finding, broken, kept, on_ranks, unknown
from opt_ops.trainer_check.records import Ran, number, shares_clock, time_of_marker
from opt_ops.trainer_check.seen import LAST, Seen

_PROOF_TOLERANCE = 1e-9  # relative; the proof of a recovery compares with this one (core/decide/proof.py)


def config(seen: Seen, _: float) -> Finding:
    """config.json has its fields and types, before the first update."""
    return _of_each(seen, _config)


def _config(ran: Ran) -> Finding:
    if ran.config is None:
        return broken(f"{ran.config_problem} ({ran.how()})")
    for problem in _config_problems(ran.config):
        return broken(f"config.json: {problem}")
    if schedule_of(ran) is None:
        return broken("config.json: the supervisor's reader does not take its fields `schedule` and `optimizer`")
    if ran.config_first is False:
        return broken("config.json appeared after the first line of telemetry")
    return kept(f"schedule {ran.config['schedule'].get('kind', 'linear')}, steps {LAST}, before the first update")


def _config_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("v") != 1:
        yield f"`v` is {fields.get('v')!r}, not 1"
    if not _whole(fields.get("steps")):
        yield f"`steps` is {fields.get('steps')!r}, no whole number"
    elif fields["steps"] != LAST:
        yield f"`steps` is {fields['steps']!r}; --set steps={LAST} was given"
    for part in ("schedule", "optimizer"):
        if not isinstance(fields.get(part), dict):
            yield f"`{part}` is {fields.get(part)!r}, no object"
            return
    optimizer, schedule = fields["optimizer"], fields["schedule"]
    for name, right in (("betas", _pair_of_numbers), ("weight_decay", _finite), ("clip_norm", _finite)):
        if name not in optimizer:
            yield f"`optimizer.{name}` is missing; null is for an optimizer that has none"
        elif optimizer[name] is not None and not right(optimizer[name]):
            yield f"`optimizer.{name}` is {optimizer[name]!r}"
    for name in ("peak_lr", "warmup_steps", "total_steps", "final_fraction", "delay", "warmup_from"):
        if schedule.get(name) is not None and not _finite(schedule[name]):
            yield f"`schedule.{name}` is {schedule[name]!r}, no number"


def schedule_of(ran: Ran) -> Schedule | None:
    """The schedule that config.json states, read as the daemon reads it."""
    lineage = ran.run_dir.parent.parent
    found = FileTrainer(lineage).config(f"{ran.name}-a1")
    return found.schedule if found else None


_SAVES_TO_JUDGE = 6
_NULL_ALLOWED = ("gnorm", "betas", "weight_decay", "clip_norm")


def _pair_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_finite, value))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return _finite(value) and value == int(value)


def _not_negative(value: Any) -> bool:
    return _finite(value) and value >= 0


def _count(value: Any) -> bool:
    return _whole(value) and value >= 0


def _moment(value: Any) -> bool:
    return _finite(value) and 1e9 < value < 7.3e9  # after 2001, before 2200: seconds, not milliseconds


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "ts": _moment,
    "num_updates": _count,
    "loss": _finite,
    "gnorm": _not_negative,
    "lr": _not_negative,
    "betas": _pair_of_numbers,
    "weight_decay": _finite,
    "clip_norm": _finite,
    "finite": lambda value: isinstance(value, bool),
    "step_seconds": _not_negative,
    "tokens": _count,
    "wps": _not_negative,
    "data_position": _count,
}

_MAY: Mapping[str, Callable[[Any], bool]] = {
    "skipped": _count,
    "base_lr": _not_negative,
    "loss_scale": _not_negative,
}
"""Fields that a trainer may leave out, or write as null."""


def telemetry(seen: Seen, _: float) -> Finding:
    """One line an update, in order, from rank 0 alone, with 13 fields of the right types."""
    finding = _of_each(seen, _telemetry)
    return broken(seen.late_lines) if finding.ok and seen.late_lines else finding


def _telemetry(ran: Ran) -> Finding:
    lines = ran.telemetry.lines
    if not lines.found or not (lines.values or lines.problems):
        return broken(f"there is no line in telemetry.jsonl ({ran.how()})")
    if lines.problems:
        return broken(lines.problems[0])
    for at, line in enumerate(lines.values, start=1):
        for problem in (*line_problems(line), *_other_optimizer(ran, line)):
            return broken(f"line {at}: {problem}")
    return _order(ran)


def line_problems(line: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the 13 fields of a line."""
    for name, right in _FIELDS.items():
        if name not in line:
            yield f"`{name}` is missing"
        elif line[name] is None and (name in _NULL_ALLOWED or (name == "loss" and line.get("finite") is False)):
            continue
        elif not right(line[name]):
            yield f"`{name}` is {line[name]!r}"
    for name, right in _MAY.items():
        if line.get(name) is not None and not right(line[name]):
            yield f"`{name}` is {line[name]!r}"


def _other_optimizer(ran: Ran, line: Mapping[str, Any]) -> Iterator[str]:
    """What a line tells of the optimizer, and config.json tells otherwise: the proof of a recovery compares them."""
    stated = (ran.config or {}).get("optimizer")
    for name in ("betas", "weight_decay", "clip_norm"):
        told, due = line.get(name), stated.get(name) if isinstance(stated, dict) else None
        if due is not None and told is not None and told != due:
            yield f"`{name}` is {told!r}, and config.json says {due!r}"


def _order(ran: Ran) -> Finding:
    steps = [int(line["num_updates"]) for line in ran.telemetry.lines.values]
    if steps[0] != 1:
        return broken(f"the first line is of update {steps[0]}, not of update 1")
    for before, after in pairwise(steps):
        if after == before + 1:
            continue
        if after in steps[: steps.index(before) + 1]:
            by = "; does only rank 0 write?" if ran.world > 1 else ""
            return broken(f"update {after} has more than one line{by}")
        if after > before:
            return broken(f"the line of update {before + 1} is missing: {after} follows {before}")
        return broken(f"the line of update {after} comes after that of update {before}")
    if ran.done and steps[-1] != LAST:
        return broken(f"the last line is of update {steps[-1]}, not of update {LAST}")
    return kept(f"{len(steps)} lines, 13 fields each, in order")


def phases(seen: Seen, _: float) -> Finding:
    """Known names, `start` first, `saving` around saves, `training` again after it."""
    finding = _of_each(seen, _phases)
    if finding.ok and (why := _late_saving(seen)):
        return broken(why)
    return finding


def _late_saving(seen: Seen) -> str:
    """Whether `saving` is written after the save. It is judged by saves in slow motion, which last many ticks."""
    ran = seen.runs.get("marker_last")
    if ran is None or not shares_clock(ran.run_dir):
        return ""
    saving = (entry for entry in ran.phases.values if entry.get("phase") == PhaseName.SAVING)
    told: dict[Any, float] = {entry.get("step"): entry["ts"] for entry in saving if _moment(entry.get("ts"))}
    watched = [step for step, _ in ran.saved if step in told and step in seen.watched]
    late = [step for step, path in ran.saved if step in watched and told[step] > time_of_marker(path)]
    if len(late) < _SAVES_TO_JUDGE or late != watched:
        return ""
    return f"'saving' of step {late[-1]} was written when the save was over"


def _phases(ran: Ran) -> Finding:
    if not ran.phases.found:
        return unknown("no phases.jsonl: a first save or evaluation of more than 30 s will count as a hang")
    if ran.phases.problems:
        return broken(ran.phases.problems[0])
    entries = ran.phases.values
    names = [entry.get("phase") for entry in entries]
    for at, entry in enumerate(entries, start=1):
        if entry.get("phase") not in set(PhaseName):
            return broken(f"line {at}: {entry.get('phase')!r} is no phase of docs/formats.md")
        if not _moment(entry.get("ts")) or not (entry.get("step") is None or _count(entry["step"])):
            return broken(f"line {at}: `ts` is {entry.get('ts')!r}, `step` is {entry.get('step')!r}")
    if not names or names[0] != PhaseName.START:
        return broken(f"the first phase is {names[0] if names else None!r}, not 'start'")
    if PhaseName.TRAINING not in names:
        return broken("no phase 'training'")
    if PhaseName.SAVING in names and names.index(PhaseName.SAVING) < names.index(PhaseName.TRAINING):
        return broken("no phase 'training' before the first 'saving': the first updates count as start-up")
    return _saving(ran, entries, names)


def _saving(ran: Ran, entries: tuple[dict[str, Any], ...], names: list[Any]) -> Finding:
    told = {number(entry.get("step")) for entry in entries if entry["phase"] == PhaseName.SAVING}
    last = max(ran.telemetry.steps, default=0)
    for step, _ in ran.saved:
        if step not in told and (told - {None} or not told) and not (step == last and PhaseName.ENDING in names):
            return broken(f"step {step} was saved without a phase 'saving' of step {step}")
    for at, entry in enumerate(entries):
        step = number(entry.get("step"))
        if entry["phase"] != PhaseName.SAVING or (step is not None and step >= last):
            continue
        follows = names[at + 1 :]
        until = follows.index(PhaseName.SAVING) if PhaseName.SAVING in follows else len(follows)
        if PhaseName.TRAINING not in follows[:until]:
            return broken(
                f"no phase 'training' after 'saving' of step {entry.get('step')}: every update counts as a save"
            )
    return kept(f"{len(entries)} phases, 'start' first, {names.count(PhaseName.SAVING)} × 'saving'")


def schedule(seen: Seen, _: float) -> Finding:
    """The learning rate of every update is that of the stated schedule."""
    return _of_each(seen, _schedule)


def _schedule(ran: Ran) -> Finding:
    stated = schedule_of(ran)
    if stated is None:
        return unknown("config.json states no schedule that can be read")
    planned, judged = PlannedLr(schedule=stated), 0
    for step in ran.telemetry.steps:
        lr, due = ran.telemetry.all(step, "lr"), planned.at(step)
        if due is None:
            return _unknown_kind(ran, stated)
        if not lr:
            continue
        judged += 1
        if not any(math.isclose(each, due, rel_tol=_PROOF_TOLERANCE, abs_tol=1e-300) for each in lr):
            return broken(f"update {step}: learning rate {lr[0]!r}; the stated schedule gives {due!r}")
    if not judged:
        return unknown("telemetry tells no learning rate")
    return kept(f"{judged} learning rates are those of the stated schedule ({stated.kind})")


def _unknown_kind(ran: Ran, stated: Schedule) -> Finding:
    told = f"schedule {stated.kind!r} is of a kind that is not computed"
    if not any(ran.telemetry.all(step, "base_lr") for step in ran.telemetry.steps):
        return unknown(f"{told}, and telemetry has no `base_lr`: no recovery will be proven by the learning rate")
    for step in ran.telemetry.steps:
        lr, base = ran.telemetry.one(step, "lr"), ran.telemetry.one(step, "base_lr")
        if lr is not None and base is not None and not math.isclose(lr, base, rel_tol=_PROOF_TOLERANCE):
            return broken(f"update {step}: learning rate {lr!r}, `base_lr` {base!r}, and no factor is in force")
    return unknown(f"{told}; `base_lr` equals the learning rate, as it must where no factor is in force")


def _of_each(seen: Seen, judge: Callable[[Ran], Finding]) -> Finding:
    """Judge the attempt without interruption on each number of ranks; the worst counts."""
    found: list[Finding] = []
    for world in seen.ranks:
        ran = seen.base(world)
        if ran is None:
            continue
        finding = judge(ran)
        if finding.ok is False:
            return broken(f"{on_ranks(world)}: {finding.why}")
        found.append(finding)
    if not found:
        return unknown("no attempt was made")
    return next((each for each in found if each.ok is None), found[-1])
