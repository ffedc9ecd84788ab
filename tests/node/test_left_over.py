"""What a rank starts ends with its attempt, however the rank dies, and the next attempt does not start before."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opt_ops.core.names import attempt_folder
from opt_ops.node.process_groups import end_earlier
from tests.node.test_agent import Node, node, wait_for  # noqa: F401  (a fixture)

STARTS_CHILDREN = """
import json, os, signal, subprocess, sys, time
how, folder = sys.argv[1:3]
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
def detached():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sleep[0], sleep)
        os._exit(0)
    os.wait()
children = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, process_group=0).pid,
            subprocess.Popen(sleep, start_new_session=True).pid, subprocess.Popen(sleep, env={}).pid]
detached()
rank = os.environ["RANK"]
path = f"{folder}/children-{os.environ['OPT_OPS_ATTEMPT'].rsplit('/', 1)[1]}-{rank}.json"
with open(path + ".tmp", "w") as file:
    json.dump([os.getpid(), *children], file)
os.rename(path + ".tmp", path)
if how == "stays":
    time.sleep(600)
os.kill(os.getpid(), int(how)) if int(how) > 0 else os._exit(-int(how))
"""


def alive(pid: int) -> bool:
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return about[about.rindex(")") + 2] not in "ZX"


def marked(folder: Path, attempt: str) -> list[int]:
    """The processes that carry the attempt in their environment."""
    wanted = f"OPT_OPS_ATTEMPT={folder / attempt_folder(attempt)}".encode()
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                carries = wanted in (each / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if carries and alive(int(each.name)):
                found.append(int(each.name))
    return found


def children(folder: Path, attempt: str) -> list[int]:
    """The ranks and what they said to have started; the detached process is known by its environment."""

    def told() -> list[int]:
        paths = [folder / f"children-{attempt}-{rank}.json" for rank in (2, 3)]
        return [pid for path in paths if path.exists() for pid in json.loads(path.read_text())]

    return wait_for(lambda: len(told()) == 10 and told())


def order(node: Node, how: str, attempt: str = "1.00-a0") -> None:  # noqa: F811
    node.order((sys.executable, "-c", STARTS_CHILDREN, how, str(node.folder)), attempt=attempt)


@pytest.mark.parametrize("how", ["0", "-1", str(int(signal.SIGKILL)), str(int(signal.SIGABRT))])
def test_nothing_is_left_and_the_next_attempt_waits_for_that(node: Node, how: str):  # noqa: F811
    node.start()
    order(node, how)
    first = children(node.folder, "a0")
    wait_for(lambda: node.report() and node.report().done)
    order(node, "stays", attempt="1.00-a1")
    second = children(node.folder, "a1")
    assert [pid for pid in first if alive(pid)] == [], "none when the next attempt runs"
    assert marked(node.folder, "1.00-a0") == []
    node.order(None)
    wait_for(lambda: not any(map(alive, second)) and not marked(node.folder, "1.00-a1"))


def test_what_one_rank_leaves_is_ended_while_others_run(node: Node):  # noqa: F811
    one_dies = STARTS_CHILDREN.replace('if how == "stays"', 'if how == "stays" or rank == "3"')
    node.start()
    node.order((sys.executable, "-c", one_dies, "9", str(node.folder)))
    pids = children(node.folder, "a0")
    wait_for(lambda: not any(map(alive, pids[:5])))
    assert all(map(alive, pids[5:])), "those of the other rank stay"


def test_an_agent_that_was_killed_leaves_work_to_the_next_one(node: Node):  # noqa: F811
    node.start()
    order(node, "stays")
    first = children(node.folder, "a0")
    node.process.kill()
    node.process.wait()
    node.start()
    order(node, "stays", attempt="1.00-a1")
    children(node.folder, "a1")
    assert marked(node.folder, "1.00-a0") == []
    # One cleared its environment and lost its rank and its agent: nothing says any more whose it is.
    assert sum(map(alive, first)) <= 2
    for pid in filter(alive, first):
        os.kill(pid, signal.SIGKILL)


def test_processes_of_other_lineages_and_nodes_are_not_touched(tmp_path: Path):
    attempt = tmp_path / "12" / "12.00" / "a1"
    others = {
        "another lineage": {"OPT_OPS_NODE": "n1", "OPT_OPS_ATTEMPT": str(tmp_path / "123" / "12.00" / "a0")},
        "another node": {"OPT_OPS_NODE": "n11", "OPT_OPS_ATTEMPT": str(tmp_path / "12" / "12.00" / "a0")},
        "this attempt": {"OPT_OPS_NODE": "n1", "OPT_OPS_ATTEMPT": str(attempt)},
    }
    mine = {"OPT_OPS_NODE": "n1", "OPT_OPS_ATTEMPT": str(tmp_path / "12" / "12.00" / "a0")}
    running = {name: subprocess.Popen(["sleep", "600"], env=each) for name, each in others.items()}
    left = subprocess.Popen(["sleep", "600"], env=mine)
    try:
        end_earlier("n1", tmp_path / "12", attempt)
        assert left.wait(240) == -signal.SIGKILL
        assert [name for name, process in running.items() if process.poll() is not None] == []
    finally:
        for process in (*running.values(), left):
            process.kill()
            process.wait()
