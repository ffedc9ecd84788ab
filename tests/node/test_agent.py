"""The node agent with real processes: it runs what is ordered, once, and reports on it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.detect.stacks import main_thread
from opt_ops.core.failures.classify_exit import blame
from opt_ops.core.health import judge
from opt_ops.core.values import Verdict
from opt_ops.node.process_groups import die_with_parent
from opt_ops.ports import Drilling, Launch, NodeRanksReport, Orders
from opt_ops.runfolder.files import write_json
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.supervise.exits import failed_ranks
from tests.fake_nvml.build import FakeDriver

SLEEP = ("sleep", "3600")  # any signal ends it, at once: Python may still be starting, and then it ends otherwise


def wait_for(what: Callable[[], Any], seconds: float = 300.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Node:
    """One agent of a lineage, and the orders that it follows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents = FileAgents(folder)
        self.beats: list[Any] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.said = folder / "agent.err"
        self.seq = 0

    def start(self, *before: str, **environment: str) -> None:
        command = [
            *before,
            sys.executable,
            "-m",
            "opt_ops.node",
            "agent",
            "--folder",
            str(self.folder),
            "--allocation",
            "1-n0",
        ]
        command += ["--node", "n1", "--host", "h"]
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, stderr=said)

    def says(self, words: str) -> None:
        """Wait for a line of its log."""
        wait_for(lambda: words in self.said.read_text())

    def order(
        self,
        argv: tuple[str, ...] | None,
        *,
        attempt: str = "1.00-a0",
        epoch: int = 1,
        drills: tuple = (),
        **changes: Any,
    ) -> None:
        self.seq += 1
        launch = argv and Launch(
            attempt=attempt,
            nodes=("n0", "n1"),
            holders={"n1": changes.get("holder", "1-n0")},
            ranks_per_node=2,
            address="10.0.0.1",
            port=4242,
            argv=argv,
        )
        orders = Orders(
            epoch=epoch,
            seq=self.seq,
            launch=launch,
            drills=drills,
            released=changes.get("released", ()),
            save=changes.get("save"),
            dump=changes.get("dump"),
            burn_in_seconds=changes.get("burn_in_seconds", 0.0),
        )
        self.agents.order(orders)

    def report(self, attempt: str = "1.00-a0") -> NodeRanksReport | None:
        return self.agents.reports(attempt).get("n1")

    def pids(self, attempt: str = "a0") -> list[int]:
        path = self.folder / "1.00" / attempt / "nodes" / "n1.json"
        ranks = json.loads(path.read_text())["ranks"] if path.exists() else []
        return [rank["pid"] for rank in ranks if rank["pid"] is not None]

    def started(self, attempt: str = "a0") -> list[int]:
        return wait_for(lambda: len(self.pids(attempt)) == 2 and self.pids(attempt))

    def beat(self, that: Callable[[Any], bool] = lambda _: True) -> Any:
        def found() -> Any:
            self.beats += self.agents.heartbeats()
            return next((beat for beat in reversed(self.beats) if that(beat)), None)

        return wait_for(found)

    def looks(self) -> Any:
        """Wait until the agent has looked at its orders at least once from now on; the heartbeat that says so."""
        now = time.time()
        first = self.beat(lambda beat: beat.ts > now)
        return self.beat(lambda beat: beat.ts > first.ts)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    if node.process is not None:
        node.process.kill()
        node.process.wait()


def test_it_starts_its_ranks_with_what_they_need_and_says_so(node: Node):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    code = f"import os; print(*(os.environ[n] for n in {names!r}))"
    node.start()
    node.order((sys.executable, "-c", code))
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    logs = [(node.folder / "1.00/a0/logs" / f"rank-000{rank}.log").read_text() for rank in (2, 3)]
    assert logs == ["2 0 4 10.0.0.1 4242\n", "3 1 4 10.0.0.1 4242\n"]
    assert [(x.rank, x.code, x.signal) for x in sorted(report.exits, key=lambda x: x.rank)] == [
        (2, 0, None),
        (3, 0, None),
    ]


