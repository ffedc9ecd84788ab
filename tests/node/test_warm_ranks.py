"""The warm process of a node and the ranks that are forked from it, by real processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.ports import Launch
from tests.node.test_agent import alive, wait_for
from tests.node.test_memberships import Members


class Warm(Members):
    """The node n1 of a lineage that keeps warm processes."""

    def warm(self, launch: Launch | None = None, standbys: int = 0) -> Launch:
        """The orders, with a warm process on this node, and standbys."""
        return replace(launch or self.launch, warm={"n1": "1-n0"}, standbys={"n1": standbys} if standbys else {})

    def elsewhere(self) -> Launch:
        """An attempt on other nodes."""
        return replace(self.launch, nodes=("n0", "n7"), holders={"n0": "1-n0", "n7": "1-n0"})

    def children(self) -> set[int]:
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def about(self, pid: int) -> dict[str, Any]:
        """What a process said of itself when it began."""
        return wait_for(lambda: self.record(pid))[0]

    def ready(self, times: int = 1) -> None:
        """Wait until a warm process was ready so many times."""
        wait_for(lambda: self.said.read_text().count("the warm process is ready") == times)

    def standby(self, *known: int) -> int:
        """The standby that is ready, and none of those that are known."""
        self.beat(lambda beat: beat.standby)

        def found() -> Any:
            pids = [int(path.name) for path in (self.folder / "said").iterdir() if path.name.isdigit()]
            waiting = [pid for pid in pids if alive(pid) and self.about(pid)["environment"]["OPT_OPS_STANDBY"]]
            return next((pid for pid in waiting if pid not in known and len(self.record(pid)) == 1), None)

        return wait_for(found)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Warm]:
    node = Warm(tmp_path)
    yield node
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def test_ranks_of_the_next_attempt_are_forked_from_the_warm_process(node: Warm):
    node.start()
    node.obey(node.warm())
    first = node.running()
    assert {node.about(pid)["prepared_by"] for pid in first.values()} == {None}, "there is no warm process yet"
    node.ready()
    node.obey(None)
    wait_for(lambda: node.report().done)
    argv = (*node.launch.argv, "--resume", "x")
    node.obey(replace(node.launch, attempt="1.00-a1", argv=argv))
    for pid, rank in zip(node.started("a1"), (2, 3), strict=True):
        about = node.about(pid)
        assert about["prepared_by"] is not None
        assert about["options"] == [str(node.folder), "--resume", "x"]
        assert (about["session"], about["parent"]) == (pid, node.process.pid)
        assert about["directory"] == str(Path.cwd())
        assert (about["environment"]["RANK"], about["environment"]["OPT_OPS_WARM"]) == (str(rank), None)
        log = node.folder / f"1.00/a1/logs/rank-{rank:04d}.log"
        wait_for(lambda log=log, rank=rank: log.exists() and log.read_text() == f"begins {rank}\n")
        found = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert f"OPT_OPS_ATTEMPT={node.folder}/1.00/a1".encode() in found, "by that what outlives a rank is found"
    pids = node.started("a1")
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not any(map(alive, pids)))


def test_a_program_that_has_changed_is_not_forked_from_what_was_imported_before(node: Warm):
    node.start()
    node.obey(node.warm())
    node.running()
    node.ready()
    (node.folder / "changed").touch()
    node.obey(None)
    wait_for(lambda: node.report().done)
    node.obey(node.warm(replace(node.launch, attempt="1.00-a1")))
    assert {node.about(pid)["prepared_by"] for pid in node.started("a1")} == {None}
    node.ready(times=2)


def test_a_new_rank_of_a_generation_is_forked_and_its_end_is_seen(node: Warm):
    node.start()
    node.obey(node.warm())
    before = node.running()
    node.ready()
    os.kill(before[3], signal.SIGKILL)
    node.ended(before[3])
    node.obey(node.warm(node.generation(2, 3)))
    after = node.running()
    assert node.about(after[3])["prepared_by"] is not None
    assert node.told(after[3], 2)["rank"] == 3
    os.kill(after[3], signal.SIGTERM)
    assert node.ended(after[3])["signal"] == signal.SIGTERM, "signals are as Python has them"
    os.kill(after[2], signal.SIGINT)
    assert node.ended(after[2])["code"] != 0 or node.ended(after[2])["signal"] == signal.SIGINT


def test_a_standby_takes_the_place_of_a_dead_rank_and_another_one_follows(node: Warm):
    node.start()
    node.obey(node.warm(standbys=1))
    before = node.running()
    waiting = node.standby()
    about = node.about(waiting)["environment"]
    assert (about["RANK"], about["OPT_OPS_STANDBY"], about["WORLD_SIZE"], about["LOCAL_RANK"]) == (None, "1", "4", None)
    os.kill(before[2], signal.SIGKILL)
    os.kill(before[3], signal.SIGKILL)
    node.ended(before[3])
    node.looks()
    assert alive(waiting), "all ranks of the node are dead, but nobody's place is given up"
    node.obey(node.warm(node.generation(2, 2, 3), standbys=1))
    after = node.running()
    assert waiting in after.values()
    rank = next(rank for rank, pid in after.items() if pid == waiting)
    assert node.told(waiting, 2)["rank"] == rank
    entry = next(each for each in node.entries() if each["pid"] == waiting)
    assert (entry["generations"], entry["log"].startswith("standby-")) == ([2, 2], True)
    assert (node.folder / "1.00/a0/logs" / entry["log"]).read_text() == "begins None\n"
    assert node.standby(waiting) != waiting
    os.kill(waiting, signal.SIGKILL)
    assert node.ended(waiting)["signal"] == signal.SIGKILL


def test_the_standbys_of_a_spare_node_take_over_all_its_ranks(node: Warm):
    node.start()
    node.obey(node.warm(node.elsewhere(), standbys=2))
    node.beat(lambda beat: beat.standby == 2)
    assert node.report() is None
    locals_ = {
        int(path.name): node.about(int(path.name))["environment"]["LOCAL_RANK"]
        for path in (node.folder / "said").iterdir()
    }
    node.obey(node.warm(node.generation(2, 2, 3)))  # no standbys on a node that is in use
    after = node.running()
    assert {rank: locals_[pid] for rank, pid in after.items()} == {2: "0", 3: "1"}
    assert node.beat(lambda beat: beat.orders == (1, node.seq)).standby == 0


def test_a_standby_that_dies_is_replaced_and_all_end_with_their_attempt(node: Warm):
    node.start()
    node.obey(node.warm(node.elsewhere(), standbys=1))
    first = node.standby()
    os.kill(first, signal.SIGKILL)
    second = node.standby(first)
    node.obey(None)
    wait_for(lambda: not alive(second))
    node.obey(replace(node.warm(node.elsewhere(), standbys=1), attempt="1.00-a1"))
    third = node.standby(first, second)
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not alive(third))


def test_a_standby_that_is_not_ready_gets_no_place(node: Warm):
    (node.folder / "slow").touch()
    node.start()
    node.obey(node.warm(node.elsewhere(), standbys=1))
    line = wait_for(lambda: next((b for b in beats(node) if b["standby"] == {"ready": 0, "warming": 1}), None))
    assert line["standby"]["warming"] == 1
    node.obey(node.warm(node.generation(2, 2, 3)))
    for pid in node.running().values():
        assert node.about(pid)["environment"]["OPT_OPS_STANDBY"] is None


def beats(node: Warm) -> list[dict[str, Any]]:
    path = node.folder / "health/n1.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_probe_does_not_wait_for_standbys_and_ends_them(node: Warm):
    node.start()
    spare = node.warm(node.elsewhere(), standbys=1)
    node.obey(spare)
    waiting = node.standby()
    probe = replace(
        node.launch,
        attempt="1-i000-same_data",
        nodes=("n1",),
        holders={"n1": "1-n0"},
        ranks_per_node=1,
        argv=("sleep", "600"),
    )
    node.obey(spare, probes=(probe,))
    path = node.folder / "probes/1-i000/same_data/nodes/n1.json"
    pid = wait_for(lambda: path.exists() and json.loads(path.read_text())["ranks"][0]["pid"])
    assert not alive(waiting)
    node.looks()
    assert node.beat().standby == 0
    node.obey(spare)
    wait_for(lambda: not alive(pid))
    assert node.standby(waiting)


def test_a_trainer_that_cannot_be_warm_starts_as_it_is(node: Warm):
    node.launch = replace(node.launch, argv=(*node.launch.argv, "cannot-be-warm"))
    node.start()
    node.obey(node.warm())
    before = node.running()
    node.says("the warm process has ended")
    os.kill(before[3], signal.SIGKILL)
    node.ended(before[3])
    node.obey(node.warm(node.generation(2, 3)))
    assert node.about(node.running()[3])["prepared_by"] is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_where_the_warm_process_fails_ranks_start_as_they_are(node: Warm, how: signal.Signals):
    short = "import opt_ops.node.warm_process as w; w.FORK_SECONDS = 0.5; import opt_ops.node.agent as a; a.main()"
    options = ["--folder", str(node.folder), "--allocation", "1-n0", "--node", "n1", "--host", "h"]
    with node.said.open("ab") as said:
        node.process = subprocess.Popen([sys.executable, "-c", short, *options], stderr=said)
    node.obey(node.warm())
    before = node.running()
    node.ready()
    (warm,) = [pid for pid in node.children() if b"OPT_OPS_WARM=" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(before[3], signal.SIGKILL)
    node.ended(before[3])
    os.kill(warm, how)
    node.obey(node.warm(node.generation(2, 3)))
    after = node.running()
    assert alive(after[2])
    if how == signal.SIGSTOP:
        assert node.about(after[3])["prepared_by"] is None
        node.says("the command is started as it is")
    node.ready(2)


def test_a_trainer_that_has_changed_gets_another_warm_process(node: Warm):
    node.start()
    node.obey(node.warm())
    node.running()
    node.ready()
    node.obey(None)
    wait_for(lambda: node.report().done)
    changed = replace(node.launch, attempt="1.00-a1", environment={"MARK": "new"})
    node.obey(node.warm(changed))
    cold = node.started("a1")
    node.says("the warm process is replaced")
    node.ready(2)
    assert {node.about(pid)["prepared_by"] for pid in cold} == {None}
    node.obey(replace(node.warm(changed), attempt="1.00-a2"))
    for pid in node.started("a2"):
        about = node.about(pid)
        assert (about["prepared_by"] is not None, about["environment"]["MARK"]) == (True, "new")


def test_the_warm_process_does_not_hear_notices_and_ends_with_its_agent(node: Warm):
    node.start()
    node.obey(node.warm(node.elsewhere()))
    node.ready()
    (warm,) = [pid for pid in node.children() if b"OPT_OPS_WARM=" in Path(f"/proc/{pid}/environ").read_bytes()]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(warm, number)
    node.looks()
    assert alive(warm)
    node.process.kill()
    node.process.wait()
    wait_for(lambda: not alive(warm))
