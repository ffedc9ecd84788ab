"""Progress bars of tqdm in logs: those of Lightning tell the loss, those of Hugging Face's Trainer tell the step.

tqdm draws a bar again and again, each time behind a carriage return. A line that is printed meanwhile erases the bar
(a line of spaces), and the bar is drawn again right behind it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from opt_ops.watch_job.reading import NUMBER, Reading, number

_BAR = re.compile(
    r"(?:(?P<percent>\d{1,3})%)?\|[^|]{0,400}\| *(?P<n>\d{1,12})/(?P<total>\d{1,12}|\?) "
    r"\[(?P<elapsed>(?:\d+ days?, ?)?[\d:]{4,12})<(?P<left>[^,\]]*)(?P<rest>[^\]]*)\]?"
)
_NO_TOTAL = re.compile(r":\s*(?P<n>\d{1,12})it \[(?P<elapsed>[\d:]{4,12}), *(?P<rest>[^\]]*)\]?")
_RATE = re.compile(r"([\d.]+)\s?(it/s|s/it)")
_NOT_TRAINING = re.compile(r"valid|sanity|test|predict|eval", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One drawing of a bar."""

    name: str  # what stands before it
    n: int
    total: int | None
    elapsed: float | None  # seconds
    step_seconds: float | None
    rest: str  # what stands behind the rate


def bar(line: str) -> Bar | None:
    """The bar in a line; None if there is none."""
    found = _BAR.search(line) if "/" in line and "|" in line else _NO_TOTAL.search(line) if "it [" in line else None
    if found is None:
        return None
    groups = found.groupdict()
    rate = _RATE.search(groups["rest"])
    value = number(rate[1]) if rate else None
    seconds = None if not value or rate is None else (1 / value if rate[2] == "it/s" else value)
    total = groups.get("total")
    return Bar(
        name=line[: found.start()].strip(" :"),
        n=int(groups["n"]),
        total=int(total) if total and total != "?" else None,
        elapsed=_seconds(groups["elapsed"]),
        step_seconds=seconds,
        rest=groups["rest"],
    )


def _seconds(text: str) -> float | None:
    days, _, clock = text.rpartition(",")
    seconds = 0.0
    for part in (clock or text).strip().split(":"):
        if not part.isdigit():
            return None
        seconds = 60 * seconds + int(part)
    return seconds + (86400 * int(days.split()[0]) if days else 0.0)


# ---- Lightning, and other loops that show the loss behind a bar

_EPOCH = re.compile(r"\bepoch[ :=]*(\d{1,7})", re.IGNORECASE)
_POSTFIX = re.compile(rf"([\w/.-]{{1,64}})=\s*({NUMBER})")
_LOSSES = ("loss", "train_loss", "train_loss_step", "train/loss", "train/loss_step", "loss_step", "training_loss")
_NO_LOSS = re.compile(r"^(?:val|valid|validation|test|eval)(?:[_/.-]|$)|_epoch$|scale", re.IGNORECASE)
_RATES = ("lr", "learning_rate")
_NORMS = ("grad_norm", "gnorm", "grad_2.0_norm_total", "train/grad_norm")


def _measures(shown: Bar) -> Mapping[str, str]:
    return dict(_POSTFIX.findall(shown.rest))


def _loss_name(measures: Mapping[str, str]) -> str | None:
    known = next((name for name in _LOSSES if name in measures), None)
    others = (name for name in measures if "loss" in name.lower() and not _NO_LOSS.search(name))
    return known or next(others, None)


def is_lightning_line(line: str) -> bool:
    """Whether a line is a bar of training with a loss behind it."""
    shown = bar(line) if "loss" in line else None
    return shown is not None and not _NOT_TRAINING.search(shown.name) and _loss_name(_measures(shown)) is not None


