"""How a rank hears of a newer generation, while its main thread does something else."""

import threading
import time
from pathlib import Path
from typing import Any, cast

from opt_ops.contract.membership import MembersFile, Membership, write_membership
from trainer.recovery.connections import Connections
from trainer.recovery.rejoin import Members


def order(path: Path, generation: int) -> None:
    nodes = ("n0", "n1")
    write_membership(
        path,
        Membership(
            attempt="1.00-a1",
            generation=generation,
            rank=0,
            local_rank=0,
            nodes=nodes,
            new=(0,),
            address="127.0.0.1",
            port=1,
        ),
    )


class Groups:
    """Stands in for the connections of a generation."""

    def __init__(self, members: Members, said: list[str]) -> None:
        self._members, self._said = members, said

    def cut(self) -> None:
        assert self._members.is_cut, "until this is known, results of a collective that was cut off count"
        time.sleep(0.2)  # a busy machine
        self._said.append("cut")


def test_a_rank_without_groups_ends_nothing_when_it_gets_a_place(tmp_path: Path) -> None:
    """Its main thread starts the writer of the new generation at the same moment."""
    said: list[str] = []
    members = Members(MembersFile(tmp_path / "members.json"))
    members.watch(lambda: said.append("writer ended"))
    order(tmp_path / "members.json", 2)
    assert members.wait_for_newer().generation == 2
    time.sleep(0.3)
    assert said == []


def test_the_old_groups_are_cut_before_the_main_thread_hears_of_the_newer_generation(tmp_path: Path) -> None:
    """Else those are cut that it forms next."""
    said: list[str] = []
    members = Members(MembersFile(tmp_path / "members.json"))
    cast("Any", members)._connections = cast("Connections", Groups(members, said))
    members.watch(lambda: said.append("writer ended"))
    waiting = threading.Thread(target=lambda: (members.wait_for_newer(), said.append("heard")))
    waiting.start()
    order(tmp_path / "members.json", 2)
    waiting.join(30)
    assert said[:3] == ["cut", "writer ended", "heard"]
