"""How often each GPU and each node has failed for the time that it was used: a projection of the journals.

A GPU is its UUID and serial number, wherever it is now; a node is its name. What counts are incidents that name the
node, and the GPU where their evidence names one; drills count nowhere. Exposure is the time of attempts on the node.

The *lemon score* of a part says how surprising its failures are if it were like the others: −log₁₀ of the probability
of as many or more under a Poisson process with the others' rate. Meta counts a node's failures, exclusions and Xids
over 28 days and removes those that stand out (lemon nodes, arXiv 2410.21680); the test against the others' rate is
ours. So that few observations prove little, the others' rate is mixed with one failure in 8,090 GPU-hours, which is
Meta's 7.9 hours between failures of jobs on 1,024 GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from opt_ops.core import events as e
from opt_ops.core.failures.classes import Blames, row
from opt_ops.core.values import GpuPart

WINDOW_SECONDS = 28 * 86400.0
PRIOR_HOURS: Mapping[str, float] = {"gpu": 8090.0, "node": 8090.0 / 8}
"""Of use for one failure."""

LEMON_FAILURES = 2
LEMON_CHANCE = 0.05  # that any part at all of a sound fleet would be called one


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An incident that is held against a part."""

    at: float
    incident: str
    kind: str
    cause: str
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A GPU or a node, and what is known of it."""

    key: str
    kind: str  # gpu, node
    node: str  # where it is, or was last seen
    serial: str | None = None
    name: str | None = None
    uses: tuple[tuple[float, float], ...] = ()
    """From and to, of each attempt on it."""
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A part's line of the ledger."""

    part: Part
    hours: float
    failures: tuple[Failure, ...]
    expected: float
    """Failures, at the others' rate."""
    score: float
    lemon: bool


@dataclass(frozen=True, slots=True)
class _Running:
    nodes: tuple[str, ...]
    since: float


def parts(entries: Iterable[e.Entry]) -> dict[str, Part]:
    """The parts that a lineage has seen, by UUID or node name, with their uses and failures."""
    known: dict[str, Part] = {}
    inside: dict[str, tuple[str, ...]] = {}
    intended: dict[str, tuple[str, ...]] = {}
    running: dict[str, _Running] = {}
    last = 0.0
    for entry in entries:
        event, last = entry.event, max(last, entry.ts)
        if isinstance(event, e.NodeJudged):
            known.setdefault(event.node, Part(key=event.node, kind="node", node=event.node))
            if event.gpus:
                inside[event.node] = tuple(gpu.uuid for gpu in event.gpus)
                known |= {gpu.uuid: _seen(known.get(gpu.uuid), gpu, event.node) for gpu in event.gpus}
        elif isinstance(event, e.AttemptIntended):
            intended[event.attempt] = event.nodes
        elif isinstance(event, e.AttemptStarted):
            running[event.attempt] = _Running(intended.get(event.attempt, ()), event.at)
        elif isinstance(event, e.MembersIntended) and event.attempt in running:
            _used(known, inside, running[event.attempt], entry.ts)
            running[event.attempt] = _Running(event.nodes, entry.ts)
        elif isinstance(event, e.AttemptEnded) and event.attempt in running:
            _used(known, inside, running.pop(event.attempt), entry.ts)
        elif (
            isinstance(event, e.IncidentOpened)
            and row(event.failure).blames is not Blames.NOTHING
            and event.drill is None
        ):
            _failed(known, event)
    for left in running.values():
        _used(known, inside, left, last)
    return known


def merged(lineages: Iterable[Mapping[str, Part]]) -> dict[str, Part]:
    """The parts of several lineages; where a part was last is shown by its latest use or failure."""
    known: dict[str, Part] = {}
    for each in (part for lineage in lineages for part in lineage.values()):
        before = known.get(each.key)
        if before is None:
            known[each.key] = each
            continue
        newest = max((before, each), key=_last_heard)
        uses, failures = tuple(sorted((*before.uses, *each.uses))), (*before.failures, *each.failures)
        known[each.key] = replace(newest, uses=uses, failures=tuple(sorted(failures, key=lambda failure: failure.at)))
    return known


def records(known: Mapping[str, Part], now: float) -> list[Record]:
    """The ledger of the last 28 days, the most surprising first."""
    found = [record for kind in PRIOR_HOURS for record in _of_kind([p for p in known.values() if p.kind == kind], now)]
    return sorted(found, key=lambda record: (-record.score, -len(record.failures), record.part.key))


def _of_kind(alike: Sequence[Part], now: float) -> Iterator[Record]:
    since = now - WINDOW_SECONDS
    hours = {part.key: sum(max(0.0, to - max(at, since)) for at, to in part.uses) / 3600 for part in alike}
    failures = {part.key: tuple(each for each in part.failures if each.at >= since) for part in alike}
    all_hours, all_failures = sum(hours.values()), sum(map(len, failures.values()))
    for part in alike:
        own = failures[part.key]
        others = (all_failures - len(own) + 1) / (all_hours - hours[part.key] + PRIOR_HOURS[part.kind])
        expected = others * max(hours[part.key], 1.0)  # what fails at once was used for a moment, too
        chance = poisson_tail(len(own), expected)
        yield Record(
            part=part,
            hours=hours[part.key],
            failures=own,
            expected=expected,
            score=-math.log10(max(chance, 1e-300)),
            lemon=len(own) >= LEMON_FAILURES and chance * len(alike) < LEMON_CHANCE,
        )


def poisson_tail(count: int, mean: float) -> float:
    """The probability of `count` events or more where `mean` are expected."""
    if count == 0:
        return 1.0
    term = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
    total = 0.0
    while term > total * 1e-16:
        total += term
        count += 1
        term *= mean / count
    return min(1.0, total)


def _seen(before: Part | None, gpu: GpuPart, node: str) -> Part:
    fresh = Part(key=gpu.uuid, kind="gpu", node=node, serial=gpu.serial, name=gpu.name)
    return fresh if before is None else replace(before, node=node, serial=gpu.serial or before.serial)


def _used(known: dict[str, Part], inside: Mapping[str, tuple[str, ...]], run: _Running, until: float) -> None:
    for node in run.nodes:
        for key in (node, *inside.get(node, ())):
            part = known.get(key, Part(key=key, kind="node", node=node))
            known[key] = replace(part, uses=(*part.uses, (run.since, max(run.since, until))))


def _failed(known: dict[str, Part], event: e.IncidentOpened) -> None:
    uuid = event.evidence.get("uuid")
    for node in event.nodes:
        failure = Failure(at=event.at, incident=event.incident, kind=event.failure, cause=event.cause, node=node)
        serial = event.evidence.get("serial")
        blamed = [Part(key=node, kind="node", node=node)]
        blamed += [Part(key=str(uuid), kind="gpu", node=node, serial=serial)] if uuid is not None else []
        for part in blamed:
            before = known.get(part.key, part)
            known[part.key] = replace(before, failures=(*before.failures, failure))


def _last_heard(part: Part) -> float:
    return max((*(to for _, to in part.uses), *(failure.at for failure in part.failures)), default=0.0)
