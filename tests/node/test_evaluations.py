"""Evaluations of checkpoints as real processes: they run on an idle node or beside the daemon, and give way at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract import environment
from opt_ops.contract.exit_codes import EVALUATION_HANGS, EVALUATION_NOT_STARTED
from opt_ops.node import evaluation_guard
from opt_ops.node.orders import OrdersRefused, orders_of
from opt_ops.node.rank_start import rank_variables, shared_variables
from opt_ops.ports import EvaluationOrder, Launch, Orders
from opt_ops.supervise.beside import BesideDaemon, Place
from tests.node.test_agent import SLEEP, Node, alive, wait_for

# It starts a process of its own, as the harness is one, and both live until they are killed.
TREE = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
    "open(sys.argv[1] + '.new', 'w').write(f'{os.getpid()} {child.pid}')\n"
    "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    "time.sleep(3600)\n"
)


class Bench(Node):
    """An agent that gets orders to evaluate."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pids_file = folder / "pids"

    def orders(self, evaluate: EvaluationOrder | None, launch: Launch | None = None, **others: Any) -> None:
        self.seq += 1
        orders = Orders(epoch=1, seq=self.seq, launch=launch, drills=(), released=(), evaluate=evaluate)
        self.agents.order(replace(orders, **others))

    def tree(self) -> list[int]:
        """The processes of the evaluation, once they run."""
        wait_for(self.pids_file.exists)
        return [int(pid) for pid in self.pids_file.read_text().split()]

    def ended(self) -> int:
        """The code that a heartbeat tells."""
        beat = self.beat(lambda beat: beat.evaluation is not None and beat.evaluation.code is not None)
        return beat.evaluation.code


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Bench]:
    node = Bench(tmp_path)
    yield node
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def order(*argv: str, name: str = "1-ev001", node: str | None = "n1", holder: str | None = "1-n0") -> EvaluationOrder:
    return EvaluationOrder(evaluation=name, node=node, holder=holder, argv=argv, nice=5)


def tree(node: Bench, name: str = "1-ev001") -> EvaluationOrder:
    return order(sys.executable, "-c", TREE, str(node.pids_file), name=name)


def launch(*nodes: str) -> Launch:
    holders = {"n1": "1-n0"} if "n1" in nodes else {}
    return Launch(attempt="1.00-a0", nodes=nodes, holders=holders, ranks_per_node=1, address="h", port=4242, argv=SLEEP)


def test_it_runs_what_is_ordered_once_with_nothing_of_an_attempt_around_it_and_says_how_it_ended(node: Bench):
    said = "import os, sys; print(os.getpriority(os.PRIO_PROCESS, 0), *sorted(os.environ)); sys.exit(3)"
    of_rank = rank_variables(node.folder, asdict(launch("n1")), "n1", 0, 0, node.folder / "members")
    names = {*of_rank, *environment.of_standby(of_rank, knows_local=True), "SLURM_PROCID", "OF_THE_SITE"}
    names -= {*shared_variables(node.folder, asdict(launch("n1")))}
    assert environment.STANDBY in names
    node.start(**dict.fromkeys(names, "1"))
    node.orders(order(sys.executable, "-c", said))
    assert node.ended() == 3
    node.looks()
    (line,) = (node.folder / "evaluations" / "1-ev001.log").read_text().splitlines()
    assert int(line.split()[0]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
    assert set(line.split()) & names == {"OF_THE_SITE"}
    node.orders(None)
    node.beat(lambda beat: beat.orders == (1, 2) and beat.evaluation is None)


def test_who_is_not_meant_starts_nothing(node: Bench):
    node.start()
    for other in (replace(tree(node), node="n2"), replace(tree(node), holder="1-n1")):
        node.orders(other)
        node.looks()
    assert not node.pids_file.exists()


@pytest.mark.parametrize("need", ["launch", "probe", "release", "no order", "another", "agent"])
def test_it_is_killed_with_all_that_it_started_when_the_node_is_needed(node: Bench, need: str):
    node.start()
    node.orders(tree(node))
    pids = node.tree()
    if need == "launch":
        node.orders(tree(node), launch("n0", "n1"))
        wait_for(node.pids)
    elif need == "probe":
        node.orders(tree(node), probes=(replace(launch("n1"), attempt="1-i001-same_data"),))
    elif need == "release":
        node.orders(tree(node), released=("1-n0",))
    elif need == "no order":
        node.orders(None)
    elif need == "another":
        node.orders(order(*SLEEP, name="1-ev002"))
        node.beat(lambda beat: beat.evaluation is not None and beat.evaluation.name == "1-ev002")
    else:
        assert node.process is not None
        os.kill(node.process.pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, pids)))


def test_ranks_do_not_wait_for_an_evaluation_that_listens_to_nothing(node: Bench):
    deaf = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)]\n"
    node.start()
    node.orders(order(sys.executable, "-c", deaf + TREE, str(node.pids_file)))
    pids = node.tree()
    node.orders(tree(node), launch("n0", "n1"))
    (rank,) = wait_for(node.pids)
    assert alive(rank)
    wait_for(lambda: not any(map(alive, pids)))
    beat = node.beat(lambda beat: beat.attempt is not None)
    assert beat.evaluation is None