@pytest.mark.parametrize("before", [(), ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")], ids=["usual", "background"])
def test_it_ends_ranks_that_are_not_ordered_any_more(node: Node, before: tuple[str, ...]):
    """Also if the agent runs in the background of a script, which ignores SIGINT."""
    node.start(*before)
    node.order(SLEEP)
    pids = node.started()
    assert not node.report().done
    node.order(None)
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    assert {x.signal for x in report.exits} == {signal.SIGINT}
    assert not any(map(alive, pids))


def test_a_rank_that_does_not_listen_is_killed(node: Node):
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(3600)"
    )
    node.start()
    node.order((sys.executable, "-c", deaf))
    node.started()
    log = node.folder / "1.00/a0/logs/rank-0002.log"
    wait_for(lambda: log.exists() and "deaf" in log.read_text())
    node.order(None)
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    assert signal.SIGKILL in {x.signal for x in report.exits}


def test_the_next_attempt_begins_when_the_last_one_is_gone(node: Node):
    node.start()
    node.order(SLEEP)
    old = node.started()
    node.order(SLEEP, attempt="1.00-a1")
    new = node.started("a1")
    assert not any(map(alive, old))
    assert all(map(alive, new))


def test_who_fell_first_is_known(node: Node):
    go = node.folder / "go"
    second = "import os, time\n"
    second += f"while os.environ['LOCAL_RANK'] == '1' and not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
    second += "raise SystemExit(7 + int(os.environ['RANK']))"
    node.start()
    node.order((sys.executable, "-c", second))
    wait_for(lambda: (r := node.report()) and r.exits)
    between = time.time()
    go.touch()
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    first, last = sorted(report.exits, key=lambda x: x.at)
    assert (first.rank, first.code, last.rank, last.code) == (2, 9, 3, 10)
    assert first.at < between < last.at


def test_ranks_die_with_their_agent_and_are_not_started_twice(node: Node):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    node.process.kill()
    wait_for(lambda: not any(map(alive, pids)))
    node.process.wait()
    node.start()
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    assert {x.signal for x in report.exits} == {signal.SIGKILL}
    assert node.pids() == pids


def test_a_rank_whose_agent_dies_while_it_starts_does_not_start():
    not_its_parent = partial(die_with_parent, os.getppid())
    rank = subprocess.Popen(["sleep", "600"], preexec_fn=not_its_parent)  # noqa: PLW1509
    assert rank.wait(240) == -signal.SIGKILL


def test_an_older_daemons_orders_are_not_obeyed(node: Node):
    node.start()
    node.order(SLEEP, epoch=2)
    pids = node.started()
    node.beat(lambda beat: beat.orders == (2, 1))
    node.order(None, epoch=1)
    assert node.looks().orders == (2, 1)
    assert all(map(alive, pids))


def test_a_drill_kills_one_rank_once(node: Node):
    drill = Drilling(drill="d0", fault="kill-rank", node=None, arguments={"attempt": "1.00-a0", "rank": 3})
    node.start()
    node.order(SLEEP)
    node.started()
    node.order(SLEEP, drills=(drill,))
    report = wait_for(lambda: (r := node.report()) and r.exits and r)
    assert [(x.rank, x.signal) for x in report.exits] == [(3, signal.SIGKILL)]
    node.order(SLEEP, attempt="1.00-a1", drills=(drill,))
    again = node.started("a1")
    node.looks()
    assert all(map(alive, again))


def test_a_drill_kills_the_ranks_of_a_pair_that_are_here(node: Node):
    drill = Drilling(drill="d0", fault="kill-pair", node=None, arguments={"attempt": "1.00-a0", "ranks": [3, 77]})
    node.start()
    node.order(SLEEP)
    node.started()
    node.order(SLEEP, drills=(drill,))
    report = wait_for(lambda: (r := node.report()) and r.exits and r)
    assert [(x.rank, x.signal) for x in report.exits] == [(3, signal.SIGKILL)]


def test_a_drilled_xid_is_in_the_heartbeat_with_its_mark(node: Node):
    drill = Drilling(drill="d1", fault="xid", node="n1", arguments={"attempt": "1.00-a0", "node": "n1", "xid": 79})
    node.start()
    node.order(None, drills=(drill,))
    (xid,) = node.beat(lambda beat: beat.xids).xids
    assert (xid.code, xid.drill) == (79, "d1")
    assert "drill d1" in xid.line


def test_released_it_leaves(node: Node):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    node.order(None, released=("1-n7",))
    node.beat(lambda beat: beat.orders == (1, node.seq))
    assert node.process.poll() is None, "another allocation was released"
    node.order(None, released=("1-n0",))
    assert node.process.wait(timeout=240) == 0
    assert not any(map(alive, pids))


def test_a_program_that_does_not_exist_is_reported_as_127(node: Node):
    node.start()
    node.order(("/no/such/python",))
    report = wait_for(lambda: (r := node.report()) and r.done and r)
    assert {x.code for x in report.exits} == {127}
    assert "cannot start /no/such/python" in (node.folder / "1.00/a0/logs/rank-0002.log").read_text()


def test_without_nvml_it_says_so(node: Node):
    node.start(LD_LIBRARY_PATH="")
    assert node.beat().nvml in ("absent", "ok", "driver_not_loaded")


def test_it_reports_what_the_driver_says_while_it_runs(node: Node, nvml_library: Path):
    driver = FakeDriver(node.folder, gpus=2, library=nvml_library)
    node.start(**driver.env)
    beat = node.beat(lambda beat: beat.nvml == "ok")
    assert [gpu.ecc_uncorrected for gpu in beat.gpus] == [0, 0]
    driver.set(1, ecc_volatile_uncorrected=2)
    assert node.beat(lambda beat: beat.gpus[1].ecc_uncorrected == 2)
    driver.lose(0)
    lost = node.beat(lambda beat: beat.gpus[0].error).gpus[0]
    assert (lost.error, lost.uuid) == ("gpu_is_lost", beat.gpus[0].uuid), "its identity is remembered"


@pytest.fixture(scope="session")
def dying_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that ends its process while the file $NVML_DIES exists."""
    folder = tmp_path_factory.mktemp("dying")
    source = Path(__file__).with_name("data") / "nvml_dies.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


def test_a_reader_that_dies_again_and_again_leaves_no_old_values(node: Node, dying_library: Path):
    dies = node.folder / "dies"
    node.start(LD_LIBRARY_PATH=str(dying_library), NVML_DIES=str(dies))
    assert len(node.beat(lambda beat: beat.nvml == "ok").gpus) == 2
    dies.touch()
    crashed = node.beat(lambda beat: beat.nvml == "crashed")
    assert crashed.gpus == ()
    assert node.looks().nvml == "crashed", "heartbeats go on"
    assert judge(crashed, 0).reason == "nvml_crashed"


def test_where_no_reading_ever_came_heartbeats_go_on_with_the_kernel_log(node: Node, dying_library: Path):
    dies = node.folder / "dies"
    dies.touch()
    drill = Drilling(drill="d1", fault="xid", node="n1", arguments={"attempt": "1.00-a0", "node": "n1", "xid": 79})
    node.order(SLEEP, drills=(drill,))
    node.start(LD_LIBRARY_PATH=str(dying_library), NVML_DIES=str(dies))
    node.started()
    found = node.beat(lambda beat: beat.nvml == "crashed" and beat.xids and beat.attempt)
    assert (found.attempt, found.xids[0].code) == ("1.00-a0", 79)
    assert judge(found, 2).reason == "xid_79"
    assert node.beat(lambda beat: beat.machine.disk_size), "the host is read by another process"


def test_its_reading_processes_end_with_it_also_while_a_call_hangs(node: Node, nvml_library: Path):
    driver = FakeDriver(node.folder, gpus=2, library=nvml_library)
    node.start(**driver.env)
    node.beat(lambda beat: beat.nvml == "ok" and beat.machine.disk_size)
    driver.hang(1)
    agent = node.process.pid
    readers = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    assert len(readers) == 2
    node.looks()
    node.process.kill()
    wait_for(lambda: not any(map(alive, readers)))


def test_a_hung_driver_is_a_reading_and_does_not_stop_the_agent(
    node: Node, nvml_library: Path, monkeypatch: pytest.MonkeyPatch
):
    driver = FakeDriver(node.folder, gpus=2, library=nvml_library)
    deadline = "import opt_ops.node.agent as a; a.READING_DEADLINE = 10.0; a.main()"
    arguments = ["--folder", str(node.folder), "--allocation", "1-n0", "--node", "n1", "--host", "h"]
    node.process = subprocess.Popen([sys.executable, "-c", deadline, *arguments], env={**os.environ, **driver.env})
    node.beat(lambda beat: beat.nvml == "ok")
    driver.hang(1)
    node.beat(lambda beat: beat.nvml == "hung")
    node.order(SLEEP)
    node.started()
    driver.resume(1)
    assert len(node.beat(lambda beat: beat.nvml == "ok" and beat.attempt == "1.00-a0").gpus) == 2


def put_folder_in_place_of(path: Path) -> None:
    """With something in it. The agent may write the file again at any moment."""
    while True:
        path.unlink(missing_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        (path / "x").touch()
        return


def test_a_full_disk_for_reports_does_not_end_the_ranks(node: Node):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    nodes = node.folder / "1.00/a0/nodes"
    health = node.folder / "health"
    node.beat()
    # A folder in place of the file makes every write fail, as a full disk does.
    for path in (nodes / "n1.json", health / "n1.jsonl"):
        put_folder_in_place_of(path)
    os.kill(pids[0], signal.SIGKILL)
    for path in (nodes / "n1.json", health / "n1.jsonl"):
        node.says(f"opt-ops agent: {path} cannot be written: ")
    assert alive(pids[1])
    assert node.process.poll() is None
    for path in (nodes / "n1.json", health / "n1.jsonl"):
        (path / "x").unlink()
        path.rmdir()
    report = wait_for(lambda: (r := node.report()) and r.exits and r)
    assert report.exits[0].signal == signal.SIGKILL
    node.looks()


@pytest.mark.parametrize("damaged", [True, False])
def test_orders_that_cannot_be_read_end_nothing(node: Node, damaged: bool):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    orders = node.folder / "orders.json"
    if damaged:
        orders.write_text('{"epoch": 1, "se')
    else:  # a folder in its place cannot be read, like a file on a server that fails for a moment
        orders.unlink()
        orders.mkdir()
    node.says("orders.json")
    node.looks()
    assert node.process.poll() is None
    assert all(map(alive, pids))
    if not damaged:
        orders.rmdir()
    node.order(None)
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("wrong", [{"epoch": "new"}, {"epoch": 9, "launch": [1]}, {"seq": None}])
def test_orders_of_a_wrong_type_are_told_and_end_nothing(node: Node, wrong: dict[str, Any]):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    path = node.folder / "orders.json"
    write_json(path, {**json.loads(path.read_text()), **wrong})
    refused = node.beat(lambda beat: beat.orders_refused)
    assert next(iter(wrong if "launch" not in wrong else ["launch"])) in refused.orders_refused
    assert refused.attempt == "1.00-a0"
    assert node.process.poll() is None
    assert all(map(alive, pids))
    node.order(None)
    wait_for(lambda: not any(map(alive, pids)))
    assert node.beat(lambda beat: beat.orders == (1, node.seq)).orders_refused is None


def test_a_pipe_in_place_of_its_health_file_does_not_hold_it_up(node: Node):
    (node.folder / "health").mkdir()
    os.mkfifo(node.folder / "health" / "n1.jsonl")
    node.start()
    node.order(SLEEP)
    node.started()
    node.says("n1.jsonl cannot be written")
    (node.folder / "health" / "n1.jsonl").unlink()
    node.looks()


def test_what_it_and_its_ranks_write_only_its_user_may_change(node: Node):
    node.start("sh", "-c", 'umask 002; exec "$@"', "sh")
    node.order((sys.executable, "-c", f"open({str(node.folder / 'made')!r}, 'w').close()"))
    wait_for(lambda: (r := node.report()) and r.done)
    node.beat()
    modes = {path: path.stat().st_mode & 0o022 for path in node.folder.rglob("*") if path != node.said}
    assert len(modes) > 5
    assert not any(modes.values()), modes


def test_an_agent_whose_folder_was_renamed_ends_its_ranks_and_leaves(node: Node, tmp_path: Path):
    node.folder = tmp_path / "runs" / "1"
    node.folder.mkdir(parents=True)
    node.agents = FileAgents(node.folder)
    node.start()
    node.order(SLEEP)
    pids = node.started()
    node.beat()
    node.folder.rename(tmp_path / "runs" / "away")
    assert node.process.wait(240) == 0
    wait_for(lambda: not any(map(alive, pids)))
    assert not node.folder.exists(), "it does not come back as a ghost"


def test_a_launch_that_finds_no_room_is_tried_again(node: Node):
    in_the_way = node.folder / "1.00"
    in_the_way.touch()  # nothing can be written below it, as on a full disk
    node.start()
    node.order(SLEEP)
    node.beat(lambda beat: beat.attempt is None)
    node.says("the orders cannot be carried out yet")
    assert node.process.poll() is None
    in_the_way.unlink()
    assert all(map(alive, node.started()))


def test_which_node_is_this(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "SLURMD_NODENAME"}
    command = [sys.executable, "-m", "opt_ops.node", "agent", "--folder", str(tmp_path), "--allocation", "1-n0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "opt-ops agent: the node has no name" in done.stderr


def test_orders_written_before_the_agent_are_followed(node: Node):
    write_json(node.folder / "orders.json", {"v": 1})
    node.order(SLEEP)
    node.start()
    assert len(node.started()) == 2


LISTENER = """
import faulthandler, os, signal, sys, time
file = open(sys.argv[1] % int(os.environ["RANK"]), "w")
faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
signal.signal(signal.SIGUSR1, lambda *_: print("saving", flush=True))
def waiting():
    print("ready", flush=True)
    while True: time.sleep(0.1)
waiting()
"""


def listening(node: Node) -> tuple[str, ...]:
    stacks = node.folder / "1.00" / "a0" / "stacks"
    stacks.mkdir(parents=True)
    return (sys.executable, "-c", LISTENER, str(stacks / "rank-%04d.txt"))


def say(node: Node, words: str) -> None:
    """Wait until both ranks have said this, and nothing else."""
    logs = [node.folder / "1.00" / "a0" / "logs" / f"rank-{rank:04d}.log" for rank in (2, 3)]
    wait_for(lambda: all(log.exists() and log.read_text() == words for log in logs))


def test_ranks_are_asked_to_save_once_for_each_request(node: Node):
    node.start()
    argv = listening(node)
    node.order(argv)
    node.started()
    say(node, "ready\n")
    node.order(argv, save="1.00-a0/7")
    say(node, "ready\nsaving\n")
    node.order(argv, save="1.00-a0/7", epoch=2)
    node.beat(lambda beat: beat.orders[0] == 2)
    say(node, "ready\nsaving\n")


def test_the_schedulers_warning_makes_the_ranks_save(node: Node):
    node.start()
    node.order(listening(node))
    node.started()
    say(node, "ready\n")
    node.process.send_signal(signal.SIGUSR2)
    say(node, "ready\nsaving\n")
    assert node.beat(lambda beat: beat.warned)
    assert node.process.poll() is None


def test_a_trainer_that_does_not_know_the_signals_does_not_die_of_them(node: Node):
    node.start()
    node.order(SLEEP)
    pids = node.started()
    node.order(SLEEP, save="x", dump="1-i000")
    wait_for((node.folder / "1.00" / "a0" / "stacks" / "1-i000" / "n1.json").exists)
    assert all(map(alive, pids))
    assert node.agents.stacks("1.00-a0", "1-i000") == {2: "", 3: ""}


def test_hung_ranks_say_where_they_are_and_a_stopped_one_does_not(node: Node):
    node.start()
    argv = listening(node)
    node.order(argv)
    pids = node.started()
    say(node, "ready\n")
    os.kill(pids[1], signal.SIGSTOP)
    node.order(argv, dump="1-i000")
    wait_for((node.folder / "1.00" / "a0" / "stacks" / "1-i000" / "n1.json").exists)
    stacks = node.agents.stacks("1.00-a0", "1-i000")
    assert stacks.keys() == {2, 3}
    assert stacks[3] == ""
    assert main_thread(stacks[2])[0] == "<string>:waiting"


def test_py_spy_looks_at_all_that_do_not_answer_at_once(node: Node):
    """One after the other, the node would be silent for so long that it counts as lost."""
    tools = node.folder / "bin"
    tools.mkdir()
    both = f"touch {node.folder}/$$.asked; while [ $(ls {node.folder}/*.asked | wc -l) -lt 2 ]; do sleep 0.1; done"
    (tools / "py-spy").write_text(f"#!/bin/sh\n{both}\necho the stack\n")
    (tools / "py-spy").chmod(0o755)
    node.start(PATH=f"{tools}:{os.environ['PATH']}")
    node.order(SLEEP)  # it has no handler for the signal
    node.started()
    node.order(SLEEP, dump="1-i000")
    found = node.folder / "1.00/a0/stacks/1-i000/n1.json"
    wait_for(found.exists)
    assert json.loads(found.read_text())["py_spy"] == {"2": "the stack\n", "3": "the stack\n"}


def test_the_flight_recorder_of_a_rank_is_asked_through_its_pipe(node: Node):
    listens = (
        "import os, select; path = os.environ['TORCH_NCCL_DEBUG_INFO_PIPE_FILE'] + os.environ['RANK'] + '.pipe'\n"
        "os.mkfifo(path); pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK); print('ready', flush=True)\n"
        "select.select([pipe], [], []); print('asked by', os.read(pipe, 9), flush=True)"
    )
    node.start()
    node.order((sys.executable, "-c", listens))
    node.started()
    say(node, "ready\n")
    node.order((sys.executable, "-c", listens), dump="1-i000")
    say(node, "ready\nasked by b'1'\n")


def test_a_node_that_is_held_through_another_allocation_is_left_to_its_agent(node: Node):
    node.start()
    node.order(SLEEP, holder="1-n1")
    node.beat(lambda beat: beat.orders == (1, node.seq))
    assert node.report() is None


def test_the_last_words_of_a_rank_are_in_the_report(node: Node):
    node.start()
    node.order((sys.executable, "-c", "raise MemoryError('no room')"))
    report = wait_for(lambda: node.report() and node.report().done and node.report())
    assert report.tails[2].endswith("MemoryError: no room")


def test_a_node_is_burnt_in_once_before_anything_starts_there(node: Node):
    node.order(None, burn_in_seconds=60.0)
    node.start(LD_LIBRARY_PATH="")
    burning = node.beat(lambda beat: beat.burning)
    assert (judge(burning, 0).verdict, judge(burning, 0).reason) == (Verdict.UNKNOWN, "burning_in")
    wait_for(lambda: node.beat().burning is False)
    tested = node.beat(lambda beat: beat.burn_in is not None)
    assert [device.gemm_wrong for device in tested.burn_in.devices] == [0, 0]
    assert tested.burn_in.alone[0].gbs > 0
    assert judge(tested, 0).reason != "burning_in"
    node.order(SLEEP, burn_in_seconds=60.0)
    node.started()
    assert not node.beat(lambda beat: beat.attempt is not None).burning, "not again"


def test_ranks_that_are_wanted_already_do_not_wait_for_a_burn_in(node: Node):
    node.order(SLEEP, burn_in_seconds=60.0)
    node.start()
    node.started()
    assert not node.beat().burning


SAYS_AND_ABORTS = """
import os, sys, signal
print("step 7", flush=True)
print("RuntimeError: CUDA error: uncorrectable ECC error encountered \\x1b[31m", flush=True)
for number in range(int(sys.argv[1])):
    print(f"frame #{number}: c10d::ProcessGroupNCCL::watchdogHandler() + 0x617 (0x7f5a in /opt/libtorch_cuda.so)")
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGABRT)
"""


@pytest.mark.parametrize("stacks", [0, 10_000])
def test_the_reason_is_in_the_report_however_many_stacks_follow(node: Node, stacks: int):
    node.start()
    node.order((sys.executable, "-c", SAYS_AND_ABORTS, str(stacks)))
    report = wait_for(lambda: node.report() and node.report().done and node.report())
    (line,) = [line for line in report.causes[2] if "ECC" in line.text]
    assert (line.text, line.step, line.stale) == (
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        7,
        False,
    )
    found = blame(failed_ranks([report], None))
    assert (found.kind, found.node, found.line) == ("gpu_error", "n1", line.text)


def test_a_probe_runs_while_nothing_needs_the_node(node: Node):
    """It ends when it is not ordered any more, or when an attempt starts here."""

    def order(probes: tuple[str, ...], argv: tuple[str, ...] | None = None) -> None:
        node.seq += 1
        launch = Launch(
            attempt="1.00-a0",
            nodes=("n0", "n1"),
            holders={"n1": "1-n0"},
            ranks_per_node=2,
            address="10.0.0.1",
            port=4242,
            argv=SLEEP,
        )
        made = tuple(replace(launch, attempt=name, nodes=("n1",), ranks_per_node=1) for name in probes)
        orders = Orders(epoch=1, seq=node.seq, launch=launch if argv else None, drills=(), released=(), probes=made)
        node.agents.order(orders)

    def pid(name: str) -> int:
        path = node.folder / "probes" / "1-i000" / name / "nodes" / "n1.json"
        return wait_for(lambda: path.exists() and json.loads(path.read_text())["ranks"][0]["pid"])

    node.start()
    order(("1-i000-other_data",))
    first = pid("other_data")
    order(("1-i000-same_data",))
    second = pid("same_data")
    assert not alive(first), "one probe at a time"
    order(("1-i000-same_data",), SLEEP)
    ranks = node.started()
    assert not alive(second), "the attempt has the node for itself"
    assert all(alive(rank) for rank in ranks)
    assert wait_for(lambda: node.agents.reports("1-i000-same_data")["n1"].done)
