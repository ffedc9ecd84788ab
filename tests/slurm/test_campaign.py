"""A campaign on a real Slurm: sizes side by side, one that does not start, a daemon that is killed."""

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.core.campaign import events as c
from opt_ops.core.events import AllocationSubmitted, LineageStarted
from opt_ops.core.values import Status
from opt_ops.runfolder import campaigns, lineages
from opt_ops.runfolder.journal_reader import read
from tests.e2e.site import Site, until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import quiet
from tests.slurm.day import ask

pytestmark = [pytest.mark.slurm, pytest.mark.soak]

TRAINER = Path(__file__).parents[1] / "e2e" / "sized_trainer.py"
CONFIG = 'scheduler = "slurm"\n[slurm]\npartition = "main"\ntime_minutes = 30\n[shape]\nnodes = 1\nspares = 0'


@pytest.fixture
def site(tmp_path: Path, slurm: Cluster) -> Iterator[Site]:
    site = Site(tmp_path, CONFIG, trainer=f"'{sys.executable}', '{TRAINER}'")
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text() + "check = true\n")
    yield site
    site.close()
    quiet(slurm)


def test_sizes_are_started_once_each_beside_one_that_fails_although_the_daemon_is_killed(site: Site):
    folder = site.runs / "campaigns" / "sizes"
    (site.folder / "nodes.txt").write_text("s3 2\ns4 3  # all but one of the four\n")
    more = ("--nodes-by-size", "nodes.txt", "--at-once", "2")
    site.command("campaign", "start", "sizes", "--recipes", "s4,s1,s3,s2", "--no-wait", "-q", *more)
    draw = random.Random(11)
    for _ in range(4):
        site.start_daemon(HALTED="s2")
        time.sleep(draw.uniform(2.0, 12.0))
        site.kill_daemon()
    site.start_daemon(HALTED="s2")
    until(lambda: over(site, folder))

    found = campaigns.state(folder)
    assert list(found.members) == ["s1", "s2", "s3", "s4"], "smallest first"
    states = {name: lineages.state(site.runs / member.lineage) for name, member in found.members.items()}
    assert states.pop("s2").status is Status.HALTED
    assert {state.status for state in states.values()} == {Status.COMPLETED}
    starts = Counter(
        entry.event.request
        for path in lineages.folders(site.runs)
        for entry in lineages.entries(path)
        if isinstance(entry.event, LineageStarted)
    )
    assert starts == {f"campaign-sizes-{place}": 1 for place in (1, 2, 3, 4)}
    jobs = [
        entry.event.job
        for member in found.members.values()
        for entry in lineages.entries(site.runs / member.lineage)
        if isinstance(entry.event, AllocationSubmitted)
    ]
    known = [line for line in ask("sacct", "-n", "-P", "-X", "-S", "now-1hour", "-o", "JobID").split() if line in jobs]
    assert sorted(known) == sorted(set(jobs)), "each job is one of a size, and is in a journal once"
    entries = read(folder / "journal", c.CAMPAIGN)[0]
    intended = [each.event for each in entries if isinstance(each.event, c.CampaignMemberIntended)]
    assert "3 sizes" in intended[0].unforecast
    assert [each.recipe for each in intended] == ["s1", "s2", "s3", "s4"], "none was intended twice"


def over(site: Site, folder: Path) -> bool:
    known = [lineages.state(site.runs / each.lineage) for each in campaigns.state(folder).members.values()]
    return len(known) == 4 and all(state.ended for state in known)
