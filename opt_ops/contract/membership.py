"""Membership: which ranks take part in a running attempt, and where they meet.

The node agent writes one file for each rank, and for each warm rank that waits for a place, on the node's own disk. Its
path is in ``OPT_OPS_MEMBERS``. A file is there from the second generation on, or once a waiting rank gets a place; its
generation only grows. A rank of an older generation takes part in nothing any more: not in groups of ranks, not in
telemetry, not in checkpoints. ``docs/in-place.md`` has the protocol.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opt_ops.contract.environment import MEMBERS, STANDBY, Place
from opt_ops.contract.files import read_regular, write_durably

_MOST_BYTES = 16 * 2**20  # a hundred thousand ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One generation of the ranks of an attempt, as one rank reads it.

    Attributes:
        attempt: the attempt.
        generation: 2 or more; 1 was the launch.
        rank: of the process that reads it. None: it has no place any more, and leaves with exit code 83.
        local_rank: its number on its node.
        nodes: the node of each rank.
        new: the ranks that start in this generation. All others were there in the one before.
        address: host of rank 0.
        port: where the ranks meet on that host.
    """

    attempt: str
    generation: int
    rank: int | None
    local_rank: int
    nodes: tuple[str, ...]
    new: tuple[int, ...]
    address: str
    port: int

    @property
    def place(self) -> Place:
        """The place of the process that reads it.

        Raises:
            ValueError: it has none.
        """
        if self.rank is None:
            raise ValueError("this process has no place in the membership")
        return Place(self.rank, len(self.nodes), self.local_rank)


def write_membership(path: Path, membership: Membership) -> None:
    """Replace the file of one rank.

    Raises:
        OSError: it cannot be written.
    """
    write_durably(path, json.dumps({"v": 1, **asdict(membership)}) + "\n")


class MembersFile:
    """Reads the file of this rank.

    Args:
        path: the file. With None there is no newer generation, ever.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._last: Membership | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "MembersFile":
        """The file that the node agent named to this process."""
        named = environment.get(MEMBERS)
        return cls(Path(named) if named else None)

    def newer(self, generation: int) -> Membership | None:
        """The membership in the file, if its generation is newer than ``generation``.

        A file that is missing says nothing. Nor does one that cannot be read: the agent writes it again, or ends this
        process.
        """
        if self.path is None:
            return None
        try:
            found = self.path.stat()
            identity = found.st_ino, found.st_mtime_ns, found.st_size
            if identity != self._seen:
                self._last = _membership_of(json.loads(read_regular(self.path, _MOST_BYTES)))
                self._seen = identity
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._last if self._last is not None and self._last.generation > generation else None


def is_standby(environment: Mapping[str, str]) -> bool:
    """Whether this process waits for a place: it has no rank yet."""
    return bool(environment.get(STANDBY))


def tell_ready(members: Path, pid: int) -> None:
    """Say that the waiting process ``pid`` has done everything that needs no other rank. Called again once a minute.

    Raises:
        OSError: the file beside ``members`` cannot be written.
    """
    write_durably(ready_file(members), f"{pid}\n")


def tell_joining(members: Path, generation: int) -> None:
    """Say that this rank has left its old groups, and begins to form those of ``generation``.

    A rank that does not say so in time is stuck, and is replaced.

    Raises:
        OSError: the file beside ``members`` cannot be written.
    """
    write_durably(joining_file(members), f"{generation}\n")


def joining(members: Path) -> int | None:
    """The newest generation that the rank has begun to join. None: it has not said so."""
    try:
        return int(read_regular(joining_file(members), 100))
    except (OSError, ValueError):
        return None


def joining_file(members: Path) -> Path:
    """The file beside ``members`` by which a rank says which generation it joins."""
    return members.with_suffix(".joining")


def ready_file(members: Path) -> Path:
    """The file beside ``members`` by which a waiting process says that it is ready. Its time says when."""
    return members.with_suffix(".ready")


def lost_file(members: Path) -> Path:
    """The file beside ``members`` by which a rank says that it has lost a peer and waits for a newer generation."""
    return members.with_suffix(".lost")


def _membership_of(fields: Any) -> Membership:
    rank = fields["rank"]
    return Membership(
        attempt=str(fields["attempt"]),
        generation=int(fields["generation"]),
        rank=None if rank is None else int(rank),
        local_rank=int(fields["local_rank"]),
        nodes=tuple(map(str, fields["nodes"])),
        new=tuple(map(int, fields["new"])),
        address=str(fields["address"]),
        port=int(fields["port"]),
    )
