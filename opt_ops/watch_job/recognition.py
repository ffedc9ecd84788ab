"""Which format a log has, and which rank of several tells the losses.

All formats are tried on the first 1,000 lines from the first one that any of them reads. The one that reads most wins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from opt_ops.core.failures.cause_lines import clean, fingerprint
from opt_ops.watch_job.line_formats import FORMATS, Format

TRIED_LINES = 1000
LIKED_LINES = 3
_BEFORE = 127  # lines before the first that is read: the head of its block may be among them
_LONGEST_LIKED = 200  # characters that are shown

_LABEL = re.compile(r"\s{0,6}(?:\[(?:rank|default) ?(\d{1,6})\]: ?|(\d{1,6}):(?: |$))")
_WORDS = re.compile(r"loss|step|iter|epoch|update|batch|lr\b|learning|grad|norm|tok|ppl|nll|objective", re.IGNORECASE)
_NUMBERS = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A clean line, the rank of its label (None: it has none), and the log that it is of."""

    text: str
    rank: int | None = None
    source: int = 0


class Labels:
    """Takes the label of a rank from lines, as `srun --label` (`0: `) and torchrun (`[rank0]:`) write it.

    A label stands at the start of a line. What follows a carriage return in that line is the same rank's.
    """

    def __init__(self, source: int = 0) -> None:
        self._source = source
        self._rank: int | None = None

    def take(self, raw: str, starts_line: bool) -> LogLine:
        """The line without its label and without escape codes."""
        if starts_line:
            self._rank = None
        text = raw if raw.isascii() and raw.isprintable() else clean(raw)
        if starts_line and (found := _LABEL.match(text)) is not None:
            self._rank = int(found[1] or found[2])
            text = text[found.end() :]
        return LogLine(text.strip(), self._rank, self._source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognised:
    """A format that was recognised: how many lines of how many it reads, and the rank that is read."""

    format: Format
    lines: int
    of: int
    rank: int | None = None


class Recognition:
    """Tries all formats on the first lines, and keeps these lines for the reader of the format that wins."""

    def __init__(self, formats: Sequence[Format] = FORMATS) -> None:
        self.formats = formats
        self.tried = 0  # lines in all
        self._kept: list[LogLine] = []
        self._counts: Counter[tuple[int, int | None]] = Counter()  # (place in formats, rank) → lines
        self._liked: dict[str, tuple[int, int, str]] = {}  # fingerprint → score, number, text

    def take(self, line: LogLine) -> None:
        """Try all formats on a line."""
        self.tried += bool(line.text)
        matches = [place for place, each in enumerate(self.formats) if each.is_training_line(line.text)]
        for place in matches:
            self._counts[place, line.rank] += 1
        if not self._counts:
            self._kept = [*self._kept[-_BEFORE:], line]
            self._like(line.text)
        else:
            self._kept.append(line)

    @property
    def enough(self) -> bool:
        """Whether so many lines were tried that the best format is taken."""
        return bool(self._counts) and len(self._kept) >= TRIED_LINES

    @property
    def found(self) -> Recognised | None:
        """The best format by now; None if none reads any line."""
        if not self._counts:
            return None
        by_format: Counter[int] = Counter()
        for (place, _), lines in self._counts.items():
            by_format[place] += lines
        best = min(by_format, key=lambda place: (-by_format[place], place))
        ranks = {rank: lines for (place, rank), lines in self._counts.items() if place == best}
        rank = min(ranks, key=lambda each: (-ranks[each], -1 if each is None else each))
        return Recognised(format=self.formats[best], lines=by_format[best], of=self.tried, rank=rank)

    def kept(self) -> Sequence[LogLine]:
        """The lines that were kept, once."""
        kept, self._kept = self._kept, []
        return kept

    @property
    def liked(self) -> Sequence[str]:
        """The lines that look most like a training line, best first, each kind once."""
        best = sorted(self._liked.values(), key=lambda each: (-each[0], each[1]))[:LIKED_LINES]
        return [text for _, _, text in best]

    def _like(self, text: str) -> None:
        numbers = len(_NUMBERS.findall(text[:2000]))
        words = len({found.lower() for found in _WORDS.findall(text[:2000])})
        score = 3 * words + min(numbers, 6) if words and numbers else min(numbers, 2)
        if not text:
            return
        kind = fingerprint(text[:2000])
        known = self._liked.get(kind)
        if known is None or score > known[0]:
            self._liked[kind] = (score, self.tried, text[:_LONGEST_LIKED])
        if len(self._liked) > 64:
            worst = min(self._liked, key=lambda each: (self._liked[each][0], -self._liked[each][1]))
            del self._liked[worst]
