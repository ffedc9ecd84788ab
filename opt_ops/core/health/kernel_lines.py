r"""Errors in the text of the kernel log: Xids of GPUs, SXids of NVSwitches, and lost GPUs without an Xid.

The text comes as it stands: with or without the prefixes of dmesg, `dmesg -T` and the journal. One call of the driver
may write several lines. `/dev/kmsg` shows them as one record, with a line break written as `\x0a`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum


class Kind(StrEnum):
    """What a line reports, where it has no number."""

    NUMBERED = ""
    OFF_THE_BUS = "off_the_bus"
    INIT_FAILED = "init_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEvent:
    """An error that a line reports."""

    code: int | None  # of the Xid or SXid; None: the line has no number
    pci: str  # `0000:3b:00`, of a switch with its function, `0000:06:00.0`; empty: the line names no address
    switch: bool = False
    kind: Kind = Kind.NUMBERED
    line: str = ""  # without prefix


LONGEST = 4096
"""Characters of a line that are looked at: the kernel cuts a record at less."""

_BREAK = re.compile(r"\\x0a|\n")
_ADDRESS = re.compile(
    r"\b(?P<domain>[0-9a-f]{4,8}):(?P<bus>[0-9a-f]{2}):(?P<device>[0-9a-f]{2})(?P<function>\.[0-7])?(?![0-9a-f:])",
    re.IGNORECASE,
)
# `NVRM: Xid (PCI:0000:3b:00): 79, pid=…`; with MIG `(PCI:0000:3b:00 GPU-I:05 GPU-CI:02)`; old drivers omit `PCI:`.
_XID = re.compile(r"NVRM: Xid (?:\((?P<place>[^()]*)\): )?(?P<code>\d{1,9})(?!\w)")
# `nvidia-nvswitch1: SXid (PCI:0000:06:00.0): 20034, Fatal, Link 48 LTSSM Fault Up`; lines with its data follow.
_SXID = re.compile(r"\bSXid \((?P<place>[^()]*)\): (?P<code>\d{1,9}), (?:Non-f|F)atal", re.IGNORECASE)
_DRIVER = re.compile(r"\b(?:NVRM: |nvidia [0-9a-f]{4,8}:)", re.IGNORECASE)
_OFF_THE_BUS = re.compile(r"\b(?:fallen|fell|dropped) off (?:of )?the (?:pci ?e? |pci-?e? )?bus\b", re.IGNORECASE)
_INIT_FAILED = re.compile(r"\brm_?init_?adapter\b.{0,120}\bfailed\b", re.IGNORECASE)
# The first of three lines whose last says `fallen off the bus`. An unsupported GPU has more on its first line.
_FIRST_OF_THREE = re.compile(r"NVRM: The NVIDIA GPU (?P<place>[0-9a-f:.]+)\s*$", re.IGNORECASE)


def log_events(text: str) -> list[LogEvent]:
    """Return the errors in a record of the kernel log: none for nearly every record, one for an error.

    An error without an address that follows one of the same kind in the record is the same error.
    """
    found: list[LogEvent] = []
    for line in _BREAK.split(text[:LONGEST]):
        event = _event(line.rstrip())
        if event is None:
            continue
        same = next((i for i, known in enumerate(found) if is_same(known, event)), None)
        if same is None:
            found.append(event)
        elif not found[same].pci:
            found[same] = replace(found[same], pci=event.pci)
    return found


def is_same(known: LogEvent, event: LogEvent) -> bool:
    """Whether two errors of one moment are one. A GPU that left the bus is often reported with Xid 79 and without.

    A line without an address is a part of the report that names one.
    """
    if (known.switch, _subject(known)) != (event.switch, _subject(event)):
        return False
    nameless = event.kind is not Kind.NUMBERED or known.kind is not Kind.NUMBERED
    return known.pci == event.pci or (nameless and not (known.pci and event.pci))


def _subject(event: LogEvent) -> object:
    return 79 if event.kind is Kind.OFF_THE_BUS else event.code if event.code is not None else event.kind


def _event(line: str) -> LogEvent | None:
    if (numbered := _XID.search(line) or _SXID.search(line)) is not None:
        switch = numbered.re is _SXID
        pci = _address(numbered["place"] or "", function=switch)
        return LogEvent(code=int(numbered["code"]), pci=pci, switch=switch, line=line[numbered.start() :])
    driver = _DRIVER.search(line)
    if driver is None:
        return None
    said = line[driver.start() :]
    if _FIRST_OF_THREE.search(said) or _OFF_THE_BUS.search(said):
        return LogEvent(code=None, pci=_address(said), kind=Kind.OFF_THE_BUS, line=said)
    if _INIT_FAILED.search(said):
        return LogEvent(code=None, pci=_address(said), kind=Kind.INIT_FAILED, line=said)
    return None


def _address(text: str, function: bool = False) -> str:
    """The first PCI address in a text, as NVML's readings have it: four digits of domain, lower case."""
    found = _ADDRESS.search(text)
    if found is None:
        return ""
    end = (found["function"] or "") if function else ""
    return f"{found['domain'][-4:]}:{found['bus']}:{found['device']}{end}".lower()
