"""A campaign with everything real: the daemon, the trainer on text that people wrote, four sizes, a forecast."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from opt_ops.core.campaign import events as c
from opt_ops.core.events import LineageStarted
from opt_ops.core.state.status import Status
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.journal_reader import read
from tests.e2e.site import Site, until

# Not importorskip: this process would take longer to import them than to do all else here.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="the trainer needs torch"),
    pytest.mark.skipif(find_spec("scipy") is None, reason="the forecast needs SciPy"),
]

SIZES = ("opt-200k", "opt-500k", "opt-1m", "opt-2m")
STEPS = 24
SETTINGS = (
    f"steps={STEPS}",
    f"optim.total_steps={STEPS}",
    "optim.warmup_steps=2",
    "data.seq_len=32",
    "data.global_batch=4",
    "data.micro_batch=4",
    "evaluate_every=1000",
    "peer_copies.every=0",
)
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose campaign over four sizes has ended."""
    folder = tmp_path_factory.mktemp("campaign")
    texts = (DOCS / name for name in ("campaign.md", "data.md", "decisions.md"))
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text.read_text()}) + "\n" for text in texts))
    site = Site(
        folder,
        "[local]\nnodes = ['n1']\n[shape]\nnodes = 1\nspares = 0\nranks_per_node = 1\n",
        trainer=f"'{sys.executable}', '-m', 'trainer'",
    )
    words = [f"--set={each}" for each in SETTINGS]
    site.command("campaign", "start", "sizes", "--recipes", ",".join(SIZES), "--data=docs.jsonl", "--no-wait", *words)
    site.start_daemon()
    try:
        until(lambda: over(site))
        until((site.runs / "campaigns/sizes/logbook/logbook.html").exists)
        yield site
    finally:
        site.close()


def over(site: Site) -> bool:
    """Whether all sizes have completed. One that cannot is an error at once, not after minutes."""
    members = campaigns.state(site.runs / "campaigns/sizes").members.values()
    found = [lineages.state(site.runs / member.lineage) for member in members]
    assert not [each.why for each in found if each.ended and each.status is not Status.COMPLETED]
    return len(found) == len(SIZES) and all(each.finished for each in found)


def test_four_sizes_complete_and_the_fourth_was_forecast_before_it_began(trained: Site):
    path = trained.runs / "campaigns/sizes"
    members = campaigns.state(path).members
    assert list(members) == list(SIZES), "smallest first"
    for member in members.values():
        assert lineages.state(trained.runs / member.lineage).status is Status.COMPLETED

    journaled = [
        entry for entry in read(path / "journal", c.CAMPAIGN)[0] if getattr(entry.event, "recipe", "") == SIZES[3]
    ]
    assert [type(entry.event) for entry in journaled] == [
        c.CampaignForecast,
        c.CampaignMemberIntended,
        c.CampaignMember,
    ]
    began = next(
        entry.ts
        for entry in lineages.entries(trained.runs / members[SIZES[3]].lineage)
        if isinstance(entry.event, LineageStarted)
    )
    assert journaled[0].ts < began

    rows = json.loads(trained.command("campaign", "status", "sizes", "-o", "json"))["items"]
    assert [row["recipe"] for row in rows] == list(SIZES)
    for row in rows:
        assert row["step"] == STEPS
        assert 1.0 < row["reached"] < 7.5, "random weights lose 7.6 nats on 2,048 tokens"
    told = json.loads(trained.command("campaign", "forecast", "sizes", "-o", "json"))
    assert told["schema"] == "opt-ops/campaign-forecast/1"
    (item,) = told["items"]
    assert set(item["fit"]) == {"E", "A", "alpha", "B", "beta"}
    assert item["recipe"] == SIZES[3]
    assert item["made"]
    assert (item["reached"], item["sizes"]) == (rows[3]["reached"], list(SIZES[:3]))
    assert item["points"] >= 12, "four settled losses of each size"
    assert 0 < item["low"] < item["loss"] < item["high"]
    assert (rows[3]["low"], rows[3]["forecast"], rows[3]["high"]) == (item["low"], item["loss"], item["high"])
    refused = trained.command("campaign", "forecast", "sizes", "--recipe", SIZES[3], "--journal", code=4)
    assert "does not change" in refused


def test_the_logbook_names_all_sizes(trained: Site):
    for name in ("logbook.html", "logbook.md"):
        page = (trained.runs / "campaigns/sizes/logbook" / name).read_text()
        assert [size for size in SIZES if size not in page] == []
