"""What is wrong with one campaign holds up no other, and is tried again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from chronicles.campaign.sizes import load_campaign
from opt_ops.core.campaign import events as e
from opt_ops.errors import OptOpsError, Refused
from opt_ops.runfolder import campaigns, lineages, owner
from opt_ops.runfolder.journal import Journal
from opt_ops.supervise.campaigns import Campaigns, SiteOfCampaigns
from opt_ops.supervise.projections import Projection
from tests.core.story import Story
from tests.e2e.site import until

SHAPE = {"nodes": 1, "spares": 0, "ranks_per_node": 1, "min_nodes": 1}
START = {
    "sizes": [{"recipe": "s", "parameters": 9, "tokens": 9, "settings": [], "shape": SHAPE}],
    "data": [],
    "tokenizer": None,
}


@dataclass
class Clock:
    at: float = 0.0

    def now(self) -> float:
        return 1e9 + self.at

    def monotonic(self) -> float:
        return self.at


class Watch:
    """A daemon's campaigns, without its lineages."""

    def __init__(self, runs: Path, clock: Clock) -> None:
        self.clock, self.runs = clock, runs
        self.drawn: list[Projection] = []
        self.campaigns = Campaigns(
            SiteOfCampaigns(
                runs=runs,
                group="",
                clock=clock,
                lineage=lambda name: lineages.state(runs / name),
                free_nodes=lambda: None,
                projection=self._projection,
                warn=lambda _: "",
            )
        )

    def _projection(self, words: tuple[str, ...]) -> Projection:
        self.drawn.append(Projection(words, 3600.0))
        return self.drawn[-1]

    def rounds(self, count: int = 1) -> str:
        """Go on for so many seconds. Returns what the last round said is wrong."""
        said = ""
        for _ in range(count):
            self.clock.at += 1.0
            try:
                self.campaigns.step()
                said = ""
            except OptOpsError as error:
                said = str(error)
        return said


@pytest.fixture
def watch(tmp_path: Path, draws_nothing: None) -> Iterator[Watch]:
    made = Watch(tmp_path, Clock())
    yield made
    made.campaigns.close()


def begin(runs: Path, name: str) -> Path:
    path = campaigns.create(runs, name)
    lineages.ask(path, "ann", "start", START, 1e9)
    return path


def test_a_folder_that_cannot_be_written_holds_up_no_other(watch: Watch, monkeypatch: pytest.MonkeyPatch):
    bad, good = begin(watch.runs, "a"), begin(watch.runs, "b")
    append = Journal.append

    def full(self: Journal, entry: Any) -> None:
        if self.lineage == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, entry)

    monkeypatch.setattr(Journal, "append", full)
    assert "campaign a: OSError: [Errno 28]" in watch.rounds(60)
    assert campaigns.state(good).members["s"].asked
    assert not list((bad / "journal").glob("*.jsonl")), "no empty file for each try"
    monkeypatch.setattr(Journal, "append", append)
    assert watch.rounds(12) == ""
    assert campaigns.state(bad).members["s"].asked


def test_a_journal_that_makes_no_sense_holds_up_no_other(watch: Watch):
    damaged, senseless, good = (begin(watch.runs, name) for name in "abc")
    (damaged / "journal").mkdir()
    (damaged / "journal" / "000001.jsonl").write_text('{"v": 1, "seq": 1, "ep\nnot a line\n{}\n')
    journal = Journal(senseless / "journal", vocabulary=e.CAMPAIGN)
    journal.append(journal.stamp(e.CampaignMember(recipe="s", lineage="7"), 1e9))
    journal.close()
    said = watch.rounds(3)
    assert "campaign a: " in said
    assert "campaign b: KeyError: 's'" in said
    assert campaigns.state(good).members["s"].asked
    shutil.rmtree(damaged)
    shutil.rmtree(senseless)
    assert watch.rounds() == "", "what was deleted is forgotten"


