"""The table in the form that people look it up in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from opt_ops.core.health.burn_in_findings import BURN_IN_ROWS
from opt_ops.core.health.findings import GPU_ROWS, NODE_ROWS, PORT_ROWS
from opt_ops.core.health.fleet import FLEET_ROWS, MISSING
from opt_ops.core.health.kernel_lines import log_events
from opt_ops.core.health.readings import Xid
from opt_ops.core.health.table import AGAIN_SECONDS, Row, Verb
from opt_ops.core.health.xids import (
    KERNEL_ROWS,
    NVLINK5,
    NVLINK_ROWS,
    RECOVERY_ACTIONS,
    SXIDS_BY_GROUP,
    row_of,
    sxid_row,
    xid_row,
)
from opt_ops.core.values import Verdict

OTHERS = (
    Row(
        reason="nvml_…",
        signal="NVML is missing, hangs for 20 s, ends its process again and again (crashed), or reports an error",
        verdict=Verdict.UNKNOWN,
        verb=Verb.NONE,
        source="a GPU that cannot be read is neither healthy nor bad",
    ),
    Row(
        reason="silent",
        signal="no heartbeat for the playbook's seconds",
        verdict=Verdict.UNKNOWN,
        verb=Verb.NONE,
        source="playbooks/silent_node.md",
    ),
    Row(
        reason="unheard",
        signal="no heartbeat of any node is read, for example because the file system hangs; no node is blamed for it",
        verdict=Verdict.UNKNOWN,
        verb=Verb.NONE,
        source="playbooks/silent_node.md",
    ),
    Row(
        reason="known_bad_gpu",
        signal="a GPU (by UUID) that failed earlier in this lineage, in this or another node",
        verdict=Verdict.BAD,
        verb=Verb.ISOLATE,
        source="this lineage's own record, until an operator allows it",
    ),
    Row(
        reason="slurm_…",
        signal="Slurm has drained the node, or reports it down, invalid, powering down, rebooting; the reason follows",
        verdict=Verdict.SUSPECT,
        verb=Verb.NONE,
        source="sinfo",
    ),
)
"""Verdicts that rest on no reading."""


def rows() -> Iterator[Row]:
    """The rows about readings, in the order in which they are tried, and those that rest on none."""
    yield from NODE_ROWS
    yield from GPU_ROWS
    yield from PORT_ROWS
    yield from KERNEL_ROWS.values()
    yield MISSING
    yield from FLEET_ROWS
    yield from BURN_IN_ROWS
    yield from OTHERS


def look_up(words: Sequence[str]) -> list[Row]:
    """What `node explain` shows: `xid 94`, `xid_94`, `sxid 12028`, or a reason. Nothing where nothing is known."""
    name = "_".join(words).lower()
    found = re.fullmatch(r"(s?)xid_?(\d+)", name)
    if found is not None:
        code = int(found[2])
        return _distinct(_sxids(code) if found[1] else _xids(code))
    return [row for row in rows() if _matches(row.reason, name)]


def look_up_line(text: str, card: str | None) -> list[tuple[dict[str, Any], Row]]:
    """What `node explain --line` shows of a record of the kernel log: each error in it, and its row for this card."""
    found: list[tuple[dict[str, Any], Row]] = []
    for event in log_events(text):
        xid = Xid(code=event.code or 0, pci=event.pci, line=event.line, at=0.0, switch=event.switch, kind=event.kind)
        where = event.pci.partition(".")[0] or None
        said = {"pci": where, "code": event.code, "switch": event.switch, "line": event.line}
        found.append((said, row_of(xid, (xid,), card)))
    return found


def _matches(reason: str, name: str) -> bool:
    return name.startswith(reason[:-1]) if reason.endswith("…") else name == reason


def _sxids(code: int) -> Iterator[Row]:
    known = any(code in codes for codes in SXIDS_BY_GROUP.values())
    yield from (sxid_row(code, fatal) for fatal in ((True, False) if known else (True, False, None)))


def _xids(code: int) -> Iterator[Row]:
    said: tuple[str, ...] = ("",)
    if code == 154:
        said = tuple(f"recovery action changed from 0x0 to 0x{action:x}" for action in RECOVERY_ACTIONS)
    elif code in NVLINK5:
        said = ("Fatal", "Nonfatal", "")
    for line in said:
        yield row_of(_xid(code, line))
    if code == 74:
        yield from NVLINK_ROWS
    if code == 48:
        yield row_of(_xid(48), (_xid(48), _xid(63)))


def _xid(code: int, line: str = "") -> Xid:
    return Xid(code=code, pci="", line=line, at=0.0)


def _distinct(found: Iterator[Row]) -> list[Row]:
    return list(dict.fromkeys(found))


def described(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    return {
        "reason": row.reason,
        "signal": row.signal,
        "applies_to": str(row.scope),
        "verdict": str(row.verdict),
        "verb": str(row.verb),
        "readings": row.readings,
        "again": str(row.again) if row.again else None,
        "again_days": AGAIN_SECONDS / 86400 if row.again else None,
        "cards": row.cards,
        "drivers": row.drivers,
        "source": row.source,
        "others": row.disagree or None,
    }


def xids_by_row() -> list[tuple[str, Row]]:
    """The Xids from 1 to 172 grouped by what follows: their codes, and the first one's row."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for code in range(1, 173):
        row = xid_row(code)
        groups.setdefault((row.verdict, row.verb, row.again, row.source, row.cards, row.drivers), []).append(code)
    return [(_ranges(codes), xid_row(codes[0])) for codes in groups.values()]


def sxids_by_row() -> list[tuple[str, Row]]:
    """The SXids of each group, and its row."""
    return [(_ranges(sorted(codes)), sxid_row(codes[0], None)) for codes in SXIDS_BY_GROUP.values()]


def _ranges(codes: Sequence[int]) -> str:
    """`1–7, 9`."""
    parts: list[list[int]] = []
    for code in codes:
        if parts and code == parts[-1][-1] + 1:
            parts[-1].append(code)
        else:
            parts.append([code])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
