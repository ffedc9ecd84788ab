"""What a Slurm site has, asked before anything is requested: partitions with their nodes and limits, and accounts.

Only what Slurm says for certain is an objection. Where it does not answer, nothing is known and nothing is refused.
"""

from __future__ import annotations

import getpass
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from opt_ops.adapters.slurm.command import ask
from opt_ops.errors import SchedulerUnavailable

_ANSWER_SECONDS = 10.0  # of a person's time, for each command


@dataclass(frozen=True, slots=True)
class Objection:
    """Why Slurm cannot run what is wanted, and what to do next."""

    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class _Partition:
    nodes: int
    minutes: float
    most_nodes: float


def objections(nodes: int, minutes: int, partition: str | None, account: str | None) -> Iterator[Objection]:
    """Why this site can never run a job of `nodes` nodes and `minutes`.

    Args:
        nodes: Nodes of one job.
        minutes: Its time limit.
        partition: One, several with commas between, or None for the site's default.
        account: None for the user's default.

    Raises:
        SchedulerUnavailable: Slurm does not answer.
    """
    known, default = _partitions()
    wanted = [name for name in (partition or default).split(",") if name]
    unknown = [name for name in wanted if name not in known]
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        there = f"did you mean {near[0]}?" if near else f"Slurm has {', '.join(known) or 'none'}"
        yield Objection(f"Slurm has no partition {name}; {there}", "correct `partition` of [slurm] in opt-ops.toml")
    if wanted and not unknown:
        yield from _too_much([known[name] for name in wanted], ",".join(wanted), nodes, minutes)
    if account is not None:
        yield from _account(account)


def _too_much(partitions: Sequence[_Partition], names: str, nodes: int, minutes: int) -> Iterator[Objection]:
    have, allowed = max(each.nodes for each in partitions), max(each.most_nodes for each in partitions)
    longest = max(each.minutes for each in partitions)
    if nodes > have:
        yield Objection(f"partition {names} has {have} nodes; {nodes} are wanted", "give fewer --nodes or --spares")
    elif nodes > allowed:
        yield Objection(
            f"a job in partition {names} may have {allowed:g} nodes; {nodes} are wanted",
            "give fewer --nodes or --spares",
        )
    if minutes > longest:
        yield Objection(
            f"time_minutes = {minutes} is above the limit of partition {names}, {longest:g} minutes",
            "lower `time_minutes` of [slurm] in opt-ops.toml: opt-ops asks for the next allocation in time",
        )


def _partitions() -> tuple[Mapping[str, _Partition], str]:
    """All partitions, and the default one; "" if there is none."""
    found: dict[str, _Partition] = {}
    default = ""
    for line in _ask("sinfo", "-a", "-h", "-o", "%P|%D|%l|%s"):
        columns = line.split("|")
        if len(columns) != 4 or not columns[1].strip().isdecimal():
            raise SchedulerUnavailable(f"sinfo reports {line!r}, which does not answer the question")
        name, nodes = columns[0].strip().removesuffix("*"), int(columns[1])
        default = name if columns[0].strip().endswith("*") else default
        before = found[name].nodes if name in found else 0
        found[name] = _Partition(before + nodes, _minutes(columns[2]), _most(columns[3]))
    return found, default


def _minutes(text: str) -> float:
    """Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS; without end where it is another word."""
    days, dash, clock = text.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in [*parts, *([days] if dash else [])]) or len(parts) < 2:
        return math.inf
    hours, minutes, seconds = ([0] * (3 - len(parts)) + [int(part) for part in parts])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def _most(text: str) -> float:
    """The largest job of `1-64` or `1-infinite`, in nodes."""
    most = text.strip().rpartition("-")[2]
    return int(most) if most.isdecimal() else math.inf


def _account(account: str) -> Iterator[Objection]:
    """Whether the user may use an account. A site without accounting, or that does not enforce it, takes any."""
    try:
        enforced = [line for line in _ask("scontrol", "show", "config") if line.startswith("AccountingStorageEnforce ")]
        if not any("associations" in line or "all" in line.partition("=")[2] for line in enforced):
            return
        lines = _ask("sacctmgr", "-n", "-P", "show", "assoc", f"user={getpass.getuser()}", "format=account")
    except (SchedulerUnavailable, OSError, KeyError):
        return
    mine = sorted({line.strip() for line in lines if line.strip()})
    if mine and account not in mine:
        yield Objection(
            f"you may not use the account {account}; yours: {', '.join(mine)}",
            "correct `account` of [slurm] in opt-ops.toml",
        )


def _ask(*command: str) -> list[str]:
    return ask(*command, seconds=_ANSWER_SECONDS)
