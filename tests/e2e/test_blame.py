"""The logs of a failed attempt, played by the ranks of a local site: the incident names what a person would name."""

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.site import Site

LOG_SETS = Path(__file__).parents[1] / "core/failures/data/log_sets"

PLAY = """
import json, os, signal, sys, time
from pathlib import Path
folder, ready, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
exits = {each["rank"]: each for each in json.loads((folder / "exits.json").read_text())["exits"]}
ready.mkdir(exist_ok=True)
(ready / f"{rank}.ready").touch()
while len(list(ready.glob("*.ready"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.02)
begin = max(path.stat().st_mtime for path in ready.glob("*.ready"))
mine = exits[rank]
time.sleep(max(0.0, begin + 1.0 + mine["at"] - time.time()))
print((folder / f"rank-{rank:04d}.log").read_text(), flush=True)
if mine["signal"]:
    os.kill(os.getpid(), mine["signal"])
os._exit(mine["code"])
"""


@pytest.mark.parametrize("name", ["ecc-abort", "host-memory"])
def test_the_incident_of_a_set_of_logs(tmp_path: Path, name: str):
    wanted = json.loads((LOG_SETS / name / "wanted.json").read_text())
    (tmp_path / "play.py").write_text(PLAY)
    words = (sys.executable, tmp_path / "play.py", LOG_SETS / name, tmp_path / "ready")
    command = ", ".join(f"'{word}'" for word in words)
    site = Site(tmp_path, "[local]\nnodes = ['n1', 'n2', 'n3', 'n4']", trainer=command)
    site.start_daemon()
    try:
        site.start(nodes=4, spares=0, ranks=2)
        incident = site.wait(lambda state: next(iter(state.incidents.values()), None))
        assert incident.kind in wanted["class"].split("|")
        assert incident.evidence["rank"] in wanted["first_rank"]
        assert incident.evidence["node"] == wanted["node"]
        assert incident.nodes == ((wanted["node"],) if wanted["node"] else incident.nodes)
        assert wanted["line_has"] in incident.evidence.get("line", "")
    finally:
        site.command("run", "stop", "1", "--yes", "--no-wait", "-q")
        site.ended()
        site.close()


def test_an_error_of_the_program_takes_one_node_at_most_and_halts(tmp_path: Path):
    says = "print('RuntimeError: CUDA error: an illegal memory access was encountered \\x1b[31m'); raise SystemExit(1)"
    (tmp_path / "fails.py").write_text(says)
    site = Site(
        tmp_path, "[local]\nnodes = ['n1', 'n2', 'n3', 'n4']", trainer=f"'{sys.executable}', '{tmp_path / 'fails.py'}'"
    )
    site.start_daemon()
    try:
        site.start(nodes=1, spares=3, ranks=1)
        state = site.ended()
        assert state.status == "HALTED"
        assert "the program fails at step 0 on different nodes" in state.why
        assert len(state.attempts) == 3
        assert [bool(node.excluded_by) for node in state.nodes.values()].count(True) == 1
        assert all(node.drain is None for node in state.nodes.values())
        assert "\x1b" not in (tmp_path / "daemon.log").read_text()
    finally:
        site.close()
