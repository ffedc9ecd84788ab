"""Words of the story: numbers, durations and days as a person writes them, and names of failures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from chronicles.wording import duration, whole
from opt_ops.core.failures.classes import AlertSignal, FailureClass, title
from opt_ops.core.text import moment

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_TEN_MINUTES = 600.0

_NOUNS: Mapping[str, tuple[str, str]] = {
    FailureClass.LOSS_SPIKE: ("loss spike", "loss spikes"),
    FailureClass.LOSS_DRIFT: ("loss drift", "loss drifts"),
    FailureClass.NON_FINITE_LOSS: ("loss that was not finite", "losses that were not finite"),
    FailureClass.LOSS_SCALE_FLOOR: ("loss scale at its floor", "loss scales at their floor"),
    FailureClass.LOSS_TOO_LOW: ("loss that was too low", "losses that were too low"),
    FailureClass.BAD_RESTORE: ("bad restore", "bad restores"),
    FailureClass.UNPLANNED_LR: ("unplanned learning rate", "unplanned learning rates"),
    FailureClass.UNDECLARED_CHANGE: ("undeclared change", "undeclared changes"),
    FailureClass.BAD_GPU: ("bad GPU", "bad GPUs"),
    FailureClass.GPU_ERROR: ("GPU error in a log", "GPU errors in logs"),
    FailureClass.SILENT_NODE: ("silent node", "silent nodes"),
    FailureClass.SILENT_DATA_CORRUPTION: ("silent data corruption", "silent data corruptions"),
    FailureClass.STRAGGLER: ("slow rank", "slow ranks"),
    FailureClass.THROUGHPUT_DROP: ("throughput drop", "throughput drops"),
    FailureClass.HANG: ("hang", "hangs"),
    FailureClass.PROCESS_DEATH: ("dead rank", "dead ranks"),
    FailureClass.OUT_OF_MEMORY: ("rank out of memory", "ranks out of memory"),
    FailureClass.COMMUNICATION: ("lost connection", "lost connections"),
    FailureClass.UNKNOWN: ("unexplained failure", "unexplained failures"),
    FailureClass.CHECKPOINT_REFUSED: ("damaged checkpoint", "damaged checkpoints"),
    FailureClass.LAST_CHECKPOINT: ("last checkpoint in doubt", "last checkpoints in doubt"),
    FailureClass.STORAGE: ("storage failure", "storage failures"),
    FailureClass.USER_ERROR: ("rejected setting", "rejected settings"),
    FailureClass.ALLOCATION_LOST: ("lost allocation", "lost allocations"),
    FailureClass.TIME_LIMIT: ("time limit", "time limits"),
    FailureClass.PREEMPTION: ("preemption", "preemptions"),
    FailureClass.SUSPENDED: ("suspended job", "suspended jobs"),
    FailureClass.NODES_RETURNED: ("growth to more nodes", "growths to more nodes"),
    FailureClass.JOB_CANCELLED: ("cancelled job", "cancelled jobs"),
    FailureClass.DAEMON_RESTART: ("restart of the daemon", "restarts of the daemon"),
    FailureClass.OPERATOR: ("request", "requests"),
    AlertSignal.GRADIENT_NORM: ("jump of the gradient norm", "jumps of the gradient norm"),
    AlertSignal.SAVE_FAILED: ("failed save", "failed saves"),
}


def noun(kind: str, number: int = 1) -> str:
    """A failure class as a countable noun: `silent node`, `silent nodes`."""
    known = _NOUNS.get(kind) or (title(kind).lower(), f"{title(kind).lower()} (several)")
    return known[0] if number == 1 else known[1]


def number_word(number: int) -> str:
    """`four`; from 13 on in digits."""
    return _NUMBERS[number] if 0 <= number < len(_NUMBERS) else whole(number)


def counted(kind: str, number: int) -> str:
    """`four bad GPUs`."""
    return f"{number_word(number)} {noun(kind, number)}"


def an(kind: str) -> str:
    """`a bad GPU`, `an unexplained failure`."""
    name = noun(kind)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def ordinal(number: int) -> str:
    """`third`; from the eleventh on in digits: `11th`, `21st`."""
    if 0 < number < len(_ORDINALS):
        return _ORDINALS[number]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def plural(number: int, one: str, many: str = "") -> str:
    """`one restart`, `four restarts`, `16 restarts`."""
    return f"{number_word(number)} {one if number == 1 else many or one + 's'}"


def about(seconds: float) -> str:
    """A duration without more digits than matter: no seconds from ten minutes on, no minutes from two days on."""
    if seconds < _TEN_MINUTES:
        return duration(round(seconds) if seconds >= 10 else seconds).replace(" min 0 s", " min")
    return duration(60 * round(seconds / 60)).replace(" 0 s", "").replace(" 0 min", "")


def between(low: float, high: float) -> str:
    """`1 min 24 s`, `1 min 24 s to 1 min 51 s`."""
    first, last = about(low), about(high)
    return first if first == last else f"{first} to {last}"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def tallied(kinds: Iterable[str]) -> str:
    """`four bad GPUs and two silent nodes`, the commonest first."""
    tally = Counter(kinds)
    return listed([counted(kind, number) for kind, number in tally.most_common()])


def day(ts: float, year: bool = False) -> str:
    """`18 November`."""
    return moment(ts).strftime("%-d %B %Y" if year else "%-d %B")


def days(begin: float, end: float) -> str:
    """`18 November`, `24 to 26 November`, `29 November to 2 December`."""
    first, last = day(begin), day(end)
    if first == last:
        return first
    same = moment(begin).month == moment(end).month and moment(begin).year == moment(end).year
    return f"{moment(begin).day} to {last}" if same else f"{first} to {last}"


_NAME = re.compile(r"[a-z]+[\w.-]*\d")


def capital(text: str) -> str:
    """The text with a capital letter; the name of a node at its beginning stays."""
    return text if _NAME.match(text) else text[:1].upper() + text[1:]
