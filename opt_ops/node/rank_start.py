"""Starts processes of the trainer: with the variables of their place, from a warm process where there is one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from opt_ops.contract import environment
from opt_ops.contract.files import open_append
from opt_ops.core.names import attempt_folder
from opt_ops.node.places import meeting_of, ranks_of
from opt_ops.node.process_groups import ChildProcess, die_with_parent

PIPE, TRACE = "nccl-", "nccl/rank-"  # names for NCCL's flight recorder, each followed by the rank


class Starter(Protocol):
    """What starts a process of the trainer."""

    def start(self, launch: Mapping[str, Any], variables: Mapping[str, str], log: Path) -> ChildProcess:
        """Start it, with its output appended to `log`.

        Raises:
            OSError: it cannot be started.
        """
        ...


class ColdStart:
    """Starts the command of the launch as it is."""

    def start(self, launch: Mapping[str, Any], variables: Mapping[str, str], log: Path) -> ChildProcess:
        """Start it, with its output appended to `log`.

        Raises:
            OSError: it cannot be started.
        """
        with open_append(log) as file:
            return subprocess.Popen(
                launch["argv"],
                env=dict(variables),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  (the agent has no threads)
            )


def shared_variables(lineage: Path, launch: Mapping[str, Any]) -> dict[str, str]:
    """What all processes of an attempt get, with or without a place."""
    folder = lineage / attempt_folder(launch["attempt"])
    return {
        **_flight_recorder(folder / "stacks"),  # settings of the site override these
        **os.environ,
        **launch["environment"],
        "PYTHONUNBUFFERED": "1",
    }


def rank_variables(
    lineage: Path, launch: Mapping[str, Any], node: str, rank: int, local: int, members: Path
) -> dict[str, str]:
    """What a process gets that has a place. `members`: its members file."""
    address, port = meeting_of(launch)
    return {
        **shared_variables(lineage, launch),
        **environment.of_rank(
            environment.Place(rank, len(ranks_of(launch)), local),
            local_world=launch["ranks_per_node"],
            address=address,
            port=port,
            node=node,
            attempt=launch["attempt"],
            folder=lineage.absolute() / attempt_folder(launch["attempt"]),
            members=members,
        ),
    }


def _flight_recorder(folder: Path) -> dict[str, str]:
    """Settings of torch's NCCL flight recorder: its request pipe (torch's DumpPipe) and its trace file.

    torch appends the rank to each name. `torchfrtrace` reads the trace files.
    """
    trace = f"{folder / TRACE}"
    return {
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": f"{folder / PIPE}",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": trace,
        "TORCH_FR_DUMP_TEMP_FILE": trace,
    }
