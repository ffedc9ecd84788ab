"""A membership that changes under running ranks: who goes on, who starts, who ends, and what is reported."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract.membership import joining_file, tell_joining
from opt_ops.node import members_folder
from opt_ops.node.members_folder import MembersFolder
from opt_ops.ports import Drilling, Launch, Membership, Orders
from tests.node.test_agent import Node, alive, wait_for

TRAINER = str(Path(__file__).with_name("stand_in_trainer.py"))


class Members(Node):
    """The node n1 of an attempt on n0 and n1 with two ranks each: its ranks are 2 and 3."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.launch = Launch(
            attempt="1.00-a0",
            nodes=("n0", "n1"),
            holders={"n0": "1-n0", "n1": "1-n0"},
            ranks_per_node=2,
            address="10.0.0.1",
            port=4242,
            argv=(sys.executable, TRAINER, str(folder)),
        )

    def obey(self, launch: Launch | None, **more: Any) -> None:
        """Write orders for the agent."""
        self.seq += 1
        self.agents.order(
            Orders(epoch=1, seq=self.seq, launch=launch, drills=more.pop("drills", ()), released=(), **more)
        )

    def generation(self, number: int, *new: int, nodes: tuple[str, ...] = ("n0", "n1")) -> Launch:
        """The orders with this generation, in which these ranks start."""
        ranks = tuple((node, local) for node in nodes for local in range(2))
        members = Membership(generation=number, ranks=ranks, new=new, address="10.0.0.2", port=5000 + number)
        return replace(self.launch, nodes=nodes, holders=dict.fromkeys(nodes, "1-n0"), membership=members)

    def record(self, pid: int) -> list[dict[str, Any]]:
        path = self.folder / "said" / str(pid)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self, pid: int, generation: int) -> dict[str, Any]:
        """What the process has read of a generation."""
        found = lambda: next((each for each in self.record(pid) if each.get("generation") == generation), None)  # noqa: E731
        return wait_for(found)

    def entries(self) -> list[dict[str, Any]]:
        path = self.folder / "1.00/a0/nodes/n1.json"
        return json.loads(path.read_text())["ranks"] if path.exists() else []

    def running(self, count: int = 2) -> dict[int, int]:
        """By rank the processes that run, once so many have begun to do their work."""

        def found() -> Any:
            pids = {each["rank"]: each["pid"] for each in self.entries() if each["ended"] is None and each["pid"]}
            return len(pids) == count and all(self.record(pid) for pid in pids.values()) and pids

        return wait_for(found)

    def ended(self, pid: int) -> dict[str, Any]:
        """The entry of a process that has ended."""
        return wait_for(lambda: next((e for e in self.entries() if e["pid"] == pid and e["ended"]), None))

    def waits(self) -> Any:
        """Wait until the agent has read the newest orders."""
        return self.beat(lambda beat: beat.orders == (1, self.seq))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Members]:
    node = Members(tmp_path)
    yield node
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def launched(node: Members) -> dict[int, int]:
    """Start the attempt. Returns the processes of its ranks here."""
    node.start()
    node.obey(node.launch)
    return node.running()


def loses(node: Members, rank: int) -> dict[int, int]:
    """Start the attempt, and kill a rank. Returns the processes before."""
    before = launched(node)
    os.kill(before[rank], signal.SIGKILL)
    node.ended(before[rank])
    return before


def replaced(node: Members, rank: int = 3) -> tuple[dict[int, int], dict[int, int]]:
    """Kill a rank, and order its replacement. Returns the processes before and after."""
    before = loses(node, rank)
    node.obey(node.generation(2, rank))
    return before, node.running()


def test_a_dead_rank_is_replaced_and_the_other_goes_on(node: Members):
    before, after = replaced(node)
    assert after[2] == before[2]
    assert after[3] != before[3]
    for rank in (2, 3):
        told = node.told(after[rank], 2)
        assert (told["rank"], told["nodes"], told["new"], told["port"]) == (rank, ["n0", "n0", "n1", "n1"], [3], 5002)
    found = node.record(after[3])[0]["environment"]
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")] == [
        "3", "4", "1", "10.0.0.2", "5002",
    ]  # fmt: skip
    assert node.record(after[2])[0]["environment"]["MASTER_PORT"] == "4242"


