"""Errors in the kernel log: Xids of GPUs, SXids of NVSwitches, and lost GPUs without a number.

Xid actions are those of NVIDIA's catalogue ("immediate resolution" column,
docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, as of 2025-10-29). SXids follow appendix D of NVIDIA's
Fabric Manager User Guide (DU-09883-001 v1.3). Where the line itself states the severity or the wanted recovery, the
line decides, not the code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from opt_ops.core.failures.xid_names import XID_NAMES
from opt_ops.core.health.kernel_lines import Kind
from opt_ops.core.health.nvlink import Cause, decoded
from opt_ops.core.health.readings import Xid
from opt_ops.core.health.table import AGAIN_SECONDS, Row, Verb
from opt_ops.core.values import Verdict

_CATALOGUE = "NVIDIA Xid catalogue"
BURST_SECONDS = 60.0  # the same error within it is one event

_XIDS_BY_VERB: Mapping[Verb, tuple[int, ...]] = {
    Verb.RESTART_APP: (
        *(8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80, 82, 83, 84, 85, 86, 88, 89, 94),
        *range(96, 106),
        *range(126, 136),
        139,
    ),
    Verb.NONE: (37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 157, 160, 161),
    Verb.RESET_GPU: (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    Verb.REBOOT_NODE: (79, 151),
    # 48 (double-bit error) alone asks for a field diagnostic; 54 is a power cable, 142 ends with support.
    Verb.ISOLATE: (48, 54, 142),
}
XID_VERBS: Mapping[int, Verb] = {code: verb for verb, codes in _XIDS_BY_VERB.items() for code in codes}

_APPLICATION = frozenset({11, 13, 25, 31, 32, 60, 69, 80})
"""Restarts whose cause the catalogue seeks in the software: a repetition is no evidence against the GPU."""

_EXPLAINS_NOTHING = _APPLICATION | {43, 45, 74}
"""Beside an NVLink error: no other error of the hardware, of which it could be the consequence."""


def explains_nothing(xid: Xid) -> bool:
    """Whether no other error could be the consequence of this one."""
    return xid.code in _EXPLAINS_NOTHING and not xid.switch


NVLINK5 = range(144, 151)
_FATAL = re.compile(r"(?<![Nn]on)(?<![Nn]on-)\bFatal\b")
_NONFATAL = re.compile(r"\bNon-?fatal\b", re.IGNORECASE)
_RECOVERY = re.compile(r"recovery action changed from .* to 0x(?P<action>[0-9a-fA-F]{1,8})\b")

_DISAGREE: Mapping[int, str] = {
    13: "DCGM and gpud warn",
    31: "DCGM warns; gpud: check application and GPU",
    43: "DCGM and gpud warn",
    45: "NVIDIA's workflow: alone, restart the fabric manager. But the driver logs it for every killed process",
    48: "catalogue: a workflow; DCGM: devastating; AWS: reset",
    63: "Azure fails the node; gpud reboots; the Kubernetes device plugin: unhealthy; DCGM warns",
    64: "AWS reboots an A100; gpud reboots",
    68: "Azure fails the node; gpud reboots; gcm: not critical",
    74: "catalogue: a workflow by registers; DCGM: devastating; AWS: reset; the Delta study: jobs often continue",
    92: "Azure fails the node; the Kubernetes device plugin: unhealthy; AWS: monitor",
    94: "gcm: critical; the Kubernetes device plugin: unhealthy; DCGM warns; AWS: monitor; gpud: fatal",
    95: "AWS reboots an A100 without MIG; gpud reboots",
    109: "gcm: not critical; the Kubernetes device plugin ignores it; AWS: reset; gpud warns",
    159: "catalogue: check UVM; AWS: reset if UVM is used",
    168: "catalogue: no action listed; AWS: reboot",
}

_CORRECTED = (11012, 11021, 11022, 11023, 12021, 12023, 15008, 15011, 19049, 19055, 19057, 19059, 19062, 19065, 19068)
SXIDS_BY_GROUP: Mapping[str, tuple[int, ...]] = {
    "harmless": (*_CORRECTED, 19071, 24001, 24002, 24003, 20001, 22013, 10001, 10002, 10004, 10005),
    "stalls": (12028, 19084),
    "connection": (20012, 22012),
    "fatal": (
        *(11001, 11009, 11013, 11018, 11019, 11020, 12001, 12002, 12022, *range(12024, 12028), 12030, 12031, 12032),
        *(14017, 15001, 15006, 15009, 15010, 15012, 15013, 19047, 19048, 19054, 19056, 19058, 19060, 19061, 19063),
        *(19064, 19066, 19067, 19069, 19070, 20034, 24004, 24005, 24006, 24007, 10003),
    ),
    "always_fatal": (12020, 22003, 22011, *range(23001, 23018)),
}
_GROUP_OF_SXID = {code: group for group, codes in SXIDS_BY_GROUP.items() for code in codes}


def row_of(xid: Xid, others: Sequence[Xid] = (), card: str | None = None) -> Row:
    """The row for an error, by its code, its line, and what else came from the same GPU.

    Args:
        xid: The error.
        others: All that is known of the node since its agent started; it may contain `xid`.
        card: The name of the GPU that it comes from.
    """
    if xid.kind:
        return KERNEL_ROWS.get(xid.kind, _OTHER_KIND)
    if xid.switch:
        return sxid_row(xid.code, _fatal(xid.line))
    if xid.code == 154:
        found = _RECOVERY.search(xid.line)
        return _recovery_row(None if found is None else int(found["action"], 16))
    if xid.code in NVLINK5:
        return _nvlink5_row(xid.code, _fatal(xid.line))
    codes = {other.code for other in others if other.pci == xid.pci and not other.switch}
    if xid.code == 74 and (link := decoded(xid.line, card)) is not None and link.causes:
        alone = all(explains_nothing(other) for other in others)
        return _nvlink_row(link.causes[0], alone)
    if xid.code == 48 and codes & {63, 64}:
        return _row(48, Verdict.BAD, Verb.RESET_GPU, f"{_CATALOGUE}: 48 with 63 or 64, drain and reset", Verb.ISOLATE)
    return xid_row(xid.code)


def xid_row(code: int) -> Row:
    """The row for an Xid by its code alone."""
    if code in NVLINK5:
        return _nvlink5_row(code, None)
    special = _WORKFLOWS.get(code)
    if special is not None:
        return special
    verb = XID_VERBS.get(code)
    if verb is None and (code > 161 or code < 1):
        return _row(code, Verdict.SUSPECT, Verb.NONE, f"{_CATALOGUE}: no resolution listed")
    if verb is None:
        return _row(code, Verdict.SUSPECT, Verb.ISOLATE, f"{_CATALOGUE}: marked unused, contact support")
    again = None
    if verb in (Verb.RESET_GPU, Verb.REBOOT_NODE) or (verb is Verb.RESTART_APP and code not in _APPLICATION):
        again = Verb.ISOLATE
    verdict = Verdict.HEALTHY if verb in (Verb.NONE, Verb.RESTART_APP) else Verdict.BAD
    return _row(code, verdict, verb, f"{_CATALOGUE}: {verb}", again)


def sxid_row(code: int, fatal: bool | None) -> Row:
    """The row for an SXid; `fatal` is what its line says, None where that is not known."""
    group = _GROUP_OF_SXID.get(code, "unlisted")
    if group == "unlisted" and fatal:
        group = "fatal"
    elif group in ("fatal", "unlisted") and fatal is False:
        group = "harmless"
    verdict, verb, source = _SXID_GROUPS[group]
    again = Verb.ISOLATE if verb in (Verb.RESET_GPU, Verb.REBOOT_NODE) else None
    return Row(
        reason=f"sxid_{code}",
        signal=f"SXid {code}: {group.replace('_', ' ')}",
        verdict=verdict,
        verb=verb,
        source=f"NVIDIA Fabric Manager User Guide, {source}",
        disagree="DCGM isolates at every fatal one; gpud only reports",
        again=again,
        cards="with NVSwitches",
    )


_SXID_GROUPS: Mapping[str, tuple[Verdict, Verb, str]] = {
    "harmless": (Verdict.HEALTHY, Verb.NONE, "D.4, D.7: corrected, or without consequence by itself"),
    "stalls": (Verdict.BAD, Verb.RESET_GPU, "D.4: the GPU's traffic stalls; restart, or reset GPUs and NVSwitches"),
    "connection": (Verdict.SUSPECT, Verb.ISOLATE, "D.4: check the mechanical connections"),
    "fatal": (Verdict.BAD, Verb.RESET_GPU, "D.5: fatal to the partition; reset all its GPUs and NVSwitches"),
    "always_fatal": (Verdict.BAD, Verb.REBOOT_NODE, "D.6: fatal to the whole fabric; restart the host"),
    "unlisted": (Verdict.SUSPECT, Verb.NONE, "not listed, and the line does not state the severity"),
}


def severity_of(xid: Xid) -> str:
    """What the line says beyond its code, as far as the verdict depends on it. Empty: the code alone decides."""
    if xid.kind:
        return ""
    if xid.switch or xid.code in NVLINK5:
        return {True: "fatal", False: "nonfatal", None: ""}[_fatal(xid.line)]
    if xid.code == 154:
        found = _RECOVERY.search(xid.line)
        return "" if found is None else str(int(found["action"], 16))
    link = decoded(xid.line, "H100") if xid.code == 74 else None
    return str(link.causes[0]) if link is not None and link.causes else ""


def came_again(xid: Xid, others: Sequence[Xid]) -> bool:
    """Whether the same error had come from the same part before, and not in the same burst."""
    times = [at for other in others if _of_part(other) == _of_part(xid) for at in _times(other)]
    return xid.recurred or any(apart(at, later) for at in times for later in _times(xid))


def _times(xid: Xid) -> tuple[float, ...]:
    return (xid.at,) if xid.first_at is None else (xid.first_at, xid.at)


def apart(earlier: float, later: float) -> bool:
    """Whether two times of an error are two events, and near enough for the second to count as a recurrence."""
    return BURST_SECONDS < later - earlier <= AGAIN_SECONDS


def _of_part(xid: Xid) -> tuple[object, ...]:
    return xid.code, xid.pci, xid.switch, xid.drill, xid.kind


def evidence_of(xid: Xid, card: str | None = None) -> dict[str, object]:
    """What is journaled of an error: of 74 with the link and what its registers say, of 144 to 150 with the unit."""
    what = {"event": xid.kind} if xid.kind else {"sxid" if xid.switch else "xid": xid.code}
    evidence: dict[str, object] = {**what, "pci": xid.pci, "line": xid.line}
    if xid.count > 1:
        evidence["count"] = xid.count
    word = re.search(r"\((0x[0-9a-fA-F]{8}) ", xid.line)
    if xid.code in NVLINK5 and word is not None:
        evidence["subunit"] = (int(word[1], 16) >> 20) & 0x3F
    link = decoded(xid.line, card) if xid.code == 74 else None
    return evidence if link is None else {**evidence, "link": link.link, "causes": [str(each) for each in link.causes]}


def _fatal(line: str) -> bool | None:
    """What the line says; None when it says neither."""
    if _NONFATAL.search(line):
        return False
    return True if _FATAL.search(line) else None


def _row(
    code: int,
    verdict: Verdict,
    verb: Verb,
    source: str,
    again: Verb | None = None,
    cards: str = "all",
    drivers: str = "all",
) -> Row:
    name = XID_NAMES.get(code)
    return Row(
        reason=f"xid_{code}",
        signal=f"Xid {code}" + (f": {name}" if name else ""),
        verdict=verdict,
        verb=verb,
        source=source,
        again=again,
        disagree=_DISAGREE.get(code, ""),
        cards=cards,
        drivers=drivers,
    )


RECOVERY_ACTIONS: Mapping[int, tuple[Verdict, Verb, str]] = {
    0: (Verdict.HEALTHY, Verb.NONE, "none; earlier errors still count"),
    1: (Verdict.BAD, Verb.RESET_GPU, "reset"),
    2: (Verdict.BAD, Verb.REBOOT_NODE, "reboot"),
    3: (Verdict.BAD, Verb.RESET_GPU, "drain P2P: end the job, then reset"),
    4: (Verdict.BAD, Verb.RESET_GPU, "drain and reset"),
    6: (Verdict.BAD, Verb.RESET_GPU, "bus reset"),
    7: (Verdict.BAD, Verb.REBOOT_NODE, "reboot of the system"),
}


def _recovery_row(action: int | None) -> Row:
    unknown = (Verdict.SUSPECT, Verb.ISOLATE, "an action that this table does not contain")
    verdict, verb, said = RECOVERY_ACTIONS.get(-1 if action is None else action, unknown)
    again = Verb.ISOLATE if verdict is Verdict.BAD else None
    return _row(154, verdict, verb, f"the driver's own request, outranks single Xids: {said}", again, drivers="≥ 570")


def _nvlink5_row(code: int, fatal: bool | None) -> Row:
    cards = "Blackwell and later"
    if fatal:
        said = f"{_CATALOGUE}, workflow of 144 to 150: fatal by its line"
        return _row(code, Verdict.BAD, Verb.RESET_GPU, said, Verb.ISOLATE, cards=cards)
    if fatal is False:
        said = f"{_CATALOGUE}, workflow of 144 to 150: not fatal by its line; Xid 154 states the action"
        return _row(code, Verdict.HEALTHY, Verb.NONE, said, cards=cards)
    said = f"{_CATALOGUE}, workflow of 144 to 150: severity unknown without the line"
    return _row(code, Verdict.SUSPECT, Verb.NONE, said, cards=cards)


KERNEL_ROWS: Mapping[str, Row] = {
    Kind.OFF_THE_BUS: Row(
        reason="off_the_bus",
        signal="the driver logs that a GPU has fallen off the bus, without an Xid",
        verdict=Verdict.BAD,
        verb=Verb.REBOOT_NODE,
        again=Verb.ISOLATE,
        source="the driver's own line; the same as Xid 79",
        disagree="NVSentinel and gpud count it with Xid 79",
    ),
    Kind.INIT_FAILED: Row(
        reason="gpu_init_failed",
        signal="the driver logs that it cannot initialize a GPU (RmInitAdapter failed)",
        verdict=Verdict.BAD,
        verb=Verb.REBOOT_NODE,
        again=Verb.ISOLATE,
        source="the driver's own line: no program can use the GPU",
    ),
}
"""Errors that have a line but no number."""

_OTHER_KIND = Row(
    reason="kernel_event",
    signal="an error in the kernel log that a newer agent knows",
    verdict=Verdict.SUSPECT,
    verb=Verb.ISOLATE,
    source="opt-ops: its kind is not in this table",
)

_NVLINK_VERBS: Mapping[Cause, tuple[Verdict, Verb]] = {
    Cause.CONNECTION: (Verdict.SUSPECT, Verb.ISOLATE),
    Cause.SIGNAL: (Verdict.SUSPECT, Verb.ISOLATE),
    Cause.FABRIC: (Verdict.SUSPECT, Verb.RESET_GPU),
    Cause.PARITY: (Verdict.SUSPECT, Verb.RESET_GPU),
    Cause.UNLISTED: (Verdict.SUSPECT, Verb.RESET_GPU),
    Cause.SECONDARY: (Verdict.SUSPECT, Verb.RESET_GPU),
    Cause.THRESHOLD: (Verdict.HEALTHY, Verb.NONE),
    Cause.HARMLESS: (Verdict.HEALTHY, Verb.NONE),
}


def _nvlink_row(cause: Cause, alone: bool) -> Row:
    verdict, verb = _NVLINK_VERBS[cause]
    if cause in (Cause.SECONDARY, Cause.SIGNAL) and not alone:
        verdict, verb = Verdict.HEALTHY, Verb.NONE  # the error that it came with decides
    again = Verb.ISOLATE if verb is Verb.RESET_GPU else None
    return _row(74, verdict, verb, f"NVIDIA's workflow of Xid 74, by its registers: {cause}", again, cards="Hopper")


NVLINK_ROWS = tuple(_nvlink_row(cause, alone=True) for cause in Cause)
"""What 74 of a Hopper may be."""

_WORKFLOWS: Mapping[int, Row] = {
    45: _row(45, Verdict.HEALTHY, Verb.NONE, f"{_CATALOGUE}: a consequence; handle the error that it came with"),
    48: _row(48, Verdict.BAD, Verb.ISOLATE, f"{_CATALOGUE}: 48 without 63 or 64, field diagnostic before use"),
    74: _row(
        *(
            74,
            Verdict.SUSPECT,
            Verb.RESET_GPU,
            "the Delta study: jobs often continue; AWS: reset, at the next boundary",
        ),
        Verb.ISOLATE,
        cards="before Blackwell; on Hopper by its registers",
    ),
    78: _row(78, Verdict.SUSPECT, Verb.ISOLATE, f"{_CATALOGUE}: update software or firmware"),
    154: _recovery_row(None),
    159: _row(159, Verdict.SUSPECT, Verb.RESET_GPU, f"{_CATALOGUE}: check UVM", Verb.ISOLATE),
    167: _row(167, Verdict.SUSPECT, Verb.ISOLATE, f"{_CATALOGUE}: PCIe fatal timeout, no resolution listed"),
    168: _row(168, Verdict.BAD, Verb.REBOOT_NODE, "AWS: an error in a protected region", Verb.ISOLATE),
    171: _row(171, Verdict.HEALTHY, Verb.NONE, f"{_CATALOGUE}: a detail of 48; 48 decides"),
    172: _row(172, Verdict.HEALTHY, Verb.NONE, f"{_CATALOGUE}: a detail of 48; 48 decides"),
}