class LightningReader:
    """`Epoch 0:  12%|█▏        | 120/1000 [00:30<03:40,  4.00it/s, v_num=3, train_loss=3.410]`.

    One update is drawn several times, first with the loss of the one before: the last drawing counts. A drawing of an
    earlier update is a slower rank's, unless its clock began again: then the job did.
    """

    def __init__(self, _every: int | None = None) -> None:
        self._shown: Reading | None = None
        self._place: tuple[int, int] | None = None  # epoch and position of the newest drawing
        self._clocks: dict[int, float] = {}  # by epoch: the longest time on its bar
        self._lengths: dict[int, int] = {}  # by epoch: its updates

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:  # noqa: ARG002
        """Take in a drawing. The update before it is whole when another one is drawn."""
        shown = bar(line) if "=" in line else None
        if shown is None or _NOT_TRAINING.search(shown.name) or shown.n == 0:
            return ()
        measures = _measures(shown)
        name = _loss_name(measures)
        if name is None:
            return ()
        epoch = int(found[1]) if (found := _EPOCH.search(shown.name)) else 0
        place = (epoch, shown.n)
        if self._place is not None and place < self._place and not self._begins_again(epoch, shown.elapsed):
            return ()
        done = self.end() if place != self._place else ()
        if self._place is not None and place < self._place:
            self._clocks = {}
        self._place = place
        self._clocks[epoch] = shown.elapsed or 0.0
        self._lengths[epoch] = max(self._lengths.get(epoch, 0), shown.total or shown.n)
        before = sum(length for each, length in self._lengths.items() if each < epoch)
        missing = max(0, epoch - sum(each < epoch for each in self._lengths))  # epochs from before the log begins
        self._shown = Reading(
            step=before + missing * (shown.total or 0) + shown.n,
            loss=number(measures[name]),
            lr=next((number(measures[each]) for each in _RATES if each in measures), None),
            gnorm=next((number(measures[each]) for each in _NORMS if each in measures), None),
            step_seconds=shown.step_seconds,
        )
        return done

    def _begins_again(self, epoch: int, elapsed: float | None) -> bool:
        """Whether the bar's clock shows that the job began again."""
        known = self._clocks.get(epoch)
        return known is None or elapsed is None or known < 4 or elapsed < known / 2

    def idle(self) -> Sequence[Reading]:
        """The newest drawing: nothing more is known of this update now."""
        return self.end()

    def end(self) -> Sequence[Reading]:
        """The newest drawing."""
        shown, self._shown = self._shown, None
        return (shown,) if shown is not None else ()


# ---- Hugging Face's Trainer

_DICT = re.compile(r"\{'[\w/.-]{1,80}': ")  # as Python prints it; JSON has other quotes
_ITEM = re.compile(r"'([\w/.-]{1,80})': ('[^']{0,64}'|[^,'\"{}\[\]]{1,64})")
_MOST_WAITING = 4096


def _items(line: str) -> Mapping[str, str]:
    start = _DICT.search(line)
    return dict(_ITEM.findall(line[start.start() :])) if start else {}


def is_transformers_line(line: str) -> bool:
    """Whether a line is what the Trainer logs of training: `{'loss': …, 'epoch': …}`, not of an evaluation."""
    return "loss" in line and "epoch" in line and _is_training(_items(line))


def _is_training(items: Mapping[str, str]) -> bool:
    return number(items.get("loss")) is not None and "epoch" in items and "train_runtime" not in items


