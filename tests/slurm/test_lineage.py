"""A lineage on a real Slurm, through submitit, with the real trainer: a rank killed, a node drained, to COMPLETED."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opt_ops.adapters.slurm import SlurmOptions, SlurmScheduler
from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, AllocationStatus
from opt_ops.errors import Refused, SchedulerUnavailable
from opt_ops.node.agent import main as agent_main
from tests.adapters.slurm_stand_in import insist
from tests.e2e.site import Site, until
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import quiet
from tests.slurm.day import requests_were_needed

pytestmark = pytest.mark.slurm

CONFIG = 'scheduler = "slurm"\n[slurm]\npartition = "main"\ntime_minutes = 30'


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def site(tmp_path: Path, slurm: Cluster) -> Iterator[Site]:
    # With the shipped timeouts: on a busy machine, the real trainer needs long to start and for a step.
    site = Site(tmp_path, CONFIG, trainer=f"'{sys.executable}', '-m', 'trainer'", quick=False)
    yield site
    site.close()
    quiet(slurm)


def test_a_killed_rank_and_a_bad_node_to_the_last_step(site: Site):
    lineage = site.command(
        "run", "start", "opt-tiny", "--set=steps=150", "--set=checkpoint_every=20", "--nodes=2", "--spares=1", "-q"
    ).strip()
    assert lineage == "1"
    site.start_daemon()
    site.wait(lambda state: any(known.good for known in state.checkpoints.values()))
    held = site.state().allocation.nodes
    assert len(held) == 3
    site.command("drill", "kill-rank", "1", "--rank", "1", "--yes", "-q")
    site.wait(lambda state: state.incidents and all(i.proven for i in state.incidents.values()))
    bad = site.state().attempt.nodes[0]
    site.command("drill", "xid", "1", "--node", bad, "--xid", "79", "--yes", "-q")
    site.wait(lambda state: len(state.incidents) == 2)
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert [(i.kind, i.proven) for i in state.incidents.values()] == [("process_death", True), ("bad_gpu", True)]
    assert bad not in state.attempt.nodes
    assert state.nodes[bad].drain == "done"
    assert f"{state.nodes[bad].excluded_by}: xid_79" in ask("sinfo", "-h", "-R", "-o", "%E|%N")
    jobs = [x.event.job for x in site.entries() if isinstance(x.event, e.AllocationSubmitted)]
    assert {node for attempt in state.attempts.values() for node in attempt.nodes} <= set(held), "all in one allocation"
    accounts = ask("sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", "State,NNodes,JobName").split()
    assert accounts[0] == "COMPLETED|3|opt-ops-1-n0"
    assert len(jobs) >= 2, "and a small job for the node that was lost"
    assert accounts[1].endswith("|1|opt-ops-1-n1")
    requests_were_needed(site.entries())


def test_a_killed_rank_is_replaced_while_the_others_keep_running(site: Site):
    """Through agents on four nodes: three train, a warm rank waits on the fourth."""
    settings = ("--set=steps=100000", "--set=data.seq_len=64", "--nodes=3", "--spares=1")
    site.command("run", "start", "opt-tiny", *settings, "-q")
    site.start_daemon()

    def waits(state: State) -> bool:
        spares = [node for name, node in state.nodes.items() if state.attempt and name not in state.attempt.nodes]
        return state.status is Status.TRAINING and any(node.standby for node in spares)

    site.wait(waits)
    before, pids = site.state().attempt, site.pids("1.00-a0")
    site.command("drill", "kill-rank", "1", "--rank", "1", "--yes", "-q")
    state = site.wait(lambda state: state.incidents and not state.open_incidents and state)
    incident, attempt = state.incidents["1-i000"], state.attempt
    assert (incident.decision.action, incident.proven, incident.steps_lost) == (Action.REPLACE_RANKS, True, 0)
    assert attempt.name == before.name
    assert [old == new for old, new in zip(before.nodes, attempt.nodes, strict=True)] == [True, False, True]
    for rank in (0, 2):
        os.kill(pids[rank], 0)  # it lives
    assert len([x for x in site.entries() if isinstance(x.event, e.AllocationSubmitted)]) == 1


def test_a_node_that_an_administrator_drains_gets_nothing_new(site: Site, slurm: Cluster):
    settings = ("--set=steps=5000", "--set=checkpoint_every=10", "--set=peer_copies.every=0")  # each loss is a restart
    site.command("run", "start", "opt-tiny", *settings, "-q")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    attempt = site.state().attempt
    drained = attempt.nodes[1]
    ask("scontrol", "update", f"nodename={drained}", "state=drain", "reason=fan; rm -rf / $(id)")
    site.wait(lambda state: state.nodes[drained].reason.startswith("slurm_drain"))
    assert site.state().nodes[drained].reason.endswith("fan; rm -rf / $(id)")
    assert site.state().attempt.name == attempt.name, "what runs there goes on"
    site.command("drill", "kill-rank", "1", "--rank", "0", "--yes", "-q")
    site.wait(lambda state: len(state.attempts) == 2 and state.status is Status.TRAINING)
    assert drained not in site.state().attempt.nodes


def test_a_daemon_that_was_killed_after_submitting_adopts_its_job(site: Site):
    folder = site.runs / "1"
    folder.mkdir(parents=True)
    scheduler = SlurmScheduler(folder, SlurmOptions(partition="main", time_minutes=5), agent_main)
    job = insist(lambda: scheduler.submit("1-n0", 2, ["gpu001"]))
    assert insist(scheduler.jobs) == [(job, "1-n0")]
    other = SlurmScheduler(site.runs / "11", SlurmOptions(partition="main"), agent_main)
    assert insist(other.jobs) == [], "the same name in another folder is another lineage's job"
    state = until(lambda: (state := insist(lambda: scheduler.state(job))).status is AllocationStatus.RUNNING and state)
    assert len(state.nodes) == 2
    assert "gpu001" not in state.nodes
    insist(lambda: scheduler.cancel(job))
    state = until(lambda: (state := insist(lambda: scheduler.state(job))).status is AllocationStatus.ENDED and state)
    assert state.reason in ("CANCELLED", "COMPLETED")
    insist(lambda: scheduler.cancel(job))  # ending what has ended is no error


def test_what_slurm_refuses_is_told_apart_from_a_slurm_that_does_not_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
):
    wrong = SlurmScheduler(site.runs / "1", SlurmOptions(partition="nowhere"), agent_main)
    with pytest.raises(Refused, match=r"nowhere|partition"):
        insist(lambda: wrong.submit("1-n0", 1, []))
    right = SlurmScheduler(site.runs / "1", SlurmOptions(partition="main"), agent_main)
    monkeypatch.setenv("SLURM_CONF", os.devnull)
    with pytest.raises(SchedulerUnavailable):
        insist(right.jobs)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SchedulerUnavailable, match="not on the PATH"):
        insist(right.jobs)


def test_a_users_own_settings_reach_neither_a_question_nor_a_submission(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")
    monkeypatch.setenv("SACCT_FORMAT", "User")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    scheduler = SlurmScheduler(site.runs / "1", SlurmOptions(partition="main", time_minutes=5), agent_main)
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    monkeypatch.setenv("SBATCH_REQUEUE", "1")
    monkeypatch.setenv("SBATCH_JOB_NAME", "interactive")
    monkeypatch.setenv("SBATCH_PARTITION", "graceful")
    (site.runs / "1").mkdir(parents=True)
    job = insist(lambda: scheduler.submit("1-n0", 1, []))
    assert insist(scheduler.jobs) == [(job, "1-n0")]
    assert insist(lambda: scheduler.state(job, "1-n0")).status in (AllocationStatus.QUEUED, AllocationStatus.RUNNING)
    shown = ask("scontrol", "show", "job", job)
    for said in ("JobName=opt-ops-1-n0", "Requeue=0", "TimeLimit=00:05:00", "Partition=main"):
        assert said in shown
    insist(lambda: scheduler.cancel(job))
