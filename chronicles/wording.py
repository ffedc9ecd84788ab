"""How the chronicle writes times, numbers and evidence. All of it is plain text; who draws it must escape it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opt_ops.core import text as words
from opt_ops.core.text import moment, printable
from opt_ops.core.values import Fault

_NAMED = 8  # so many nodes at most are listed by name

_EVIDENCE = {
    "median": "median of the band",
    "sd": "standard deviation",
    "limit": "upper end of the band",
    "loss_at_onset": "loss at the onset",
    "gnorm": "gradient norm",
    "lr": "learning rate",
    "code": "exit code",
    "failed_ranks": "number of ranks that failed",
    "seconds": "silence (s)",
    "patience": "timeout (s)",
    "blind_seconds": "seconds without a daemon",
    "epoch": "epoch of the daemon process",
    "xid": "Xid",
    "event": "kernel log reports",
    "pci": "PCI address",
    "uuid": "GPU",
    "serial": "serial number",
    "ecc_uncorrected": "uncorrected ECC errors",
    "recovery_action": "recovery action of the driver",
    "index": "GPU number",
    "error": "error:",
    "expected": "GPUs expected",
    "found": "GPUs found",
}


_VERBS: Mapping[str, str] = {
    "RESTART_APP": "restart the program",
    "RESET_GPU": "reset the GPU",
    "REBOOT_NODE": "reboot the node",
    "ISOLATE": "keep the node out until it is examined",
}
"""What has to be done about a code, in words: by `opt_ops.core.health.table.Verb`."""


def minute(ts: float) -> str:
    """`2021-11-28 18:34 UTC`, the beginning of every logbook entry."""
    return moment(ts).strftime("%Y-%m-%d %H:%M UTC")


def stamps(times: Sequence[float]) -> list[str]:
    """`2021-11-28 18:34` for each; with seconds where a neighbour has the same minute."""
    minutes = [moment(ts).strftime("%Y-%m-%d %H:%M") for ts in times]
    neighbours = zip(("", *minutes), (*minutes[1:], ""), strict=False)
    return [
        f"{at}:{moment(ts).strftime('%S')}" if at in near else at
        for ts, at, near in zip(times, minutes, neighbours, strict=False)
    ]


def day(ts: float) -> str:
    """`28 Nov, 18:34`, for the figures in large type."""
    return moment(ts).strftime("%-d %b, %H:%M")


def second(ts: float) -> str:
    """`18:34:07 UTC`, within an entry."""
    return moment(ts).strftime("%H:%M:%S UTC")


def when(ts: float | None) -> str:
    """The minute; `–` for None."""
    return "–" if ts is None else minute(ts)


def duration(seconds: float | None) -> str:
    """`4.6 s`, `46 s`, `4 min 10 s`, `3 h 12 min`, `2 d 4 h`; `–` for None."""
    return "–" if seconds is None else words.duration(seconds)


def count(number: int, noun: str) -> str:
    """`1 step`, `25 steps`."""
    return f"{whole(number)} {noun}{'' if number == 1 else 's'}"


def whole(number: int | None) -> str:
    """A step or another count, with separators from five digits on; `–` for None."""
    if number is None:
        return "–"
    return f"{number:,}" if abs(number) >= 10_000 else str(number)


def hours(number: float | None) -> str:
    """Node-hours or kilowatt-hours in three digits: `6.25`, `123,000`; `–` for None."""
    if number is None:
        return "–"
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def percent(share: float | None) -> str:
    """`57.2 %`; `–` for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def score(value: float, stderr: float | None = None) -> str:
    """A score of an evaluation: `0.543 ± 0.005`, `26.02`."""
    shown = f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 1e6 else f"{value:.4g}"
    return shown if stderr is None else f"{shown} ± {stderr:.2g}"


