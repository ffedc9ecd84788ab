"""How sure an incident's cause is: by what the finding rests on, not by how often it was right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Protocol


class Confidence(StrEnum):
    """How sure a cause is."""

    CERTAIN = "certain"  # it was injected, or asked for
    HIGH = "high"  # who reports it saw it happen
    MEDIUM = "medium"  # it follows by a rule that can err
    LOW = "low"  # what happened is known, why is not


class Evidence(Protocol):
    """What a confidence rests on."""

    @property
    def evidence(self) -> Mapping[str, Any]:
        """The finding's own numbers."""
        ...

    @property
    def stacks_name_ranks(self) -> bool:
        """Whether stacks of a hang show ranks that the others waited for."""
        ...


Grounds = tuple[Confidence, str]
"""The word, and what it rests on."""


def always(word: Confidence, why: str) -> Callable[[Evidence], Grounds]:
    """The same for every incident of a class."""

    def same(_: Evidence) -> Grounds:
        return word, why

    return same


SCHEDULER = always(Confidence.HIGH, "the scheduler reports it")
PROCESS = always(Confidence.HIGH, "the process reported it as it ended")


def hang(found: Evidence) -> Grounds:
    """Of a hang: its stacks decide."""
    if found.stacks_name_ranks:
        return Confidence.MEDIUM, "the stacks show which ranks the others waited for"
    return Confidence.LOW, "no step came, and no rank stands out"


def process_death(found: Evidence) -> Grounds:
    """Of a rank that died: the last error line of its log decides."""
    if found.evidence.get("line"):
        return Confidence.MEDIUM, "the first rank that failed wrote this as it ended; the cause may lie elsewhere"
    return Confidence.LOW, "the first rank that failed is known; why it failed is not"


def corruption(found: Evidence) -> Grounds:
    """Of corrupt data: checksums prove it; whether they also name the rank decides."""
    if found.evidence.get("certain"):
        return Confidence.HIGH, "checksums of what ranks must hold alike differ, and they name the rank"
    return Confidence.MEDIUM, "checksums of what ranks must hold alike differ; which rank is wrong is not known"


def gpu_error(found: Evidence) -> Grounds:
    """Of an error of a GPU in a log: whether the words can be the program's fault decides."""
    if found.evidence.get("fault") == "unclear":
        return Confidence.LOW, "a rank's log names an error that a fault of the program causes more often than a GPU"
    return Confidence.MEDIUM, "a rank's log names a GPU error; no reading of the GPU confirms it"
