"""A node's readings → its verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from operator import attrgetter

from opt_ops.core.health import xids
from opt_ops.core.health.burn_in_findings import burned, burning
from opt_ops.core.health.conditions import NodeReading
from opt_ops.core.health.findings import IDENTITY, evidence_of, findings, name_of
from opt_ops.core.health.history import Found, History, measured
from opt_ops.core.health.readings import Heartbeat
from opt_ops.core.health.table import AGAIN_SECONDS, Judgement, Row, judgement
from opt_ops.core.values import Verdict

_RANK: Mapping[Verdict, int] = {Verdict.BAD: 0, Verdict.SUSPECT: 1, Verdict.UNKNOWN: 2, Verdict.HEALTHY: 3}
_ADDRESS = len("0000:3b:00")  # an NVSwitch's ends with its function
EPISODES = 4  # that are remembered of a row on a part


def judge(heartbeat: Heartbeat, expected_gpus: int, history: History | None = None) -> Judgement:
    """The node's verdict by its newest heartbeat.

    Args:
        heartbeat: The newest one.
        expected_gpus: How many GPUs the site says that a node has; 0 where it has none.
        history: What `remember` made of all heartbeats, this one included. Without it this reading is all there is:
            what should be seen in a row counts at once, and rates and changes are unknown.
    """
    return min(_judgements(heartbeat, expected_gpus, history), key=rank)


def judge_all(heartbeat: Heartbeat, expected_gpus: int) -> list[Judgement]:
    """All that one reading says of a node, the worst first; what says that nothing is wrong only where that is so."""
    said = sorted(_judgements(heartbeat, expected_gpus, None), key=rank)
    return [each for each in said if each.reason != "ok"] or said


def rank(judged: Judgement) -> int:
    """What counts first: bad before suspect before unknown before healthy."""
    return _RANK[judged.verdict]


def remember(history: History, heartbeat: Heartbeat, expected_gpus: int) -> History:
    """The history after one more heartbeat."""
    history = measured(history, heartbeat)
    found = dict(history.found)
    known = {name for name, _ in found}
    for row, part, applies in findings(NodeReading(heartbeat, history, expected_gpus)):
        if applies is None or not (applies or (known and key_of(row) in known)):
            continue  # an unknown value counts neither for nor against a row
        key = (key_of(row), name_of(part))
        before = found.get(key, Found())
        if applies:
            began = before.began if before.streak else (*before.began, heartbeat.ts)[-EPISODES:]
            found[key] = Found(min(before.streak + 1, row.readings), began)
        elif before.began:
            found[key] = Found(0, before.began)
    return replace(history, found=found)


_NO_READINGS = ("ts", "orders", "orders_refused", "warned", "attempt")
_readings = attrgetter(*(each.name for each in fields(Heartbeat) if each.name not in _NO_READINGS))


def same_readings(before: Heartbeat, heartbeat: Heartbeat) -> bool:
    """Whether a heartbeat says of its node what the one before said; ranks may run there now, or not any more."""
    return before is heartbeat or _readings(before) == _readings(heartbeat)


def key_of(row: Row) -> str:
    """What a row is remembered by: rows may share a reason."""
    return f"{row.reason}: {row.signal}"


def _judgements(heartbeat: Heartbeat, expected_gpus: int, history: History | None) -> Iterator[Judgement]:
    sight = NodeReading(heartbeat, history or History(), expected_gpus)
    # Most nodes are well, and `remember` has held every row against this heartbeat already.
    clean = history is not None and not any(found.streak for found in history.found.values())
    for row, part, applies in () if clean else findings(sight):
        if not applies:
            continue
        found = history.found.get((key_of(row), name_of(part)), Found()) if history else None
        if found is None or found.streak >= row.readings:
            began = found.began if found else ()
            again = len(began) > 1 and began[-1] - began[-2] <= AGAIN_SECONDS and row.again is not None
            yield judgement(row, evidence_of(row, part, sight), again)
    by_address = {gpu.pci: gpu for gpu in heartbeat.gpus if gpu.pci is not None}
    earlier = (*history.xids, *heartbeat.xids) if history else heartbeat.xids
    # The driver's own wish first: among equal verdicts, what comes first is named.
    for xid in sorted(heartbeat.xids, key=lambda each: each.switch or each.code != 154):
        gpu = by_address.get(xid.pci[:_ADDRESS])
        card = gpu.name if gpu else None
        row, again = xids.row_of(xid, heartbeat.xids, card), xids.came_again(xid, earlier)
        who = {name: value for name in IDENTITY if gpu and (value := getattr(gpu, name)) is not None}
        yield judgement(row, {**xids.evidence_of(xid, card), **who}, again, xid.drill)
    if heartbeat.burn_in is not None:
        yield from (said for _, said in burned(heartbeat.burn_in))
    if heartbeat.burning:
        yield burning()
    if heartbeat.nvml == "ok":
        yield Judgement(verdict=Verdict.HEALTHY, reason="ok", source="no rule of the table applies")
    else:
        yield Judgement(
            verdict=Verdict.UNKNOWN,
            reason=f"nvml_{heartbeat.nvml}",
            source="a GPU that cannot be read is neither healthy nor bad",
        )