def test_the_report_has_each_process_and_its_generations(node: Members):
    before, after = replaced(node)
    generations = {each["pid"]: each["generations"] for each in node.entries()}
    assert generations == {before[2]: [1, 2], before[3]: [1, 1], after[3]: [2, 2]}
    report = node.report()
    assert [(end.rank, end.signal, end.generation) for end in report.exits] == [(3, signal.SIGKILL, 1)]
    assert {rank: found[:2] for rank, found in report.pids.items()} == {2: (1, before[2]), 3: (2, after[3])}
    assert report.pids[2][2] <= report.pids[3][2]
    assert not report.done, "the newest process of each rank counts"
    node.obey(None)
    report = wait_for(lambda: (r := node.report()).done and r)
    assert sorted((end.rank, end.generation) for end in report.exits) == [(2, 2), (3, 1), (3, 2)]


def test_the_report_says_which_generation_a_rank_has_begun_to_join(node: Members):
    _, after = replaced(node)
    members = {rank: Path(node.record(pid)[0]["environment"]["OPT_OPS_MEMBERS"]) for rank, pid in after.items()}
    tell_joining(members[2], 2)
    joining_file(members[3]).write_text("soon")
    wait_for(lambda: node.report().joining == {2: 2})
    node.obey(node.generation(3))
    node.told(after[3], 3)
    tell_joining(members[3], 3)
    wait_for(lambda: node.report().joining == {2: 2, 3: 3})


def test_what_the_dead_process_left_ends_and_what_the_new_one_starts_stays(node: Members):
    starts = "import subprocess, sys, os; subprocess.Popen(['sleep', '600'], start_new_session=True); "
    starts += (
        f"sys.argv = {[TRAINER, str(node.folder)]!r}; import runpy; runpy.run_path({TRAINER!r}, run_name='__main__')"
    )
    node.launch = replace(node.launch, argv=(sys.executable, "-c", starts))

    def child(pid: int) -> int:
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    before = launched(node)
    left, other = child(before[3]), child(before[2])
    os.kill(before[3], signal.SIGKILL)
    node.ended(before[3])
    node.obey(node.generation(2, 3))
    new = child(node.running()[3])
    wait_for(lambda: not alive(left))
    node.looks()
    assert alive(other)
    assert alive(new)


def test_the_same_order_twice_changes_nothing(node: Members):
    _, after = replaced(node)
    node.obey(replace(node.generation(2, 3), port=9))
    node.waits()
    node.looks()
    assert node.running() == after
    assert len(node.entries()) == 3
    assert [each.get("generation") for each in node.record(after[2])] == [None, 2]


def test_a_generation_that_was_never_read_is_made_up_for(node: Members):
    """Generation 3 replaced rank 3; generation 4 replaces another one, elsewhere."""
    before = loses(node, 3)
    node.obey(node.generation(4, 0))
    after = node.running()
    assert after[2] == before[2]
    assert node.told(after[2], 4)["new"] == [0]
    assert node.told(after[3], 4)["new"] == [0, 3], "by that it knows that it was not there before"
    assert {each["pid"]: each["generations"] for each in node.entries()}[after[3]] == [4, 4]


def test_a_rank_that_died_and_is_not_replaced_stays_dead(node: Members):
    before = loses(node, 3)
    node.obey(node.generation(2, 0))
    node.told(before[2], 2)
    node.looks()
    assert node.running(1) == {2: before[2]}


def test_a_rank_that_is_stopped_is_killed_at_once_when_it_is_replaced(node: Members):
    before = launched(node)
    os.kill(before[2], signal.SIGSTOP)
    node.obey(node.generation(2, 2))
    assert node.ended(before[2])["signal"] == signal.SIGKILL
    after = node.running()
    assert (after[3], after[2] != before[2]) == (before[3], True)


def test_a_node_that_leaves_ends_its_ranks_and_comes_back_with_new_ones(node: Members):
    before = launched(node)
    node.obey(node.generation(2, 2, 3, nodes=("n0", "n9")))
    report = wait_for(lambda: (r := node.report()).done and r)
    assert {end.rank: end.generation for end in report.exits} == {2: 1, 3: 1}
    assert not any(map(alive, before.values()))
    node.obey(node.generation(3, 2, 3))
    after = node.running()
    assert set(after) == {2, 3}
    assert [node.told(after[rank], 3)["rank"] for rank in (2, 3)] == [2, 3]
    assert len(node.entries()) == 4


