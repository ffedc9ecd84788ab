"""The files that node agents write (`health/<node>.jsonl`, `<attempt>/nodes/<node>.json`) and read (`orders.json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from opt_ops.core.failures.cause_lines import LONGEST, CauseLine, clean
from opt_ops.core.health import Heartbeat
from opt_ops.core.names import attempt_folder
from opt_ops.core.values import RankExit
from opt_ops.errors import OptOpsError
from opt_ops.ports import NodeRanksReport, Orders
from opt_ops.runfolder import fields as f
from opt_ops.runfolder.files import Tail, identity_of, names_in, read_json, write_json
from opt_ops.runfolder.heartbeat import heartbeat_of
from opt_ops.runfolder.left_out import LeftOutCounter

_LAST_HEARTBEATS = 64 * 1024  # bytes at the end of a health file that one call reads, or more if its line is longer
_LARGEST_REPORT = 16 * 1024 * 1024  # bytes: 1,024 ranks with 4 KiB of their logs are 4 MiB
_RANKS = 4096  # of a node
_LONGEST_TAIL = 64 * 1024  # characters of a rank's log in a report
_CAUSES = 64  # lines of a rank's log that name a cause
_LONGEST_STACK = 256 * 1024  # characters of a rank's stacks
_SIGNALS = f.whole(-128, 1024)
_CODES = f.whole(-(2**31), 2**32 - 1)


class FileAgents:
    """The node agents of a lineage, by their files. No content of these files raises."""

    def __init__(self, folder: Path, left_out: LeftOutCounter | None = None) -> None:
        self._folder = folder
        self._left_out = left_out or LeftOutCounter(folder)
        self._tails: dict[str, Tail] = {}
        self._reporting = ""
        self._reports: dict[str, tuple[tuple[int, ...], NodeRanksReport | None]] = {}
        """Reports on the attempt of the last call, by file, each with the identity of its file; None: not readable."""
        self._stacks: dict[Path, tuple[tuple[int, ...], dict[int, str]]] = {}
        """The same for the files of the last dump."""

    def heartbeats(self) -> Iterator[Heartbeat]:
        """Yield the heartbeats since the last call, oldest first for each node; after a long time only the last few.

        A heartbeat holds the complete present readings. So a daemon that was held up is up to date with one call, and
        needs no more memory for it.
        """
        folder = self._folder / "health"
        for name in sorted(self._names("heartbeats", folder, ".jsonl")):
            tail = self._tails.get(name)
            if tail is None:
                tail = self._tails[name] = self._tail(folder / name)
            yield from self._heartbeats(folder / name, tail)

    def _tail(self, path: Path) -> Tail:
        return Tail(path, _LAST_HEARTBEATS, lambda line, why: self._left_out.add("heartbeats", path, why, line))

    def _heartbeats(self, path: Path, tail: Tail) -> Iterator[Heartbeat]:
        try:
            lines = list(tail.read())
        except OSError as error:  # a network file system; a node whose file stays unreadable counts as silent
            self._left_out.unreadable("heartbeats", path, error)
            return
        for fields in lines:
            left_out: list[str] = []
            try:
                heartbeat = heartbeat_of(fields, left_out)
                _of_its_file(heartbeat.node, path)
            except f.BadField as error:
                self._left_out.add("heartbeats", path, str(error))
                continue
            if left_out:
                self._left_out.add("heartbeats", path, left_out[0])
            self._left_out.took("heartbeats", path)
            yield heartbeat

    def newest(self) -> Sequence[Heartbeat]:
        """Return the last heartbeat of each node, for a reader that calls once."""
        return list({beat.node: beat for beat in FileAgents(self._folder).heartbeats()}.values())

    def order(self, orders: Orders) -> None:
        """Write the orders, and the newest attempt for trainers on nodes that are cut off (the fence)."""
        if orders.launch is not None:
            membership = orders.launch.membership
            generation = membership.generation if membership else 1
            fence = {"v": 1, "attempt": orders.launch.attempt, "generation": generation}
            write_json(self._folder / "attempt.json", fence)
        write_json(self._folder / "orders.json", {"v": 1, **dataclasses.asdict(orders)})

    def reports(self, attempt: str) -> Mapping[str, NodeRanksReport]:
        """Return the reports on an attempt, by node. A file is read again only if it was replaced."""
        if attempt != self._reporting:
            self._reporting, self._reports = attempt, {}
        folder = self._folder / attempt_folder(attempt) / "nodes"
        for name in self._names("reports", folder, ".json"):
            path = folder / name
            try:
                identity = identity_of(path)
                if identity is None or (name in self._reports and self._reports[name][0] == identity):
                    continue
                self._reports[name] = identity, self._report(path, identity)
            except OSError as error:
                self._left_out.unreadable("reports", path, error)
        return {report.node: report for _, report in self._reports.values() if report is not None}

    def _report(self, path: Path, identity: tuple[int, ...]) -> NodeRanksReport | None:
        left_out: list[str] = []
        try:
            report = _report_of(f.Record(read_json(path, _LARGEST_REPORT), left_out=left_out), identity[1] / 1e9)
            _of_its_file(report.node, path)
        except (f.BadField, OptOpsError) as error:
            self._left_out.add("reports", path, str(error))
            return None
        if left_out:
            self._left_out.add("reports", path, left_out[0])
        self._left_out.took("reports", path)
        return report

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """Return the stacks of a dump request that agents have collected, by rank; empty text: no answer in time."""
        folder = self._folder / attempt_folder(attempt) / "stacks" / dump
        found: dict[Path, tuple[tuple[int, ...], dict[int, str]]] = {}
        for name in self._names("stacks", folder, ".json"):
            path = folder / name
            try:
                if (identity := identity_of(path)) is None:
                    continue
                known = self._stacks.get(path)
                found[path] = known if known and known[0] == identity else (identity, self._stacks_in(path))
            except OSError as error:
                self._left_out.unreadable("stacks", path, error)
        self._stacks = found
        return {rank: text for _, texts in found.values() for rank, text in texts.items()}

    def _stacks_in(self, path: Path) -> dict[int, str]:
        left_out: list[str] = []
        try:
            texts = _stacks_of(f.Record(read_json(path), left_out=left_out))
        except (f.BadField, OptOpsError) as error:
            left_out, texts = [str(error)], {}
        if left_out:
            self._left_out.add("stacks", path, left_out[0])
        return texts

    def _names(self, source: str, folder: Path, ending: str) -> list[str]:
        try:
            return names_in(folder, ending)
        except OSError as error:
            self._left_out.unreadable(source, folder, error)
            return []


def _of_its_file(node: str, path: Path) -> None:
    """Refuse what says that it is of another node than its file: each agent writes its own file only.

    Raises:
        BadField: it is of another node.
    """
    if node != path.stem:
        raise f.BadField(f"`node` is {node[:64]}, and this is the file of {path.stem}")


def _report_of(record: f.Record, written: float) -> NodeRanksReport:
    """The report. `written` is the time of its file: when a rank ended, if the report does not say it as a number."""
    node = record.required("node", f.name)
    ranks = record.required("ranks", lambda value: f.values(value, _RANKS))
    if not ranks:
        raise f.BadField("`ranks` is empty")
    read = [
        _rank_of(f.Record(each, f"ranks[{number}].", record.left_out), node, written)
        for number, each in enumerate(ranks)
    ]
    newest = {each.rank: each for each in read}  # a process that was replaced comes before the one that replaced it
    ended = {each.rank: each for each in read if each.exit is not None}
    return NodeRanksReport(
        node=node,
        started_at=record.optional("started", f.moment, written),
        exits=tuple(each.exit for each in read if each.exit is not None),
        done=all(each.exit is not None for each in newest.values()),
        tails={rank: each.tail for rank, each in ended.items() if each.tail},
        causes={rank: each.causes for rank, each in ended.items() if each.causes is not None},
        pids={rank: each.process for rank, each in newest.items() if each.exit is None and each.process is not None},
        joining={rank: each.joining for rank, each in newest.items() if each.exit is None and each.joining},
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _RankEntry:
    """A process of a rank in a report. `process`: its first generation, its number, and when it started."""

    rank: int
    exit: RankExit | None
    tail: str
    causes: tuple[CauseLine, ...] | None
    process: tuple[int, int, float] | None
    joining: int  # 0: it has not said so


def _rank_of(record: f.Record, node: str, written: float) -> _RankEntry:
    found = record.optional("generations", f.items(f.whole(1), 2), ())
    first, last = (found[0], found[-1]) if found else (1, 1)
    ended, tail, causes = _exit_of(record, node, written)
    pid, start = record.nullable("pid", f.whole(1), None), record.optional("start", f.moment, 0.0)
    return _RankEntry(
        rank=record.required("rank", f.rank),
        exit=None if ended is None else dataclasses.replace(ended, generation=last),
        tail=tail,
        causes=causes,
        process=None if pid is None else (first, pid, start),
        joining=record.optional("joining", f.whole(1), 0),
    )


def _exit_of(record: f.Record, node: str, written: float) -> tuple[RankExit | None, str, tuple[CauseLine, ...] | None]:
    """How a rank ended, the end of its log, and the lines of the log that name a cause; None, "" while it runs.

    An end that is reported in part is still an end: when, or how.
    """
    rank = record.required("rank", f.rank)
    if record.required("ended", lambda value: value) is None:
        return None, "", None
    code, signal = record.optional("code", _CODES, None), record.optional("signal", _SIGNALS, None)
    at = record.optional("ended", f.moment, None)
    if at is None and code is None and signal is None:
        return None, "", None
    found = RankExit(rank=rank, node=node, code=code, signal=signal, at=written if at is None else at)
    tail = record.optional("tail", f.text(_LONGEST_TAIL), "")
    told = record.optional("causes", lambda value: isinstance(value, list), False)
    causes = record.each("causes", _cause_of, _CAUSES) if told else None
    return found, tail, causes


def _cause_of(record: f.Record) -> CauseLine:
    return CauseLine(
        text=clean(record.required("line", f.text(LONGEST))),
        at=record.optional("at", f.moment, None),
        step=record.optional("step", f.step, None),
        stale=record.optional("stale", f.flag, False),
    )


def _stacks_of(record: f.Record) -> dict[int, str]:
    texts: dict[int, str] = {}
    for part, convert in (("py_spy", lambda _: ""), ("stacks", f.text(_LONGEST_STACK))):  # py_spy: no answer in time
        if (found := record.part(part)) is not None:
            texts |= {int(rank): text for rank, text in found.all(convert) if rank.isascii() and rank.isdigit()}
    return {rank: text for rank, text in texts.items() if rank < f.MOST_RANKS}
