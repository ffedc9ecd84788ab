"""A lineage with those it was forked from: the steps that its weights passed through, and where two lineages part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from chronicles.kept_curve import CurveOf, attempt_curves, kept_points
from chronicles.record import LineageRecord, load
from opt_ops.core.names import attempt_folder
from opt_ops.core.state.queries import ancestry
from opt_ops.core.values import Parent
from opt_ops.runfolder.telemetry_curve import CurvePoint, read_curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A lineage by its journal, and the curve of each attempt, in order."""

    record: LineageRecord
    curves: Sequence[CurveOf[CurvePoint]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A lineage and its ancestors as far as their folders are there, the youngest first."""

    folder: Path
    members: Sequence[Member]

    @property
    def lineage(self) -> str:
        """The number of the youngest."""
        return self.folder.name

    @property
    def own(self) -> LineageRecord:
        """The record of the youngest."""
        return self.members[0].record

    @property
    def records(self) -> Sequence[LineageRecord]:
        """The record of each."""
        return [each.record for each in self.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """Where the ways of two lineages part: the last step that both have in common."""

    run: str
    step: int
    checkpoint: str | None


def family(folder: Path) -> Family:
    """Read a lineage and those it was forked from.

    Raises:
        JournalError: a journal cannot be trusted.
    """
    members, seen = [_member(folder)], {folder.name}
    while (parent := _parent(members[-1].record)) is not None and (folder.parent / parent.lineage).is_dir():
        if parent.lineage in seen:  # a folder that was put in the place of another
            break
        seen.add(parent.lineage)
        members.append(_member(folder.parent / parent.lineage))
    return Family(folder=folder, members=members)


def _member(folder: Path) -> Member:
    record = load(folder, telemetry=False)
    attempts = record.state.attempts
    points = {name: read_curve(folder / attempt_folder(name) / "telemetry.jsonl") for name in attempts}
    return Member(record=record, curves=attempt_curves(attempts, points))


def _parent(record: LineageRecord) -> Parent | None:
    return record.state.lineage.parent if record.state.lineage else None


def settled(of: Family) -> tuple[list[CurvePoint], int]:
    """The steps that the present weights have passed through, in order, and how many of them are an ancestor's."""
    own = [point for _, point in kept_points(of.members[0].curves)]
    before = _inherited(of.members)
    return [*before, *own], len(before)


def _inherited(members: Sequence[Member]) -> list[CurvePoint]:
    """What lies before the first step of the youngest: the way of the older ones to the checkpoint it began from."""
    parent, older = _parent(members[0].record), members[1:]
    if parent is None or not older:
        return []
    points = [point for _, point in kept_points(_curves_to(older[0], parent)) if point.step <= parent.step]
    first = points[0].step if points else parent.step + 1
    return [*(point for point in _inherited(older) if point.step < first), *points]


def _curves_to(member: Member, parent: Parent) -> list[CurveOf[CurvePoint]]:
    """The curves up to the attempt that wrote a checkpoint: what later attempts discarded was still in force there."""
    curves = member.curves
    number = next((i + 1 for i, each in enumerate(curves) if _wrote(each, parent)), len(curves))
    attempts = dict(islice(member.record.state.attempts.items(), number))
    return attempt_curves(attempts, {each.attempt: each.points for each in curves[:number]})


def _wrote(curve: CurveOf[CurvePoint], parent: Parent) -> bool:
    return curve.run == parent.run and any(point.step >= parent.step for point in curve.points)


# ---- where two lineages part


def common_ancestor(a: Family, b: Family) -> Ancestor | None:
    """The newest step that the present weights of both have passed through; None: they have none in common."""
    limits = dict(way(a))
    for run, limit in way(b):
        if run in limits:
            known = [each for each in (limit, limits[run]) if each is not None]
            if not known:  # a lineage and itself
                return None
            step = min(known)
            return Ancestor(run=run, step=step, checkpoint=_checkpoint((a, b), run, step))
    return None


def way(of: Family) -> Iterator[tuple[str, int | None]]:
    """The runs that a lineage's weights passed through, newest first, each with its last step (None: all)."""
    run, limit = of.own.state.run.name if of.own.state.run else None, None
    for record in of.records:
        for name, until in ancestry(record.state, run) if run is not None else ():
            if name in record.state.runs:
                known = [each for each in (limit, until) if each is not None]
                yield name, min(known, default=None)
        parent = _parent(record)
        run, limit = (parent.run, parent.step) if parent is not None else (None, None)


def _checkpoint(families: Sequence[Family], run: str, step: int) -> str | None:
    records = [record for each in families for record in each.records]
    saved = [parent.saved for record in records if (parent := _parent(record)) is not None]
    saved += [each.checkpoint for record in records for each in record.state.runs.values() if each.checkpoint]
    return next((each.path for each in saved if (each.run, each.step) == (run, step)), None)
