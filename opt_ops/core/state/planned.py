"""What was planned for the training, and from which step on: changes that the detectors must not take for faults.

A person declares a change, the trainer lists its own in config.json, or an attempt begins under other settings or with
other data. A rollback or restart by a playbook is no plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opt_ops.core.failures.classes import FailureClass
from opt_ops.core.state.attempts import Attempt, Run
from opt_ops.core.state.data import changes_of
from opt_ops.core.state.model import State
from opt_ops.core.values import PlannedChange

_SAME_LOSS = (
    "steps",
    "engine",
    "compile",
    "checkpoint",
    "parallel.",
    "evaluate_",
    "log_every",
    "checksum_every",
    "data.micro_batch",
)
"""Beginnings of settings that change no loss. The trainer's `trajectory_digest` leaves out the same."""


OTHER_DATA = "other data"
"""What an attempt changes whose trainer says another digest than before, although nobody changed the data."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Steps from `first` on that were trained under the same settings and on the same data."""

    first: int
    settings: tuple[str, ...]
    data: str | None


def parse_planned(text: str) -> PlannedChange:
    """The change in `STEP[:WHAT]`, as `12000:data stage b`.

    Raises:
        ValueError: it has another form.
    """
    step, _, what = text.partition(":")
    if not step.isascii() or not step.isdecimal() or not 1 <= len(step) <= 10 or int(step) < 1:
        raise ValueError(f"{text!r} is not of the form STEP[:WHAT] with a step from 1 on, as 12000:stage-b")
    return PlannedChange(step=int(step), what=what.strip())


def planned_changes(state: State, newest: Attempt | None = None) -> tuple[PlannedChange, ...]:
    """Every planned change on the way of the newest attempt, in step order.

    `newest` stands for the newest attempt if more is known of it than the journal says.
    """
    by_trainer: list[PlannedChange] = []
    begun: list[PlannedChange] = []
    segments: list[_Segment] = []
    for known in state.attempts.values():
        attempt = newest if newest is not None and newest.name == known.name else known
        start = attempt.checkpoint.step if attempt.checkpoint else 0
        by_trainer = [*(each for each in by_trainer if each.step <= start), *attempt.planned]
        begun = [each for each in begun if each.step <= start]
        segments = [each for each in segments if each.first <= start]
        what = [*_new_settings(state, attempt, segments, start), *_new_course(state, state.runs[attempt.run], start)]
        if what:
            begun.append(PlannedChange(step=start + 1, what=", ".join(what), by=attempt.name))
        data = attempt.data or (segments[-1].data if segments else None)
        segments.append(_Segment(start + 1, _redefining(state, attempt), data))
        for step, change in changes_of(state, state.runs[attempt.run]):
            if step >= start and step > 0:
                begun.append(PlannedChange(step=step + 1, what=f"data: {change}", by=attempt.name))
            if step > start:  # its digest is not known here
                segments.append(_Segment(step + 1, segments[-1].settings, None))
    found = {(each.step, each.what): each for each in (*state.planned, *by_trainer, *begun)}
    return tuple(sorted(found.values(), key=lambda each: each.step))


def planned_rows(state: State) -> list[Mapping[str, object]]:
    """The planned changes for tables and JSON."""
    return [{"step": each.step, "what": each.what, "by": each.by} for each in planned_changes(state)]


def _redefining(state: State, attempt: Attempt) -> tuple[str, ...]:
    """The settings of an attempt's run that may change the loss. Of each name, the last one counts."""
    named = {setting.partition("=")[0]: setting for setting in state.runs[attempt.run].settings}
    return tuple(sorted(each for name, each in named.items() if not name.startswith(_SAME_LOSS)))


def _new_settings(state: State, attempt: Attempt, segments: list[_Segment], start: int) -> list[str]:
    """What the attempt changes against the steps that lead to it."""
    if not segments:
        return []
    before, settings = segments[-1], _redefining(state, attempt)
    changed = [each for each in settings if each not in before.settings]
    names = {each.partition("=")[0] for each in settings}
    gone = [f"without {each}" for each in before.settings if each.partition("=")[0] not in names]
    told = any(each.step == start for each in state.runs[attempt.run].data)  # and named by what changes
    other = not told and attempt.data is not None and before.data is not None and attempt.data != before.data
    return [*changed, *gone, *([OTHER_DATA] if other else [])]


def _new_course(state: State, run: Run, start: int) -> list[str]:
    """What a person changed for the run that begins here, beside settings: learning rate, skipped batches."""
    incident = state.incidents.get(run.incident or "")
    if incident is None or incident.kind != FailureClass.OPERATOR or incident.decision is None:
        return []
    if start != (run.checkpoint.step if run.checkpoint else 0):
        return []
    change = state.changes.get(str(incident.evidence.get("request")))
    lr = incident.decision.lr_factor is not None or (change is not None and change.lr is not None)
    skips = incident.decision.skip_batches
    return [*(["learning rate"] if lr else []), *([f"{skips} batches skipped"] if skips else [])]
