"""Ranks that are replaced in place, as commands show them: events, dry runs, lineages, nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from opt_ops.cli.node import commands as node_commands
from opt_ops.cli.shared import views
from opt_ops.cli.shared.options import Lineage
from opt_ops.cli.shared.preview import preview
from opt_ops.config import Config, Recovery
from opt_ops.core import events as e
from opt_ops.core.events import Entry
from opt_ops.core.state import in_place
from opt_ops.core.values import Tier
from opt_ops.runfolder import lineages
from opt_ops.runfolder.liveness import look
from tests.chronicles.eventful import Lived
from tests.chronicles.in_place import replaced


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    story = replaced(tmp_path_factory.mktemp("runs") / "12")
    story.runs(140)
    story.see(e.StandbySeen(node="n5", ready=0), e.StandbySeen(node="n2", ready=2))
    return story


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (
            e.MembersIntended(attempt="12.00-a0", generation=2, nodes=("n1", "n3"), new=(1,), incident=None),
            "12.00-a0 goes on as generation 2 on n1, n3: rank 1 starts, all others stay",
        ),
        (
            e.MembersIntended(attempt="1.00-a0", generation=3, nodes=("n",) * 124, new=(8, 9, 10), incident=None),
            "1.00-a0 goes on as generation 3: ranks 8–10 start, all others stay",
        ),
        (
            e.MembersJoined(attempt="12.00-a0", generation=2, step=61204, at=1.0, kept=991, repeated=1),
            "all ranks of 12.00-a0, generation 2, hold step 61,204, 1 step made again, 991 processes are the same",
        ),
        (
            e.MembersFailed(attempt="12.00-a0", generation=2, why="no standby was ready"),
            "generation 2 of 12.00-a0 was given up: no standby was ready",
        ),
        (e.StandbySeen(node="n7", ready=8), "n7: standby 8 ready"),
        (e.StandbySeen(node="n7", ready=0), "n7: no standby ready"),
    ],
    ids=["intended", "many-nodes", "joined", "failed", "ready", "not-ready"],
)
def test_an_event_is_a_sentence(event: e.Event, sentence: str):
    assert views.event_row(Entry(seq=1, epoch=1, ts=0.0, event=event))["text"] == sentence


def test_a_lineage_shows_its_generation_and_its_standbys(told: Lived):
    row = views.lineage_row(told.folder, told.state, look(told.folder.parent, told.now))
    assert (row["generation"], row["standby"]) == (2, 2)
    (attempt,) = views.lineage_view(told.folder, told.state, [], look(told.folder.parent, told.now))["attempts"]
    assert (attempt["generation"], attempt["nodes"]) == (2, ["n1", "n5", "n3", "n4"])


def test_no_standby_is_told_of_a_trainer_that_cannot_use_it(tmp_path: Path):
    story = Lived(tmp_path / "12", steps=100)
    story.begins()
    story.granted("4101", "n1", "n2", "n3", "n4", "n5")
    story.runs(20)
    assert in_place.standbys(story.state) is None


def test_a_node_shows_how_many_warm_ranks_wait_there(told: Lived):
    rows = node_commands._rows(Lineage(told.folder, told.state), look(told.folder.parent, told.now))
    assert {row["node"]: row["standby"] for row in rows} == {"n1": None, "n2": 2, "n3": None, "n4": None, "n5": None}


def test_a_dry_run_says_what_would_be_replaced(told: Lived):
    attempt = told.state.attempt
    assert attempt is not None
    death = e.SignalRaised(
        signal="process_death",
        tier=Tier.ACT,
        attempt=attempt.name,
        step=140,
        onset_step=None,
        at=told.now,
        nodes=("n3",),
        rule="a rank ended",
        evidence={"rank": 4, "signal": 9, "lost_ranks": [4]},
        generation=2,
    )
    state = lineages.state(told.folder)
    lines = [each.text for each in preview(state, death, told.now, Config())]
    assert any("replace ranks 4–5 while all others keep running" in line for line in lines), lines
    start = "ranks 4–5 start, all others stay"
    assert any("go on with 12.00-a0 as generation 3" in line and start in line for line in lines), lines
    foreseen = preview(state, death, told.now, Config(recovery=Recovery(in_place=False)))
    assert not any("all others" in each.text for each in foreseen), foreseen
