"""Send files between the disks of nodes, from rank to rank: to the next node when saving, and back when loading."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
import torch.distributed as dist

_CHUNK = 16 << 20  # bytes
_UNREADABLE = -1


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file that rank ``source`` sends to rank ``target`` on another node."""

    name: str
    source: int
    target: int


def to_peers(nodes: Sequence[str], names: Sequence[Iterable[str]]) -> list[Transfer]:
    """The transfers that copy each rank's files to the next node. With one node there are none.

    Every second node sends first, then the others. So no node waits for a chain of nodes before it.

    Args:
        nodes: the node of each rank.
        names: the files of each rank.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    order = list(by_node)
    if len(order) == 1:
        return []
    rounds: list[list[Transfer]] = [[], [], []]
    for place, node in enumerate(order):
        peers = by_node[order[(place + 1) % len(order)]]
        last_of_odd = place == len(order) - 1 and place % 2 == 0
        rounds[2 if last_of_odd else place % 2] += [
            Transfer(name, rank, peers[i % len(peers)])
            for i, rank in enumerate(by_node[node])
            for name in sorted(names[rank])
        ]
    return [transfer for each in rounds for transfer in each]


def to_those_who_need(
    nodes: Sequence[str], holders: Mapping[str, Sequence[str]], needed: Mapping[str, Iterable[str]]
) -> list[Transfer]:
    """The transfers that give each node the files that its ranks will read.

    Args:
        nodes: the node of each rank.
        holders: by file, the nodes that have a good copy.
        needed: by node, the files that it needs.
    """
    transfers: list[Transfer] = []
    for node in sorted(needed):
        takers = [rank for rank, where in enumerate(nodes) if where == node]
        for i, name in enumerate(sorted(set(needed[node]))):
            if node not in holders[name]:
                givers = [rank for rank, where in enumerate(nodes) if where in holders[name]]
                transfers.append(Transfer(name, givers[i % len(givers)], takers[i % len(takers)]))
    return transfers


def exchange(transfers: Iterable[Transfer], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Make this rank's part of the transfers.

    Args:
        transfers: the same list on all ranks.
        folder: where this rank's files are read and written.
        group: of the ranks.

    Raises:
        OSError: a file could not be read or written here. All other transfers are made nevertheless.
    """
    rank, failed = dist.get_rank(), None
    for transfer in transfers:
        try:
            if transfer.source == rank:
                _send(folder / transfer.name, transfer.target, group)
            elif transfer.target == rank:
                _receive(folder / transfer.name, transfer.source, group)
        except OSError as error:
            failed = error
    if failed:
        raise failed


def _send(path: Path, target: int, group: dist.ProcessGroup | None) -> None:
    """Send a file. After a read error, zeros follow; the receiver refuses them, because their hash is wrong."""
    failed = None
    try:
        file = path.open("rb", buffering=0)
    except OSError:
        dist.send(torch.tensor([_UNREADABLE]), target, group)
        raise
    with file:
        left = os.fstat(file.fileno()).st_size
        dist.send(torch.tensor([left]), target, group)
        while left > 0:
            chunk = torch.zeros(min(left, _CHUNK), dtype=torch.uint8)
            try:
                _fill(file, _bytes(chunk))
            except OSError as error:
                failed = error
            dist.send(chunk, target, group)
            left -= len(chunk)
    if failed:
        raise failed


def _bytes(chunk: torch.Tensor) -> memoryview:
    return memoryview(chunk.numpy())  # pyright: ignore[reportArgumentType]  an array has the buffer protocol


def _fill(file: FileIO, room: memoryview) -> None:
    while room:
        count = file.readinto(room)
        if not count:
            raise OSError("the file became shorter while it was read")
        room = room[count:]


def _receive(path: Path, source: int, group: dist.ProcessGroup | None) -> None:
    """Receive a file. After an error, the rest is still received: otherwise the sender would wait forever."""
    size = torch.tensor([0])
    dist.recv(size, source, group)
    left = int(size)
    if left == _UNREADABLE:
        raise OSError(f"rank {source} cannot read {path.name}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    failed: OSError | None = None
    file = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("wb")
    except OSError as error:
        failed = error
    while left > 0:
        chunk = torch.empty(min(left, _CHUNK), dtype=torch.uint8)
        dist.recv(chunk, source, group)
        left -= len(chunk)
        try:
            if file and not failed:
                file.write(_bytes(chunk))
        except OSError as error:
            failed = error
    if file:
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            failed = failed or error
    if failed:
        temporary.unlink(missing_ok=True)
        raise failed
    temporary.replace(path)
