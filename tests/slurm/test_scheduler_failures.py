"""Jobs that end under the training, and a Slurm that does not answer."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.fold import fold
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.values import AllocationStatus
from tests.e2e.site import Site
from tests.slurm.day import CONFIG, Day, ask, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def job(day: Day) -> str:
    return str(day.state.live_allocations[0].job)


def test_slurm_does_not_answer(site: Site, slurm: Cluster, tmp_path: Path):
    bin_, hangs = tmp_path / "bin", tmp_path / "hangs"
    bin_.mkdir()
    squeue = f"if [ -e '{hangs}' ]; then while [ -e '{hangs}' ]; do sleep 0.1; done; exit 1; fi"
    (bin_ / "squeue").write_text(f'#!/bin/sh\n{squeue}\nexec {shutil.which("squeue")} "$@"\n')
    (bin_ / "squeue").chmod(0o755)
    # Without an end to the daemon's patience: what it does meanwhile, it does without an answer.
    patient = (
        "from opt_ops.adapters.slurm import command, questions;"
        "command.TIMEOUT_SECONDS = 3600.0; questions.STALE_SECONDS = 10.0"
    )
    day = Day(site, path=f"{bin_}:{slurm.env['PATH']}", first=patient)
    ours = job(day)

    def unanswered() -> bool:
        changes = [x.event for x in site.entries() if isinstance(x.event, e.AllocationChanged)]
        return changes[-1].status is AllocationStatus.UNKNOWN

    slurm.stop("slurmctld")
    until(unanswered)
    day.fault("die", "process_death")  # nothing of a recovery inside the allocation needs slurmctld
    slurm.start("slurmctld")
    until(lambda: not unanswered())

    day.settled()
    slurm.stop("slurmdbd")
    day.fault("die", "process_death")
    slurm.start("slurmdbd")

    day.settled()
    hangs.touch()  # nobody says anything
    until(unanswered)
    day.fault("die", "process_death")  # whoever does not answer holds up nothing
    hangs.unlink()

    assert job(day) == ours
    assert not any(isinstance(x.event, e.StrayFound) for x in site.entries())
    day.ends(submitted=1)


def limit(lineage: Site, minutes: int) -> None:
    """Change the time limit of the only job, as an administrator may: the next one has 30 minutes again."""
    (allocation,) = lineage.state().live_allocations
    ask("scontrol", "update", f"jobid={allocation.job}", f"timelimit={minutes}")


def requests_were_needed(lineage: Site) -> None:
    """No nodes were asked for while a fit one was held that stays. On a busy machine, one may be unfit for a while."""
    state, requests = State(), 0
    for entry in lineage.entries():
        if isinstance(entry.event, e.AllocationIntended):
            requests += 1
            stay = [name for name, held in state.held.items() if (held.ends_at or 0.0) - entry.ts > 60]
            # without GPUs a node is fit when its agent has said that there are none
            fit = [name for name in stay if name in state.nodes and state.nodes[name].reason.startswith("nvml_")]
            assert not fit, f"{entry.event.allocation} was asked for, and {fit} was held"
        state = fold(state, entry)
    assert requests >= 2, "it never moved"


def test_time_limits(site: Site, tmp_path: Path):
    """Two lineages of one node beside each other: one moves in time, the other has no daemon when its limit comes."""
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other", CONFIG)
    try:
        other.start("steps=10000", nodes=1, spares=0)
        other.start_daemon()
        other.wait(lambda state: state.status is Status.TRAINING)
        other.kill_daemon()
        cut = other.state().allocation.job
        limit(other, 1)

        day = Day(site, nodes=1, spares=0)
        limit(site, 2 + int(time.time() - day.state.allocation.since) // 60)  # a quarter of it, for the move: 30 s
        moved = day.sees("time_limit")
        assert "1 other nodes are held" in moved.cause
        assert moved.step_resumed >= day.saved_before_it_left(moved.attempt)
        assert not any(node.excluded_by for node in day.state.nodes.values())
        day.ends()
        requests_were_needed(site)

        until(lambda: ask("sacct", "-n", "-X", "-j", cut, "-o", "State").split() == ["TIMEOUT"])
        other.start_daemon()
        closed = other.wait(lambda s: sum(i.closed_at is not None for i in s.incidents.values()) == 2 and s)
        assert [i.kind for i in closed.incidents.values()] == ["daemon_restart", "time_limit"]
        assert all(incident.proven for incident in closed.incidents.values())
        assert "TIMEOUT" in closed.incidents["1-i001"].cause
    finally:
        other.close()


def test_somebody_more_important_takes_the_nodes(site: Site):
    day = Day(site)
    urgent = ask("sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 8")
    taken = day.sees("preemption")
    assert "PREEMPTED" in taken.cause
    assert taken.step_resumed == day.sound_before(taken.next_attempt)
    until(lambda: ask("sacct", "-n", "-X", "-j", urgent, "-o", "State").split() == ["COMPLETED"])
    day.ends()


def test_preemption_with_a_grace_time_is_told_apart(site: Site):
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text().replace('"main"', '"graceful"'))
    day = Day(site)
    ask("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o/dev/null", "--wrap", "sleep 5")
    graceful = day.sees("preemption")
    state = day.state
    again = state.attempts[graceful.next_attempt].intended_at
    saved = max(known.checkpoint.step for known in state.checkpoints.values() if known.good and known.seen_at < again)
    assert graceful.step_resumed == saved, "the last one, saved within the grace"
    day.ends()
