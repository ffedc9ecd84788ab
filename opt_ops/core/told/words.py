"""Words for codes: failure classes, causes, reasons of verdicts, actions. Journals and JSON keep the codes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from opt_ops.core.failures.causes import CAUSES, Cause
from opt_ops.core.failures.classes import ROWS, AlertSignal, title
from opt_ops.core.failures.xid_names import XID_NAMES
from opt_ops.core.values import Action

_REASONS: Mapping[str, str] = {
    "ok": "nothing is wrong",
    "allowed_again": "an operator allowed it again",
    "not_heard_of": "nothing is known of it yet",
    "recovery_action": "the driver asks for a reset or a reboot",
    "gpu_lost": "the driver no longer finds a GPU",
    "reset_required": "the driver wants a GPU to be reset",
    "sram_threshold": "too many uncorrectable errors in the SRAM of a GPU",
    "sram_errors": "uncorrectable errors in the SRAM of a GPU",
    "remap_failed": "a row of GPU memory could not be remapped",
    "remap_pending": "a row of GPU memory waits for a reset to be remapped",
    "remapped_rows": "too many rows of GPU memory were remapped",
    "retired_pages": "too many pages of GPU memory are retired",
    "retired_pending": "a page of GPU memory waits for a reset to be retired",
    "ecc_uncorrected": "an uncorrected ECC error",
    "ecc_corrected": "many corrected ECC errors",
    "ecc_aggregate": "uncorrected ECC errors in the life of a GPU",
    "ecc_off": "ECC is off",
    "gpu_unreadable": "a GPU cannot be read",
    "gpu_changed": "a GPU was exchanged",
    "gpu_missing": "a GPU is missing",
    "gpu_init_failed": "the driver cannot initialize a GPU",
    "off_the_bus": "a GPU has fallen off the bus",
    "known_bad_gpu": "it has a GPU that failed before",
    "kernel_event": "an error in the kernel log",
    "power_brake": "the power brake limits the clocks",
    "thermal_slowdown": "heat limits the clocks",
    "hw_slowdown": "the hardware limits the clocks",
    "too_hot": "a GPU is too hot",
    "memory_too_hot": "the memory of a GPU is too hot",
    "left_over": "processes of others are left on a GPU",
    "fabric": "the GPU fabric is not ready",
    "nvlink_down": "an NVLink is down",
    "nvlink_errors": "errors on an NVLink",
    "pcie_width": "a PCIe link is too narrow",
    "pcie_generation": "a PCIe link is too slow",
    "pcie_replays": "many replays on a PCIe link",
    "persistence_off": "persistence mode is off",
    "port_down": "an InfiniBand port is down",
    "port_flaps": "an InfiniBand port goes up and down",
    "carrier_lost": "a network interface has lost its carrier",
    "mount_lost": "a file system is no longer mounted",
    "mount_read_only": "a file system is read-only",
    "clock_unset": "the clock is not synchronized",
    "disk_low": "the disk is nearly full",
    "driver_differs": "its driver version differs from that of the other nodes",
    "vbios_differs": "the VBIOS of a GPU differs from the others",
    "inforom_differs": "the InfoROM of a GPU differs from the others",
    "clock_differs": "the highest clock of a GPU differs from the others",
    "time_differs": "its clock differs from that of the other nodes",
    "burning_in": "its burn-in runs",
    "silent": "no heartbeat comes",
    "unheard": "no heartbeat of any node is read",
    "nvml_absent": "no NVML on this machine",
    "nvml_hung": "NVML hangs",
    "nvml_crashed": "NVML ends its process again and again",
}
"""By reason code of the health table."""

_ACTIONS: Mapping[Action, str] = {
    Action.REPLACE_RANKS: "replace the lost ranks in place",
    Action.RESTART: "restart",
    Action.ROLLBACK: "roll back",
    Action.RECONFIGURE: "change settings",
    Action.EXCLUDE: "exclude the node, training goes on",
    Action.ADOPT: "take over the running attempt",
    Action.NOTIFY: "page a person, training goes on",
    Action.HALT: "stop and page a person",
    Action.COMPLETE: "complete the lineage",
}

_PREFIXES: Mapping[str, str] = {
    "burn_in": "in a burn-in: ",
    "slurm": "Slurm says: ",
    "nvml": "NVML fails: ",
}

_SIGNALS = frozenset(AlertSignal)
_CODE = re.compile(r"(?<![\w.:/])[a-z]+\d*(?:_[a-z0-9]+)+(?![\w/])(?!\.\w)")


def failure(kind: str) -> str:
    """A failure class or an alert's signal within a sentence: `loss_spike` → `loss spike`."""
    words = title(kind)
    return words[:1].lower() + words[1:] if words[1:2].islower() else words


def cause(word: str) -> str:
    """A cause of trouble with the loss: `lr_too_high` → `the learning rate is too high`."""
    return CAUSES[Cause(word)] if word in CAUSES else word.replace("_", " ")


def action(word: str) -> str:
    """What a playbook does: `replace_ranks` → `replace the lost ranks in place`."""
    return _ACTIONS[Action(word)] if word in _ACTIONS else word.replace("_", " ")


def reason(code: str) -> str:
    """A reason of a verdict: `xid_79` → `a GPU has fallen off the bus (Xid 79)`; other text as it is, without codes."""
    return _reason(code) or without_codes(code)


def _reason(code: str) -> str | None:
    if code in _REASONS:
        return _REASONS[code]
    if (numbered := re.fullmatch(r"(s?)xid_(\d{1,6})", code)) is not None:
        return _numbered(bool(numbered[1]), int(numbered[2]))
    for prefix, words in _PREFIXES.items():
        if code.startswith(f"{prefix}_"):
            return words + code.removeprefix(f"{prefix}_").replace("_", " ")
    return None


def _numbered(switch: bool, code: int) -> str:
    if switch:
        return f"an NVSwitch error (SXid {code})"
    words = XID_NAMES.get(code)
    if words is None:
        return f"Xid {code}"
    return f"{'a ' if words.startswith('GPU has') else ''}{words} (Xid {code})"


def without_codes(text: str) -> str:
    """A sentence of ours with words in place of codes: `n2: xid_79` → `n2: a GPU has fallen off the bus (Xid 79)`."""
    return _CODE.sub(lambda found: _word(found[0]), text)


def _word(code: str) -> str:
    if code in ROWS or code in _SIGNALS:
        return failure(code)
    if code in CAUSES:
        return cause(code)
    if code in _ACTIONS:
        return action(code)
    return _reason(code) or code
