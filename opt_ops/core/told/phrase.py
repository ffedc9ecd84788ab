"""What sentences are made of: names, counts, times, and quotations of untrusted text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opt_ops.core.text import count, moment, printable
from opt_ops.core.told.words import without_codes

LONGEST = 160  # characters of a sentence
QUOTED = 80  # characters of a quotation
_NAMED = 4  # names that are listed; more are counted
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+=,-]{0,63}")  # of a node, job, run, person or recipe
_BRACKETS = str.maketrans("{}[]", "()()")
_QUOTES = str.maketrans("“”", '""')  # within a quotation
_OF_PYTHON = re.compile(r"None|True|False|Decimal\(")


class Forms(NamedTuple):
    """An event in two tenses: `past` is the whole sentence; `would`, `verb` and `rest` make the other one."""

    past: str
    verb: str
    rest: str


def acts(verb: str, rest: str, past: str = "") -> Forms:
    """Forms of a decision or intent: `start`, `1.00-a2 on n1` → `starts 1.00-a2 on n1`.

    Args:
        verb: In its base form.
        rest: What follows it.
        past: The verb of the other tense, where an `s` does not make it.
    """
    return Forms(f"{past or verb + 's'} {rest}".rstrip(), verb, rest)


def seen(sentence: str) -> Forms:
    """Forms of an observation."""
    return Forms(sentence, "see", f"that {sentence}")


def plain(text: str) -> str:
    """Text for a sentence, outside of quotation marks of ours."""
    return clean(text.translate(_QUOTES))


def clean(text: str) -> str:
    """Text in one line without control characters, and without signs, words and codes that only programs use."""
    line = printable(" ".join(text.split())).translate(_BRACKETS)
    return without_codes(_OF_PYTHON.sub(lambda found: found[0].lower(), line))


def quoted(text: str, longest: int = QUOTED) -> str:
    """Untrusted text in quotation marks: one line, at most `longest` characters."""
    return f"“{cut(plain(text), longest)}”"


def cut(text: str, longest: int) -> str:
    """The text, with an ellipsis where the end is missing. A quotation that is cut is closed."""
    if len(text) <= longest:
        return text
    short = text[: longest - 2].rstrip() + "…"
    return short + "”" if short.count("“") > short.count("”") else short


def name(text: str) -> str:
    """A name as it is; one with unusual characters in quotation marks."""
    return plain(text) if _NAME.fullmatch(text) else quoted(text)


def after(lead: str, text: str) -> str:
    """`lead` and the quotation; nothing if there is no text."""
    return f"{lead}{quoted(text)}" if text.strip() else ""


def because(text: str, lead: str = ": ", longest: int = LONGEST) -> str:
    """`lead` and a text of ours, not quoted; nothing if there is no text."""
    return f"{lead}{cut(plain(text), longest)}" if text.strip() else ""


def listed(names: Iterable[str], noun: str = "node") -> str:
    """`n1, n2`; of many, their number."""
    known = list(names)
    if not known or len(known) > _NAMED:
        return count(len(known), noun)
    return ", ".join(map(name, known))


def counted(numbers: Sequence[int]) -> str:
    """`25 and 50`, `25, 50 and 75`."""
    words = [f"{number:,}" for number in numbers]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def figure(number: float, digits: int = 4) -> str:
    """A number in so many digits: `6.53`, `0.000668603`."""
    return f"{number:.{digits}g}"


def number_in(evidence: Mapping[str, Any], key: str) -> float | None:
    """A finite number of the evidence; None if it holds none."""
    found = evidence.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        return float(found) if math.isfinite(found) else None
    except OverflowError:
        return None


def hour(ts: float) -> str:
    """`22 Nov, 14:20` in UTC."""
    return moment(ts).strftime("%-d %b, %H:%M")