def rate(lr: float | None) -> str:
    """A learning rate: `6.3625e-4`, in enough digits that a factor shows; `–` for None."""
    if not lr:
        return "–" if lr is None else "0"
    mantissa, _, exponent = f"{lr:.5e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def value(item: Any) -> str:
    """Any value of an event, short."""
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, float):
        return f"{item:.4g}"
    if isinstance(item, (list, tuple)):
        return names(item)
    if isinstance(item, Mapping):
        return ", ".join(f"{key} {value(inner)}" for key, inner in item.items())
    return printable(str(item))


def names(items: Sequence[Any]) -> str:
    """`n1, n2`; `none` for no item."""
    return ", ".join(value(item) for item in items) or "none"


def nodes(items: Sequence[str]) -> str:
    """`n1, n2`; of more than eight nodes their number, `124 nodes`."""
    return names(items) if len(items) <= _NAMED else count(len(items), "node")


def evidence(fields: Mapping[str, Any]) -> tuple[str, str]:
    """What a detector measured, in words; and the log line that it read, if any."""
    known = {key: item for key, item in fields.items() if item is not None and key not in ("line", "verb", "table")}
    parts = [f"{_EVIDENCE.get(key, key.replace('_', ' '))} {_measured(key, known[key])}" for key in known]
    words = "; ".join([*parts, *_advice(fields)])
    return words, printable(str(fields.get("line") or ""))


def _advice(fields: Mapping[str, Any]) -> list[str]:
    """What the table of health codes advises: `NVIDIA's advice for Xid 79: reboot the node`."""
    from opt_ops.core.health.xids import XID_VERBS  # here, because commands that only look do without it

    verb, code = fields.get("verb"), fields.get("xid")
    if not isinstance(verb, str) or verb == "NONE":
        return []
    known = isinstance(code, int) and XID_VERBS.get(code) == verb
    of = f"NVIDIA's advice for Xid {code}" if known else "advice of the health table"
    return [f"{of}: {_VERBS.get(verb, value(verb))}"]


def drill(fault: str, arguments: Mapping[str, Any]) -> str:
    """What a drill injected: `rank 1 killed`."""
    match fault:
        case Fault.LR:
            return (
                f"learning rate × {value(arguments.get('factor'))} in {value(arguments.get('updates'))} updates "
                f"from step {value(arguments.get('from_step'))} on"
            )
        case Fault.NAN:
            return f"loss NaN at step {value(arguments.get('from_step'))}"
        case Fault.KILL_RANK:
            place = f" in the place {value(arguments['in_step'])} of a step" if arguments.get("in_step") else ""
            return f"rank {value(arguments.get('rank'))} killed{place}"
        case Fault.KILL_NODE:
            return f"all ranks on {value(arguments.get('node'))} killed"
        case Fault.KILL_PAIR:
            return f"ranks {value(arguments.get('ranks'))} killed: a rank and the one that keeps its copy"
        case Fault.SLOW_STANDBY:
            return f"processes that take the place of lost ranks wait for {value(arguments.get('seconds'))} s"
        case Fault.FLIP_BIT:
            return f"one bit flipped on rank {value(arguments.get('rank'))}"
        case Fault.XID:
            return f"Xid {value(arguments.get('xid'))} in the kernel log of {value(arguments.get('node'))}"
        case Fault.KILL_DAEMON:
            return "the daemon process killed"
        case _:
            return f"{fault} ({value(arguments)})"


def _measured(key: str, item: Any) -> str:
    return rate(item) if key == "lr" and isinstance(item, float) else value(item)


def full(text: str, keep: Sequence[str] = ()) -> str:
    """The text as a sentence: a full stop, and a capital letter unless it begins with one of the names in `keep`."""
    text = text.rstrip(" .")
    return f"{text if text.startswith(tuple(keep)) else text[:1].upper() + text[1:]}."


def short(text: str, limit: int = 120) -> str:
    """The text in one line of at most `limit` characters, for titles and tables."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def uncapitalized(text: str) -> str:
    """A title within a sentence: `Loss spike` → `loss spike`; `GPU error in a log` stays."""
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
