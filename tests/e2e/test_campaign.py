"""A campaign with a real daemon: sizes one after the other, each forecast before it begins, each started once."""

import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from opt_ops.core.campaign import events as c
from opt_ops.core.campaign.state import CampaignState
from opt_ops.core.events import LineageStarted
from opt_ops.core.values import Status
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.journal_reader import read
from tests.commands import opt_ops
from tests.e2e.site import Site, until

TRAINER = Path(__file__).with_name("sized_trainer.py")


@pytest.fixture
def sized(tmp_path: Path):
    """A site of two nodes whose trainer has four sizes."""
    site = Site(
        tmp_path,
        "[local]\nnodes = ['n1', 'n2']\n[shape]\nnodes = 1\nspares = 0\n",
        trainer=f"'{sys.executable}', '{TRAINER}'",
    )
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text() + "check = true\n")
    yield site
    site.close()


def begin(site: Site, *more: str, recipes: str = "s4,s1,s3,s2") -> None:
    site.command("campaign", "start", "sizes", "--recipes", recipes, "--no-wait", "-q", *more)


def state(site: Site) -> CampaignState:
    return campaigns.state(site.runs / "campaigns" / "sizes")


def over(site: Site, sizes: int) -> bool:
    known = [site.runs / member.lineage for member in state(site).members.values()]
    return len(known) == sizes and all(path.is_dir() and lineages.state(path).finished for path in known)


@pytest.mark.slow
def test_each_size_is_started_once_although_the_daemon_is_killed(sized: Site):
    """Kills at random moments: the journal of the campaign has one member for each size, each with one lineage."""
    begin(sized)
    draw = random.Random(7)
    for _ in range(5):
        sized.start_daemon()
        time.sleep(draw.uniform(1.0, 6.0))
        sized.kill_daemon()
    sized.start_daemon()
    until(lambda: over(sized, 4))
    found = state(sized)
    assert list(found.members) == ["s1", "s2", "s3", "s4"], "smallest first"
    starts = Counter(
        entry.event.request
        for folder in lineages.folders(sized.runs)
        for entry in lineages.entries(folder)
        if isinstance(entry.event, LineageStarted)
    )
    assert starts == {f"campaign-sizes-{place}": 1 for place in (1, 2, 3, 4)}
    for member in found.members.values():
        assert lineages.state(sized.runs / member.lineage).status is Status.COMPLETED

    entries = read(sized.runs / "campaigns/sizes/journal", c.CAMPAIGN)[0]
    made = next(i for i, each in enumerate(entries) if isinstance(each.event, c.CampaignForecast))
    began = [i for i, each in enumerate(entries) if getattr(each.event, "recipe", "") == "s4"]
    assert began[0] == made, "the forecast stands before the size begins"
    (item,) = json.loads(sized.command("campaign", "forecast", "sizes", "-o", "json"))["items"]
    assert item["low"] <= item["reached"] <= item["high"]
    assert abs(item["reached"] - item["loss"]) < 0.05, "of losses that follow a law, it is right"


@pytest.mark.slow
def test_a_halted_size_halts_no_other_and_a_loss_off_its_forecast_is_told(sized: Site):
    begin(sized, recipes="s1,s2,s3,s4,s5")
    sized.start_daemon(HALTED="s2", BROKEN="s5")
    until(lambda: len(state(sized).members) == 5 and ended(sized, "s5"))
    members = state(sized).members
    found = {name: lineages.state(sized.runs / member.lineage).status for name, member in members.items()}
    assert found.pop("s2") is Status.HALTED
    assert set(found.values()) == {Status.COMPLETED}

    alert = until(lambda: next(iter(state(sized).alerts.values()), None))
    assert (alert.what, alert.recipe) == (c.AlertKind.ABOVE, "s5")
    assert alert.loss > alert.high
    until(lambda: not state(sized).unsettled)
    told = sized.command("campaign", "status", "sizes", "-o", "json")
    assert json.loads(told)["items"][4]["alerts"] == ["above"]
    sized.command("campaign", "render", "sizes", "-q")
    page = (sized.runs / "campaigns/sizes/logbook/logbook.html").read_text()
    assert "Alert, s5" in page
    assert f"../../../{members['s2'].lineage}/chronicle/logbook.html" in page
    assert len(state(sized).alerts) == 1, "drawn again, it is not told again"


def ended(site: Site, recipe: str) -> bool:
    return lineages.state(site.runs / state(site).members[recipe].lineage).ended


def test_what_must_be_equal_is_refused_by_its_name(sized: Site):
    said = sized.command("campaign", "start", "sizes", "--recipes", "s1,s5", code=2, PRECISION="fp16")
    assert "precision is bf16 and fp16" in said
    words = ("campaign", "start", "sizes", "--recipes", "s1,s2", "--dry-run")
    said = opt_ops(sized.folder, *words, WARM_UP="40").stderr
    assert "s2: losses count from 3 warm-ups of 40 steps on, and it has 100 steps: it counts for no forecast" in said
    assert "losses count" not in opt_ops(sized.folder, *words, WARM_UP="20").stderr
    assert not (sized.runs / "campaigns").exists()


def test_a_request_without_a_daemon_is_queued_and_says_so(sized: Site):
    (answer,) = json.loads(sized.command("campaign", "start", "sizes", "--recipes", "s1", "-o", "json"))["items"]
    assert answer["status"] == "waiting"
    said = sized.command("campaign", "start", "more", "--recipes", "s1", "--wait", code=75)
    assert "no daemon is running; the request is queued" in said
    assert "next: opt-ops daemon ensure" in said
    assert len(list(sized.runs.glob("campaigns/*/inbox/*.json"))) == 2


def test_a_second_campaign_of_the_name_is_refused_and_one_can_be_stopped(sized: Site):
    begin(sized, recipes="s1,s2,s3,s4,s5")
    assert "there is a campaign sizes already" in sized.command(
        "campaign", "start", "sizes", "--recipes", "s1", "--no-wait", code=4
    )
    sized.start_daemon()
    until(lambda: state(sized).members)
    sized.command("campaign", "stop", "sizes", "--reason", "enough", "--yes")
    assert state(sized).stopped is not None
    assert not state(sized).waiting
    sized.command("campaign", "stop", "sizes", "--yes", code=4)