class TransformersReader:
    """`{'loss': '3.412', 'grad_norm': '0.8123', 'learning_rate': '0.0005912', 'epoch': '0.12'}`, which has no step.

    The bar that is drawn again right behind the line has it. Where lines and bars are in two files, or lines are
    buffered, the bar is drawn again behind white space that erased it: such bars and lines wait for each other, in
    their order. Where there is no bar, lines are counted: `every` updates each.
    """

    def __init__(self, every: int | None = None) -> None:
        self._every = every
        self._lines: deque[Reading] = deque()
        self._steps: deque[int] = deque(maxlen=_MOST_WAITING)  # of bars that were drawn behind a line
        self._total: int | None = None  # of the bar of training
        self._before: tuple[str, int] = ("", 0)  # what came last (line, erased, bar), and from which log
        self._together = False  # whether bars follow their lines in the same log
        self._last = 0  # step of the newest line
        self._spacing = every
        self._alike = 0  # lines in a row with this spacing
        self._clock: float | None = None
        self._rate: float | None = None
        self._epochs: tuple[float, float] = (0.0, 0.0)  # of the newest line, and how many one update is
        self._quiet = 0

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:
        """Take in a line or a bar."""
        self._quiet = 0
        if not line:
            self._before = ("erased", source)
            return ()
        items = _items(line)
        if items:
            self._before = ("line", source)
            if _is_training(items):
                self._add(items)
                if len(self._lines) > _MOST_WAITING:
                    return self.end()
            return self._paired()
        shown = bar(line)
        return self._drawn(shown, source) if shown is not None else ()

    def _add(self, items: Mapping[str, str]) -> None:
        self._lines.append(
            Reading(
                loss=number(items["loss"]),
                gnorm=number(items.get("grad_norm")),
                lr=number(items.get("learning_rate")),
                step_seconds=self._rate,
                at=number(items.get("epoch")),  # kept here until the step is known
            )
        )

    def _drawn(self, shown: Bar, source: int) -> Sequence[Reading]:
        before, self._before = self._before, ("bar", source)
        if shown.total is None or (shown.name and shown.name != "Training"):
            return ()
        if self._total is None or (shown.total > self._total and shown.n == 0):
            self._total = shown.total
        if shown.total != self._total:
            return ()  # of an evaluation
        if self._clock is not None and shown.elapsed is not None and shown.elapsed < self._clock / 2:
            self._steps.clear()  # the job began again
            self._last = self._alike = 0
        self._clock, self._rate = shown.elapsed, shown.step_seconds
        if before == ("line", source) and not self._together:
            self._together = True
            self._steps.clear()
        behind = before == ("line" if self._together else "erased", source)
        known = self._steps[-1] if self._steps else self._last
        if behind and shown.n > known and not self._is_odd(shown.n):
            self._steps.append(shown.n)
        return self._paired()

    def _is_odd(self, step: int) -> bool:
        """Whether a bar between two lines was drawn behind an evaluation's bar that was erased."""
        spacing = self._spacing or 1
        return not self._together and self._alike >= 3 and self._last % spacing == 0 and step % spacing != 0

    def _paired(self) -> Sequence[Reading]:
        """The lines whose bar was drawn."""
        found: list[Reading] = []
        while self._lines and self._steps:
            step = self._steps.popleft()
            if self._together:  # lines before it that no bar followed were logged in one update, or are counted
                while len(self._lines) > 1:
                    spacing = self._spacing or 1
                    earlier = max(self._last + 1, step - spacing * (len(self._lines) - 1))
                    found.append(self._with_step(self._lines.popleft(), earlier))
            found.append(self._with_step(self._lines.popleft(), step))
        return found

    def _with_step(self, line: Reading, step: int) -> Reading:
        epoch = line.at or 0.0
        if epoch > 0 and step > 0:
            self._epochs = (epoch, epoch / step)
        if step > self._last and self._every is None:
            self._alike = self._alike + 1 if step - self._last == self._spacing else 0
            self._spacing = step - self._last
        self._last = step
        return replace(line, step=step, at=None, steps=self._total)

    def idle(self) -> Sequence[Reading]:
        """Lines that no bar will explain: there is none, or none was drawn behind them for three turns."""
        self._quiet += 1
        return self.end() if self._total is None or self._quiet >= 3 else ()

    def end(self) -> Sequence[Reading]:
        """All lines; those without a bar are counted."""
        found = [*self._paired()]
        while self._lines:
            line = self._lines.popleft()
            found.append(self._with_step(line, self._counted(line.at or 0.0)))
        return found

    def _counted(self, epoch: float) -> int:
        """The step of a line without a bar: one line further, unless the epoch shows that the job began again."""
        spacing = self._spacing or 1
        last_epoch, per_step = self._epochs
        if 0.0 < epoch < last_epoch * 0.999 and per_step > 0:
            return max(spacing, round(epoch / per_step / spacing) * spacing)
        return self._last + spacing
