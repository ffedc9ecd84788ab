"""The environment variables of a rank: its number, the number of ranks, and where they meet.

torchrun and the node agent set the first group. Slurm sets its own for the tasks of a job step.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opt_ops.contract.errors import UserError

RANK = "RANK"
LOCAL_RANK = "LOCAL_RANK"
WORLD_SIZE = "WORLD_SIZE"
LOCAL_WORLD_SIZE = "LOCAL_WORLD_SIZE"
MASTER_ADDR = "MASTER_ADDR"
MASTER_PORT = "MASTER_PORT"
ELASTIC_RUN = "TORCHELASTIC_RUN_ID"
"""Set by torchrun, and by the node agent to the attempt. Frameworks take it as a sign that RANK and its like hold.

Without it, Lightning takes its ranks from Slurm, and then a request for a save would requeue the whole job.
"""
NODE = "OPT_OPS_NODE"
"""The name of the node. Only the node agent sets it."""
ATTEMPT = "OPT_OPS_ATTEMPT"
"""The folder of the attempt. Only the node agent sets it. When the attempt is over, it ends all that carry it."""
MEMBERS = "OPT_OPS_MEMBERS"
"""The file that names newer generations of the membership to this rank (`membership.py`). Set by the node agent."""
STANDBY = "OPT_OPS_STANDBY"
"""Set to 1 by the node agent for a process that has no rank yet and waits for a place in ``OPT_OPS_MEMBERS``."""

_NEEDED = (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)


class RankEnvironmentError(UserError):
    """Some of the variables that a rank needs are set and others are not. Exit code 78."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many processes this one is: in the whole job, and on its host."""

    rank: int
    world: int
    local_rank: int


def of_rank(
    place: Place,
    *,
    local_world: int,
    address: str,
    port: int,
    node: str,
    attempt: str = "opt-ops",
    folder: Path | None = None,
    members: Path | None = None,
) -> dict[str, str]:
    """The variables for one rank, to be set by the process that starts it.

    Args:
        place: which rank it is.
        local_world: ranks on its host.
        address: host of rank 0.
        port: where the ranks meet on that host.
        node: name of the node.
        attempt: name of the attempt.
        folder: of the attempt; None: no agent starts the rank.
        members: its members file; None: it has none.
    """
    found = {
        RANK: str(place.rank),
        LOCAL_RANK: str(place.local_rank),
        WORLD_SIZE: str(place.world),
        LOCAL_WORLD_SIZE: str(local_world),
        MASTER_ADDR: address,
        MASTER_PORT: str(port),
        NODE: node,
        ELASTIC_RUN: attempt,
    }
    found |= {ATTEMPT: str(folder)} if folder is not None else {}
    return found | ({MEMBERS: str(members)} if members is not None else {})


def of_standby(variables: Mapping[str, str], *, knows_local: bool) -> dict[str, str]:
    """The variables of a rank, for a process that gets its number and where ranks meet later.

    Args:
        variables: of a rank.
        knows_local: whether its number on the node is that in `variables`; else it gets that later, too.
    """
    unknown = {RANK, MASTER_ADDR, MASTER_PORT} | (set() if knows_local else {LOCAL_RANK})
    return {name: value for name, value in variables.items() if name not in unknown} | {STANDBY: "1"}


_RANK_0 = of_rank(Place(0, 1, 0), local_world=1, address="", port=0, node="", folder=Path(), members=Path())
OF_RANKS = frozenset(_RANK_0) | frozenset(of_standby(_RANK_0, knows_local=True))
"""The names of all variables that are set for ranks and standbys."""


def place_from_environment(environment: Mapping[str, str]) -> Place:
    """The place of this process: by torchrun's variables, else by Slurm's, else alone.

    Raises:
        RankEnvironmentError: RANK is set, but not all the other variables of torchrun.
    """
    if RANK in environment:
        if missing := [name for name in _NEEDED if name not in environment]:
            raise RankEnvironmentError(
                f"RANK is set but {', '.join(missing)} is not: launch with torchrun, or set all of {_NEEDED}."
            )
        return Place(int(environment[RANK]), int(environment[WORLD_SIZE]), int(environment[LOCAL_RANK]))
    if "SLURM_PROCID" in environment:
        return Place(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"]), int(environment["SLURM_LOCALID"])
        )
    return Place(0, 1, 0)


def rendezvous_from_slurm(environment: Mapping[str, str]) -> tuple[str, int]:
    """The (host, port) where the tasks of a Slurm job step meet, where nobody has chosen one.

    The host is the first node of the step. The port follows from the numbers of job and step.

    Raises:
        KeyError: this process is no task of a job step.
    """
    first_node = re.match(r"([^\[,]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    assert first_node is not None
    number = 64 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return first_node[1] + (first_node[2] or ""), 20_000 + number % 12_000


def address_of_rank_0(environment: Mapping[str, str]) -> str:
    """The host of rank 0."""
    if MASTER_ADDR in environment:
        return environment[MASTER_ADDR]
    return rendezvous_from_slurm(environment)[0] if "SLURM_STEP_NODELIST" in environment else "127.0.0.1"


def node_name(environment: Mapping[str, str]) -> str:
    """The name of this node: from the node agent, else from Slurm, else the name of the host."""
    return environment.get(NODE) or environment.get("SLURMD_NODENAME") or socket.gethostname()