def test_a_node_that_is_new_in_the_attempt_creates_its_report(node: Members):
    node.start()
    node.obey(replace(node.launch, nodes=("n0", "n7"), holders={"n0": "1-n0", "n7": "1-n0"}))
    node.waits()
    assert node.report() is None
    node.obey(node.generation(2, 2, 3))
    after = node.running()
    assert {rank: node.told(pid, 2)["rank"] for rank, pid in after.items()} == {2: 2, 3: 3}
    assert [each["generations"] for each in node.entries()] == [[2, 2], [2, 2]]


def test_a_new_agent_starts_only_what_a_newer_generation_names(node: Members):
    """The ranks of the agent before have died with it."""
    before = launched(node)
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not any(map(alive, before.values())))
    node.start()
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    assert {end.signal for end in report.exits} == {signal.SIGKILL}
    node.obey(node.generation(2, 2, 3))
    after = node.running()
    assert set(after) == {2, 3}
    assert len(node.entries()) == 4
    node.process.kill()
    node.process.wait()
    node.start()  # and again, in the middle of a generation
    wait_for(lambda: node.report().done)
    node.looks()
    assert len(node.entries()) == 4


def test_a_rank_that_has_lost_a_peer_is_in_the_heartbeat_at_once(node: Members):
    node.start()
    node.obey(node.launch)
    pids = node.running()
    assert not node.beat().peer_lost
    (node.folder / "lose-3").touch()
    node.beat(lambda beat: beat.peer_lost)
    node.obey(node.generation(2, 0))
    node.told(pids[3], 2)
    assert not node.beat(lambda beat: beat.orders == (1, node.seq) and not beat.peer_lost).peer_lost


def test_a_drill_meets_the_newest_process(node: Members):
    _, after = replaced(node)
    drill = Drilling(drill="d0", fault="kill-rank", node=None, arguments={"attempt": "1.00-a0", "rank": 3})
    node.obey(node.generation(2, 3), drills=(drill,))
    assert node.ended(after[3])["signal"] == signal.SIGKILL
    assert alive(after[2])


def test_the_log_of_a_replacement_is_told_apart(node: Members):
    """Both append to one file. What the dead one said is no cause of the end of the other."""
    code = "import os, sys, time; new = os.path.exists(os.environ['OPT_OPS_MEMBERS']); "
    code += "print('CUDA error: out of memory' if not new else 'second', flush=True); "
    code += "sys.exit(7) if new or os.environ['RANK'] == '3' else time.sleep(600)"
    node.launch = replace(node.launch, argv=(sys.executable, "-c", code))
    node.start()
    node.obey(node.launch)
    wait_for(lambda: (r := node.report()) and r.exits)
    node.obey(node.generation(2, 3))
    first, second = wait_for(lambda: len(found := [e for e in node.entries() if e["ended"]]) == 2 and found)
    assert [each["line"] for each in first["causes"]] == ["CUDA error: out of memory"]
    assert (second["causes"], second["tail"]) == ([], "second")


# ---- the folder of members files


def test_what_a_killed_agent_left_is_removed_and_what_is_used_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(members_folder, "MEMORY", tmp_path)
    killed, used = MembersFolder(), MembersFolder()
    os.close(killed._lock)
    (tmp_path / "opt-ops-members-0-of-another-program").mkdir()
    kept = MembersFolder()
    assert not killed.path.exists()
    assert [each.path.exists() for each in (used, kept)] == [True, True]
    assert (tmp_path / "opt-ops-members-0-of-another-program").exists(), "nobody has locked it ever"
    assert kept.path.stat().st_mode & 0o077 == 0
    assert kept.name("rank-0003") != kept.name("rank-0003")
    for each in (used, kept):
        each.close()
        assert not each.path.exists()


def test_an_agent_leaves_no_folder_behind(node: Members):
    node.start()
    node.obey(node.launch)
    variables = Path(f"/proc/{node.running()[2]}/environ").read_text().split("\0")
    (members,) = [Path(each.partition("=")[2]) for each in variables if each.startswith("OPT_OPS_MEMBERS=")]
    assert members.parent.is_dir()
    node.process.send_signal(signal.SIGTERM)
    node.obey(None)
    node.process.wait(240)
    assert not members.parent.exists()
