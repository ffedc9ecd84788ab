"""Files that hold what no trainer, agent or operator of ours writes, with a real daemon: the watch goes on."""

from __future__ import annotations

import json
import os
import re

from opt_ops.core.events import InputLeftOut
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from tests.e2e.site import Site


def of(source: str, state: State) -> list[InputLeftOut]:
    return [each for each in state.left_out.values() if each.source == source]


def test_a_rank_that_dies_is_recovered_while_one_line_in_three_is_bad_and_pipes_lie_in_the_folders(site: Site):
    site.start_daemon()
    lineage = site.start("steps=100000", "pause=0.02", "odd=3", nodes=2, spares=1, ranks=1)
    folder = site.runs / lineage
    site.wait(lambda state: state.status is Status.TRAINING)
    for name in ("inbox/pipe.json", "health/pipe.jsonl", "1.00/a0/nodes/pipe.json"):
        os.mkfifo(folder / name)
    (folder / "inbox" / "folder.json").mkdir()
    (folder / "inbox" / "bad.json").write_text('{"ts": 1, "author": "\\ud800", "verb": [], "arguments": 5}')
    with (folder / "1.00/a0/telemetry.jsonl").open("ab") as file:
        file.write(b"x" * 20_000_000 + b"\n")
    site.wait(lambda state: (state.attempt.last_step or 0) > 0 and len(state.left_out) >= 3)
    site.command("drill", "kill-rank", lineage, "--rank", "1", "--yes", "-q")
    state = site.wait(lambda state: state.attempt.name == "1.00-a1" and state.status is Status.TRAINING and state)
    assert "process_death" in {incident.kind for incident in state.incidents.values()}
    assert not state.failing
    log = (site.folder / "daemon.log").read_text()
    assert "supervisor failed" not in log
    assert "Traceback" not in log
    site.wait(lambda state: any(each.taken > each.count > 0 for each in of("telemetry", state)))
    (view,) = json.loads(site.command("run", "show", lineage, "-o", "json"))["items"]
    assert {"telemetry", "requests", "heartbeats"} <= {each["source"] for each in view["left_out"]}
    assert re.search(r"\d+ lines? of telemetry left out, newest: ", site.command("run", "show", lineage))
    site.command("logbook", "render", lineage, "-q")
    assert "left out a part of" in (folder / "chronicle" / "logbook.md").read_text()
    site.kill_daemon()
    site.start_daemon()
    site.wait(lambda state: state.epoch == 2 and state.attempt.progress_epoch == 2)
