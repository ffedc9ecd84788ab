"""Campaigns beside each other in one daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from opt_ops.core.state.model import State
from opt_ops.errors import OptOpsError
from opt_ops.runfolder import campaigns
from opt_ops.supervise.campaigns import Campaigns, SiteOfCampaigns


class Clock:
    time = 1_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class Drawn:
    stale = idle = True

    def step(self, now: bool) -> None:
        pass

    close = step


def test_a_campaign_that_cannot_be_written_holds_up_no_other(tmp_path: Path):
    clock = Clock()
    site = SiteOfCampaigns(
        runs=tmp_path,
        group="",
        clock=clock,
        lineage=lambda _: State(),
        free_nodes=lambda: 0,
        projection=lambda _: cast("Any", Drawn()),
        warn=lambda _: "",
    )
    size = {"recipe": "s1", "parameters": 1, "tokens": 1, "settings": []}
    shape = {"nodes": 1, "spares": 0, "ranks_per_node": 1, "min_nodes": 1}
    for name in "ab":
        path = campaigns.create(tmp_path, name)
        start = {"sizes": [{**size, "shape": shape}], "data": [], "tokenizer": None}
        campaigns.ask(path, "ann", "start", start, 1.0)
    journal = tmp_path / "campaigns" / "a" / "journal"
    journal.write_text("no folder")
    here = Campaigns(site)
    for _ in range(3):
        clock.time += 2
        with pytest.raises(OptOpsError, match="campaign a: "):
            here.step()
    assert campaigns.state(tmp_path / "campaigns" / "b").started is not None
    journal.unlink()
    clock.time += 60
    here.step()
    assert campaigns.state(tmp_path / "campaigns" / "a").started is not None, "it is tried again"