def test_of_two_daemons_one_has_a_campaign_and_the_other_takes_it_when_that_is_dead(watch: Watch):
    path = begin(watch.runs, "a")
    watch.rounds()
    other = Watch(watch.runs, watch.clock)
    other.rounds()
    assert "has taken over" in watch.rounds()
    assert [each.name for each in lineages.folders(watch.runs)] == ["1"]
    for _ in range(int(owner.DEAD_SECONDS)):
        watch.clock.at += 1.0
        other.campaigns.step()
        os.utime(path / "journal.owner.json", ns=(0, int(watch.clock.at * 1e9)))  # the clock here is not the real one
    assert "has taken over" in watch.rounds(), "the other one lives"
    other.campaigns.close()
    assert watch.rounds(int(owner.DEAD_SECONDS) + 2) == ""


def test_a_lineage_that_was_deleted_stops_nothing(watch: Watch):
    begin(watch.runs, "a")
    watch.rounds(2)
    shutil.rmtree(watch.runs / "1")
    until(lambda: watch.rounds() == "" and watch.campaigns.idle)


def test_a_deleted_lineage_whose_number_another_one_has_is_not_taken_for_it(watch: Watch):
    path = begin(watch.runs, "a")
    watch.rounds(2)
    shutil.rmtree(watch.runs / "1")
    story = Story()
    story.begin()
    story.save(watch.runs / "1")
    (size,) = load_campaign(path).sizes
    assert (size.status, size.record) == ("not readable", None)
    assert "another one has its number" in size.problem
    until(lambda: watch.rounds() == "" and watch.campaigns.idle)


def test_a_folder_of_campaigns_that_cannot_be_read_does_not_end_a_daemon(watch: Watch, monkeypatch: pytest.MonkeyPatch):
    begin(watch.runs, "a")

    def stale(_: Path) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as broken:
        broken.setattr(campaigns, "folders", stale)
        with pytest.raises(OSError, match="Stale"):  # the daemon reports it, and goes on
            watch.rounds()
        assert not watch.campaigns.idle
    assert watch.rounds() == ""


def test_a_group_that_is_unknown_for_a_while_leaves_no_folders(watch: Watch):
    begin(watch.runs, "a")
    site = watch.campaigns._site
    watch.campaigns._site = replace(site, group="no-such-group")
    assert "no-such-group" in watch.rounds(60)
    assert lineages.folders(watch.runs) == []
    watch.campaigns._site = site
    assert watch.rounds(12) == ""
    assert [each.name for each in lineages.folders(watch.runs)] == ["1"]


def test_a_start_that_was_interrupted_or_refused_leaves_its_name_free(watch: Watch):
    path = campaigns.create(watch.runs, "a")
    watch.rounds(2)
    assert watch.campaigns.idle
    assert campaigns.create(watch.runs, "a") == path
    lineages.ask(path, "ann", "start", {**START, "sizes": []}, 1e9)
    with pytest.raises(Refused):
        campaigns.create(watch.runs, "a")  # its request waits for the daemon
    watch.rounds(2)
    assert len(campaigns.state(path).refused) == 1
    assert watch.campaigns.idle
    begin(watch.runs, "a")
    watch.rounds(2)
    assert campaigns.state(path).members["s"].asked
    with pytest.raises(Refused):
        campaigns.create(watch.runs, "a")


@pytest.mark.parametrize("name", ["../x", "..", ".x", "a/b", "", "-q", "a\n", "ä"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str):
    with pytest.raises(OptOpsError, match="cannot be the name"):
        campaigns.require_name(name)
    with pytest.raises(OptOpsError, match="cannot be the name"):
        campaigns.folder(tmp_path, name)


def test_daemons_that_come_and_go_leave_no_empty_files(watch: Watch):
    path = begin(watch.runs, "a")
    watch.rounds(2)
    before = sorted(each.name for each in (path / "journal").iterdir())
    for _ in range(3):
        watch.campaigns.close()
        watch = Watch(watch.runs, watch.clock)
        watch.rounds(2)
    watch.campaigns.close()
    assert sorted(each.name for each in (path / "journal").iterdir()) == before
    assert campaigns.state(path).members["s"].asked
