"""What the kernel log and NVML reported since the agent started: one entry for each error and part, the worst first.

A flood of one error adds to its count and hides no other. The number of entries is bounded, and the mildest leave
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opt_ops.core.health.kernel_lines import Kind
from opt_ops.core.health.readings import Xid
from opt_ops.core.health.table import Verb
from opt_ops.core.health.xids import BURST_SECONDS, apart, explains_nothing, row_of, severity_of
from opt_ops.core.values import Verdict

MOST_ENTRIES = 64
"""More than a node with 16 GPUs needs; about 30 KiB of a heartbeat."""

SAME_REPORT_SECONDS = 60.0
"""Within it, a line that names no GPU belongs to the same error of a GPU that is named."""

_VERDICTS = (Verdict.BAD, Verdict.SUSPECT, Verdict.UNKNOWN, Verdict.HEALTHY)
_VERBS = tuple(reversed(Verb))

_Key = tuple[object, ...]


class _Entry:
    """One error of one part, and its times."""

    def __init__(self, xid: Xid) -> None:
        self.code, self.kind, self.pci, self.line = xid.code, xid.kind, xid.pci, xid.line
        self.switch, self.drill = xid.switch, xid.drill
        self.first_at = self.at = self.burst_at = xid.at
        self.count = 1
        self.recurred = False
        self.order = _order(self)

    def add(self, at: float) -> None:
        self.count += 1
        if not self.recurred and (apart(self.at, at) or apart(self.burst_at, at)):
            self.recurred = True
            self.order = _order(self)
        if at - self.at > BURST_SECONDS:
            self.burst_at = at
        self.at = max(self.at, at)

    @property
    def xid(self) -> Xid:
        """As it was when it was first seen: its place among the others does not change with time."""
        said = {"pci": self.pci, "line": self.line, "at": self.first_at, "drill": self.drill, "switch": self.switch}
        return Xid(code=self.code, kind=self.kind, **said)


class ErrorRecord:
    """The errors of one node."""

    def __init__(self) -> None:
        self._entries: dict[_Key, _Entry] = {}
        self.dropped = 0
        """Entries that had to leave: all as mild as the mildest that stayed, or milder."""

    def add(self, found: Mapping[str, Any]) -> None:
        """Add an error in the form of a heartbeat."""
        kind = str(found.get("kind") or "")
        xid = Xid(**{name: found[name] for name in ("code", "pci", "line", "at", "drill", "switch")}, kind=kind)
        key = self._key_of(xid)
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(xid)
            if len(self._entries) > MOST_ENTRIES:
                self._drop_mildest()
            return
        entry.add(xid.at)
        entry.pci = entry.pci or xid.pci
        if entry.kind and not xid.kind:  # Xid 79 after the same without a number
            entry.code, entry.kind, entry.line = xid.code, "", xid.line
            entry.order = _order(entry)

    def _key_of(self, xid: Xid) -> _Key:
        """What makes two errors one entry. Lines of one code that state different severities are two."""
        subject = 79 if xid.kind == Kind.OFF_THE_BUS else xid.kind or xid.code
        key = subject, xid.pci, xid.switch, xid.drill, severity_of(xid)
        if key in self._entries or subject not in (79, Kind.INIT_FAILED):
            return key
        for known, entry in self._entries.items():
            same = (known[0], *known[2:]) == (subject, *key[2:])
            if same and not (entry.pci and xid.pci) and abs(xid.at - entry.at) <= SAME_REPORT_SECONDS:
                return known
            if same and entry.pci == xid.pci:
                return known
        return key

    def _drop_mildest(self) -> None:
        mildest = max(self._entries, key=lambda key: self._entries[key].order)
        del self._entries[mildest]
        self.dropped += 1

    def has(self, code: int, pci: str) -> bool:
        """Whether there is an entry of this Xid and GPU."""
        return any((entry.code, entry.pci) == (code, pci) for entry in self._entries.values())

    def entries(self) -> Sequence[dict[str, Any]]:
        """Return the entries in the form of a heartbeat, the worst first."""
        return [
            {
                "code": entry.code,
                "kind": entry.kind,
                "pci": entry.pci,
                "switch": entry.switch,
                "line": entry.line,
                "at": entry.at,
                "first_at": entry.first_at,
                "count": entry.count,
                "recurred": entry.recurred,
                "drill": entry.drill,
            }
            for entry in sorted(self._entries.values(), key=lambda entry: entry.order)
        ]


def _order(entry: _Entry) -> tuple[int, int, bool, float]:
    """The worst first. Of those that say nothing against a GPU, first the ones that may explain another."""
    xid = entry.xid
    row = row_of(xid, (xid,))
    again = row.again is not None and entry.recurred
    verdict = Verdict.SUSPECT if again and row.verdict is Verdict.HEALTHY else row.verdict
    return _VERDICTS.index(verdict), _VERBS.index(row.verb), explains_nothing(xid), entry.first_at
