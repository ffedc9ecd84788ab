"""The files that node agents write (`health/<node>.jsonl`, `<attempt>/nodes/<node>.json`) and read (`orders.json`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.core.health import Heartbeat
from opt_ops.core.names import attempt_folder
from opt_ops.core.values import RankExit
from opt_ops.ports import NodeRanksReport, Orders
from opt_ops.runfolder.files import (
    NOT_AS_PROMISED,
    UNREADABLE,
    Tail,
    WarnOnce,
    identity_of,
    names_in,
    read_json,
    write_json,
)
from opt_ops.runfolder.heartbeat import heartbeat_of

_LAST_HEARTBEATS = 64 * 1024  # bytes at the end of a health file that one call reads at most


class FileAgents:
    """The node agents of a lineage, by their files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._warnings = WarnOnce()
        self._reporting = ""
        self._reports: dict[str, tuple[tuple[int, ...], NodeRanksReport]] = {}
        """Reports on the attempt of the last call, by file, each with the identity of its file."""

    def heartbeats(self) -> Iterator[Heartbeat]:
        """Yield the heartbeats since the last call, oldest first for each node; after a long time only the last few.

        A heartbeat holds the complete present readings. So a daemon that was held up is up to date with one call, and
        needs no more memory for it.
        """
        folder = self._folder / "health"
        for name in sorted(names_in(folder, ".jsonl")):
            tail = self._tails.get(name)
            if tail is None:
                tail = self._tails[name] = Tail(folder / name, most=_LAST_HEARTBEATS)
            yield from self._heartbeats(folder / name, tail)

    def _heartbeats(self, path: Path, tail: Tail) -> Iterator[Heartbeat]:
        try:
            lines = list(tail.read())
        except OSError as error:  # a network file system; a node whose file stays unreadable counts as silent
            self._warnings.add(path, error)
            return
        for fields in lines:
            try:
                yield heartbeat_of(fields)
            except NOT_AS_PROMISED as error:
                self._warnings.add(path, error)

    def newest(self) -> Sequence[Heartbeat]:
        """Return the last heartbeat of each node, for a reader that calls once."""
        return list({beat.node: beat for beat in FileAgents(self._folder).heartbeats()}.values())

    def order(self, orders: Orders) -> None:
        """Write the orders, and the newest attempt for trainers on nodes that are cut off (the fence)."""
        if orders.launch is not None:
            write_json(self._folder / "attempt.json", {"v": 1, "attempt": orders.launch.attempt})
        write_json(self._folder / "orders.json", {"v": 1, **dataclasses.asdict(orders)})

    def reports(self, attempt: str) -> Mapping[str, NodeRanksReport]:
        """Return the reports on an attempt, by node. A file is read again only if it was replaced."""
        if attempt != self._reporting:
            self._reporting, self._reports = attempt, {}
        folder = self._folder / attempt_folder(attempt) / "nodes"
        for name in names_in(folder, ".json"):
            path = folder / name
            try:
                identity = identity_of(path)
                if identity is None or (name in self._reports and self._reports[name][0] == identity):
                    continue
                fields = read_json(path)
                if fields is not None:
                    self._reports[name] = identity, _report_of(fields)
            except UNREADABLE as error:
                self._warnings.add(path, error)
        return {report.node: report for _, report in self._reports.values()}

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """Return the stacks of a dump request that agents have collected, by rank; empty text: no answer in time."""
        texts: dict[int, str] = {}
        for path in (self._folder / attempt_folder(attempt) / "stacks" / dump).glob("*.json"):
            fields = read_json(path) or {}
            texts |= {int(rank): "" for rank in fields.get("py_spy", {})}  # ranks that did not answer
            texts |= {int(rank): str(text) for rank, text in fields.get("stacks", {}).items()}
        return texts


def _report_of(fields: Mapping[str, Any]) -> NodeRanksReport:
    node = str(fields["node"])
    exits = tuple(
        RankExit(rank=r["rank"], node=node, code=r["code"], signal=r["signal"], at=r["ended"])
        for r in fields["ranks"]
        if r["ended"] is not None
    )
    done = len(exits) == len(fields["ranks"])
    tails = {int(r["rank"]): str(r["tail"]) for r in fields["ranks"] if r.get("tail")}
    return NodeRanksReport(node=node, started_at=fields["started"], exits=exits, done=done, tails=tails)
