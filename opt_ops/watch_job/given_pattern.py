"""`--pattern`: a regular expression of the user's own, with named groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from opt_ops.watch_job.line_formats import Format, tokens
from opt_ops.watch_job.reading import Reading, number, positive, stamp, whole

GROUPS = ("step", "loss", "lr", "gnorm", "step_seconds", "tokens")
"""The named groups of `--pattern`."""


class PatternReader:
    """Reads lines by a regular expression with named groups. Without a step, lines are counted."""

    def __init__(self, pattern: re.Pattern[str], every: int | None) -> None:
        self._pattern = pattern
        self._every = every or 1
        self._count = 0

    def take(self, line: str, source: int = 0) -> Sequence[Reading]:  # noqa: ARG002
        """The reading of the line, if the pattern is found in it."""
        found = by_pattern(self._pattern, line)
        if found is None:
            return ()
        if found.step is None and "step" not in self._pattern.groupindex:
            self._count += 1
            found = replace(found, step=self._count * self._every)
        return (found,) if found.step is not None else ()

    def idle(self) -> Sequence[Reading]:
        """Nothing: no line is held back."""
        return ()

    end = idle


def by_pattern(pattern: re.Pattern[str], line: str) -> Reading | None:
    """What a pattern finds in a line; None if it finds no loss."""
    found = pattern.search(line)
    if found is None:
        return None
    groups = found.groupdict()
    loss = number(groups.get("loss"))
    if loss is None:
        return None
    return Reading(
        step=whole(groups.get("step")),
        loss=loss,
        lr=number(groups.get("lr")),
        gnorm=number(groups.get("gnorm")),
        step_seconds=positive(groups.get("step_seconds")),
        tokens=tokens(groups.get("tokens")),
        at=stamp(line),
    )


def pattern_format(pattern: re.Pattern[str]) -> Format:
    """The format of a pattern that the user gives."""
    return Format(
        name="--pattern",
        is_training_line=lambda line: by_pattern(pattern, line) is not None,
        reader=lambda every: PatternReader(pattern, every),
        without_steps="step" not in pattern.groupindex,
    )