def test_what_an_evaluation_leaves_behind_ends_with_it(node: Bench):
    node.start()
    node.orders(order(sys.executable, "-c", TREE.replace("time.sleep(3600)\n", ""), str(node.pids_file)))
    _, left = node.tree()
    assert node.ended() == 0
    wait_for(lambda: not alive(left))


def test_one_that_is_killed_has_failed(node: Bench):
    node.start()
    node.orders(tree(node))
    first, _ = node.tree()
    os.kill(first, signal.SIGKILL)
    assert node.ended() == 128 + signal.SIGKILL


def test_one_that_hangs_is_ended_and_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The real guard, with less patience.
    impatient = f"import sys, {evaluation_guard.__name__} as g; g.LONGEST_SECONDS = 0.1; g.main()"
    started = subprocess.Popen

    def start(argv: list[str], **others: Any) -> subprocess.Popen[bytes]:
        assert argv[1:3] == ["-m", evaluation_guard.__name__]
        return started([argv[0], "-c", impatient, *argv[3:]], **others)

    monkeypatch.setattr(subprocess, "Popen", start)
    beside, hanging = BesideDaemon(tmp_path, Place()), order(*SLEEP, node=None, holder=None)
    assert code(beside, hanging) == ("1-ev001", EVALUATION_HANGS)


def test_a_spare_that_evaluates_is_not_taken_for_one_that_something_was_left_on(node: Bench):
    node.start()
    node.orders(tree(node))
    beat = node.beat(lambda beat: beat.evaluation is not None)
    assert not beat.idle
    assert node.beat(lambda beat: beat.evaluation is not None).attempt is None


@pytest.mark.parametrize(
    "wrong",
    [{"argv": []}, {"argv": [1]}, {"evaluation": "../x"}, {"node": None}, {"holder": 3}, {"nice": -5}, {"nice": 20}],
    ids=str,
)
def test_orders_that_are_not_as_they_should_be_are_refused(wrong: dict[str, Any]):
    good = {"evaluation": "12-ev001", "node": "n1", "holder": "12-n0", "argv": ["x"], "nice": 10}
    orders = {"epoch": 1, "seq": 1, "launch": None}
    assert orders_of({**orders, "evaluate": good}, "n1")["evaluate"] == good
    with pytest.raises(OrdersRefused):
        orders_of({**orders, "evaluate": {**good, **wrong}}, "n1")


# ---- beside the daemon


def code(beside: BesideDaemon, wanted: EvaluationOrder) -> tuple[str, int]:
    def ended() -> Any:
        beside.follow(wanted)
        return beside.ended()

    (found,) = wait_for(ended)
    return found


def test_one_at_a_time_beside_the_daemon_and_the_next_lineage_follows(tmp_path: Path):
    place = Place()
    first, second = BesideDaemon(tmp_path / "1", place), BesideDaemon(tmp_path / "2", place)
    for lineage in ("1", "2"):
        (tmp_path / lineage).mkdir()
    pids = tmp_path / "pids"
    long = order(sys.executable, "-c", TREE, str(pids), node=None, holder=None)
    short = order("true", name="2-ev001", node=None, holder=None)
    first.follow(long)
    second.follow(short)
    wait_for(pids.exists)
    for _ in range(5):
        first.follow(long)
        second.follow(short)
        time.sleep(0.02)
    assert second.ended() == []
    assert not (tmp_path / "2" / "evaluations").exists()
    first.follow(None)
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.read_text().split()))
    wait_for(lambda: place.reap() or not place.killed)
    assert first.ended() == [], "it was ended, and did not end by itself"
    assert code(second, short) == ("2-ev001", 0)
    assert code(first, order("false", node=None, holder=None)) == ("1-ev001", 1)
    assert not place.queue


def test_a_command_that_is_not_there_is_a_failure_and_no_end_of_the_watch(tmp_path: Path):
    beside = BesideDaemon(tmp_path, Place())
    assert code(beside, order("/no/such/program", node=None, holder=None)) == ("1-ev001", 1)
    assert "/no/such/program" in (tmp_path / "evaluations" / "1-ev001.log").read_text()


def test_one_that_cannot_be_started_has_failed_and_holds_up_no_other_lineage(tmp_path: Path):
    place = Place()
    first, second = BesideDaemon(tmp_path / "1", place), BesideDaemon(tmp_path / "2", place)
    (tmp_path / "1" / "evaluations").mkdir(parents=True)
    os.mkfifo(tmp_path / "1" / "evaluations" / "1-ev001.log")
    (tmp_path / "2").mkdir()
    assert code(first, order("true", node=None, holder=None)) == ("1-ev001", EVALUATION_NOT_STARTED)
    assert code(second, order("true", name="2-ev001", node=None, holder=None)) == ("2-ev001", 0)


def test_one_that_cannot_be_started_on_a_node_has_failed(node: Bench):
    (node.folder / "evaluations").mkdir()
    os.mkfifo(node.folder / "evaluations" / "1-ev001.log")
    node.start()
    node.orders(order("true"))
    assert node.ended() == EVALUATION_NOT_STARTED
