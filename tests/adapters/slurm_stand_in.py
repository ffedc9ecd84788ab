"""Stands in for Slurm's commands: it answers `-o`, `-O` and `-P` with any field, from one record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opt_ops.errors import NotYet, SchedulerUnavailable

# squeue's and sinfo's fields by their letter, and sacct's by name.
LETTERS = {"i": "job", "T": "state", "N": "nodes", "e": "ends", "r": "reason", "j": "name", "V": "submitted", "k": ""}
NAMES = {"State": "state", "NodeList": "nodes", "Reason": "reason", "Submit": "submitted", "JobName": "name"}


@dataclass
class Answer:
    """What a command prints: records of fields, or an error."""

    records: list[dict[str, str]] = field(default_factory=list)
    error: str = ""


@dataclass
class StandIn:
    """A controller and its accounts; `ask` takes the place of the function that runs commands."""

    squeue: Answer = field(default_factory=Answer)
    sacct: Answer = field(default_factory=Answer)
    nodes: list[tuple[str, str, str]] = field(default_factory=list)
    preempted: str = "N/A"

    def ask(self, *command: str, may_fail: str = "") -> list[str]:
        if command[0] == "scontrol":
            return re.sub(r"\[(\d+)-(\d+)\]", _range, command[-1]).split(",")
        if command[0] == "sinfo":
            return ["|".join(row) for row in self.nodes]
        if "-O" in command:
            return [self.preempted]
        answer = self.sacct if command[0] == "sacct" else self.squeue
        if answer.error:
            raise SchedulerUnavailable(f"{command[0]}: {answer.error}")
        form = command[command.index("-o") + 1]
        keys = (
            [NAMES[name] for name in form.split(",")] if "," in form else [LETTERS[x] for x in re.findall("%(.)", form)]
        )
        return ["|".join(record.get(key, "") for key in keys) for record in answer.records]


def _range(found: re.Match[str]) -> str:
    first, last = found.groups()
    prefix = found.string[: found.start()]
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return f",{prefix}".join(numbers)


def insist(ask: Callable[[], Any]) -> Any:
    """Ask until there is an answer."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask()
        except NotYet:
            assert time.monotonic() < deadline
            time.sleep(0.02)
