"""The run folder as ports: agents, trainer and inbox of one lineage. docs/formats.md defines every file here."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.core.detect.point import Point
from opt_ops.core.health import Gpu, Heartbeat, Machine, Port, Xid
from opt_ops.core.health.burn_in_findings import BurnIn, DeviceTest
from opt_ops.core.health.burn_in_plan import Measured
from opt_ops.core.names import attempt_folder
from opt_ops.core.values import Optimizer, RankExit, Schedule
from opt_ops.errors import OptOpsError
from opt_ops.ports import NodeReport, Orders, Phase, Request, TrainerConfig
from opt_ops.runfolder.files import Tail, read_json, write_json
from opt_ops.runfolder.telemetry import point_of

log = logging.getLogger(__name__)

_LAST_HEARTBEATS = 64 * 1024  # bytes of a health file that one look goes back

_NOT_AS_PROMISED = (KeyError, TypeError, ValueError, AttributeError)
_UNREADABLE = (OSError, OptOpsError, *_NOT_AS_PROMISED)


class _Complaints:
    """What is wrong with a file is said once: it must neither stop the watch over all others nor go unsaid."""

    def __init__(self) -> None:
        self._said: set[Path] = set()

    def add(self, path: Path, error: Exception) -> None:
        """Say it, unless it was said."""
        if path not in self._said:
            self._said.add(path)
            log.warning("%s cannot be read, or is not what docs/formats.md says, and is left out: %r", path, error)


class FileAgents:
    """`orders.json`, `health/<node>.jsonl`, `<attempt>/nodes/<node>.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._complaints = _Complaints()
        self._reporting = ""
        self._reports: dict[str, tuple[tuple[int, ...], NodeReport]] = {}
        """Of the attempt that was asked for last, by file, with what tells whether the file was replaced since."""

    def heartbeats(self) -> Iterator[Heartbeat]:
        """Those that came since the last call, oldest first for each node; the last eight or so, if it was long ago.

        A heartbeat says all that still holds. A daemon that was held up is back in the present with one look, and
        needs no more memory for it.
        """
        folder = self._folder / "health"
        for name in sorted(_names(folder, ".jsonl")):
            tail = self._tails.get(name)
            if tail is None:
                tail = self._tails[name] = Tail(folder / name, most=_LAST_HEARTBEATS)
            yield from self._heartbeats(folder / name, tail)

    def _heartbeats(self, path: Path, tail: Tail) -> Iterator[Heartbeat]:
        try:
            lines = list(tail.read())
        except OSError as error:  # as of a network file system; a node that stays unread falls silent
            self._complaints.add(path, error)
            return
        for fields in lines:
            try:
                yield heartbeat_of(fields)
            except _NOT_AS_PROMISED as error:
                self._complaints.add(path, error)

    def newest(self) -> Sequence[Heartbeat]:
        """Each node's last one, for those who only look in."""
        return list({beat.node: beat for beat in FileAgents(self._folder).heartbeats()}.values())

    def order(self, orders: Orders) -> None:
        """Make these the orders; and the newest attempt known to trainers that nobody can reach any more."""
        if orders.launch is not None:
            write_json(self._folder / "attempt.json", {"v": 1, "attempt": orders.launch.attempt})
        write_json(self._folder / "orders.json", {"v": 1, **dataclasses.asdict(orders)})

    def reports(self, attempt: str) -> Mapping[str, NodeReport]:
        """By node. A file is read again when it was replaced."""
        if attempt != self._reporting:
            self._reporting, self._reports = attempt, {}
        folder = self._folder / attempt_folder(attempt) / "nodes"
        for name in _names(folder, ".json"):
            path = folder / name
            try:
                identity = _identity(path)
                if identity is None or (name in self._reports and self._reports[name][0] == identity):
                    continue
                fields = read_json(path)
                if fields is not None:
                    self._reports[name] = identity, _report_of(fields)
            except _UNREADABLE as error:
                self._complaints.add(path, error)
        return {report.node: report for _, report in self._reports.values()}

    def stacks(self, attempt: str, dump: str) -> Mapping[int, str]:
        """What the ranks wrote down at that request, once their agents have gathered it; empty: no answer in time."""
        texts: dict[int, str] = {}
        for path in (self._folder / attempt_folder(attempt) / "stacks" / dump).glob("*.json"):
            fields = read_json(path) or {}
            texts |= {int(rank): "" for rank in fields.get("py_spy", {})}  # those that did not answer
            texts |= {int(rank): str(text) for rank, text in fields.get("stacks", {}).items()}
        return texts


def _names(folder: Path, ending: str) -> list[str]:
    """Of the whole files in a folder; none where there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return [each.name for each in found if each.name.endswith(ending) and not each.name.startswith(".")]
    except FileNotFoundError:
        return []


def _identity(path: Path) -> tuple[int, ...] | None:
    """Of what the file holds now. It is opened for that: network file systems look then, and not at a mere `stat`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        stat = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _report_of(fields: Mapping[str, Any]) -> NodeReport:
    node = str(fields["node"])
    exits = tuple(
        RankExit(rank=r["rank"], node=node, code=r["code"], signal=r["signal"], at=r["ended"])
        for r in fields["ranks"]
        if r["ended"] is not None
    )
    done = len(exits) == len(fields["ranks"])
    tails = {int(r["rank"]): str(r["tail"]) for r in fields["ranks"] if r.get("tail")}
    return NodeReport(node=node, started_at=fields["started"], exits=exits, done=done, tails=tails)


_GPU_FIELDS = frozenset(field.name for field in dataclasses.fields(Gpu))


def heartbeat_of(fields: Mapping[str, Any]) -> Heartbeat:
    """A line of a health file. What it does not say is unknown."""
    return Heartbeat(
        node=fields["node"],
        host=fields["host"],
        ts=fields["ts"],
        attempt=fields.get("attempt"),
        nvml=fields["nvml"],
        orders=tuple(fields.get("orders", (0, 0))),
        gpus=tuple(_gpu_of(gpu) for gpu in fields.get("gpus", ())),
        xids=tuple(Xid(**xid) for xid in fields.get("xids", ())),
        allocation=fields.get("allocation"),
        warned=bool(fields.get("warned")),
        driver=fields.get("driver"),
        machine=_machine_of(fields.get("machine") or {}),
        burning=bool(fields.get("burning")),
        burn_in=_burn_in_of(fields["burn_in"]) if fields.get("burn_in") else None,
        burned_at=fields.get("burned_at") or 0.0,
        energy_joules=_energy_of(fields.get("gpus", ())),
    )


def _gpu_of(fields: Mapping[str, Any]) -> Gpu:
    return Gpu(**{name: fields[name] for name in fields.keys() & _GPU_FIELDS})


def _energy_of(gpus: Sequence[Mapping[str, Any]]) -> float | None:
    """All counters together; None where a GPU does not tell its own."""
    counters = [gpu.get("energy_joules") for gpu in gpus]
    return sum(counters) if counters and None not in counters else None  # type: ignore[arg-type]


def _burn_in_of(fields: Mapping[str, Any]) -> BurnIn:
    """What an agent found by burning in its own node."""
    return BurnIn(
        nodes=tuple(fields["nodes"]),
        devices=tuple(DeviceTest(**device) for device in fields["devices"]),
        alone=tuple(Measured(nodes=tuple(each["nodes"]), gbs=each["gbs"]) for each in fields["alone"]),
        silent=tuple(fields["silent"]),
        finished=fields["finished"],
    )


def _machine_of(fields: Mapping[str, Any]) -> Machine:
    ports = tuple(Port(name=p["name"], active=p["active"], downed=p["downed"]) for p in fields.get("ports", ()))
    return Machine(
        ports=ports,
        carriers=fields.get("carriers") or {},
        mounts=fields.get("mounts"),
        clock_set=fields.get("clock_set"),
        disk_free=fields.get("disk_free"),
        disk_size=fields.get("disk_size"),
    )


class FileTrainer:
    """`config.json`, `telemetry.jsonl` and `drill.json` of each attempt."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[str, Tail] = {}
        self._phases: dict[str, Tail] = {}
        self._complaints = _Complaints()

    def config(self, attempt: str) -> TrainerConfig | None:
        """None until the trainer has written one that says what it must."""
        path = self._folder / attempt_folder(attempt) / "config.json"
        try:
            fields = read_json(path)
            return None if fields is None else _config_of(fields)
        except _UNREADABLE as error:
            self._complaints.add(path, error)
            return None

    def points(self, attempt: str) -> Sequence[Point]:
        """Telemetry that came since the last call for this attempt. Malformed lines are left out."""
        path = self._folder / attempt_folder(attempt) / "telemetry.jsonl"
        points: list[Point] = []
        for fields in self._lines(self._tails.setdefault(attempt, Tail(path)), path):
            try:
                points.append(point_of(fields))
            except _NOT_AS_PROMISED as error:
                self._complaints.add(path, error)
        return points

    def phases(self, attempt: str) -> Sequence[Phase]:
        """Changes of phase that came since the last call for this attempt. Another trainer may write none."""
        path = self._folder / attempt_folder(attempt) / "phases.jsonl"
        phases: list[Phase] = []
        for fields in self._lines(self._phases.setdefault(attempt, Tail(path)), path):
            try:
                phases.append(Phase(name=str(fields["phase"]), since=float(fields["ts"]), step=fields.get("step")))
            except _NOT_AS_PROMISED as error:
                self._complaints.add(path, error)
        return phases

    def _lines(self, tail: Tail, path: Path) -> list[dict[str, Any]]:
        try:
            return list(tail.read())
        except OSError as error:  # telemetry that stays unread is missed as a hang is
            self._complaints.add(path, error)
            return []

    def inject(self, attempt: str, drills: Sequence[Mapping[str, Any]]) -> None:
        """Write the attempt's drills; the trainer reads them before its next update."""
        write_json(self._folder / attempt_folder(attempt) / "drill.json", list(drills))


def _config_of(fields: Mapping[str, Any]) -> TrainerConfig:
    optimizer = fields["optimizer"]
    return TrainerConfig(
        steps=int(fields["steps"]),
        schedule=Schedule(**{f.name: fields["schedule"][f.name] for f in dataclasses.fields(Schedule)}),
        optimizer=Optimizer(
            betas=tuple(optimizer["betas"]),
            weight_decay=optimizer["weight_decay"],
            clip_norm=optimizer["clip_norm"],
        ),
        versions=fields.get("versions", {}),
        layout=fields.get("layout", {}),
    )


class FileInbox:
    """`inbox/<uuid>.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "inbox"
        self._complaints = _Complaints()

    def requests(self) -> Sequence[Request]:
        """Those that are waiting, oldest first."""
        waiting: list[tuple[float, Request]] = []
        for path in self._folder.glob("*.json"):
            try:
                fields = read_json(path)
                if fields is None:
                    continue
                request = Request(
                    request=path.stem,
                    author=str(fields["author"]),
                    verb=str(fields["verb"]),
                    arguments=dict(fields["arguments"]),
                )
                waiting.append((float(fields["ts"]), request))
            except (OptOpsError, *_NOT_AS_PROMISED) as error:
                log.error("%s is no request and was set aside: %r", path, error)
                path.rename(path.with_suffix(".refused"))
            except OSError as error:  # somebody's umask, a file server that is away: it waits
                self._complaints.add(path, error)
        return [request for _, request in sorted(waiting, key=lambda pair: pair[0])]

    def put(self, request: Request, ts: float) -> None:
        """Ask the daemon for something."""
        fields = {"ts": ts, "author": request.author, "verb": request.verb, "arguments": request.arguments}
        write_json(self._folder / f"{request.request}.json", json.loads(json.dumps(fields)))

    def done(self, request: str) -> None:
        """It is journaled: take it out."""
        (self._folder / f"{request}.json").unlink(missing_ok=True)
