"""Jobs that end under the training, and a Slurm that does not answer."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.status import Status
from opt_ops.core.values import AllocationStatus
from tests.e2e.site import Site
from tests.slurm.day import CONFIG, Day, ask, is_fit, staying, until, with_state_before

if TYPE_CHECKING:
    from pathlib import Path

    from opt_ops.core.state.model import Incident
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


def others_were_held_in_time(lineage: Site, moved: Incident) -> bool:
    """Whether a fit node was held that stays, when the move was decided."""
    before = next(s for x, s in with_state_before(lineage.entries()) if is_opening(x.event, moved))
    return any(is_fit(before.nodes.get(name)) for name in staying(before, moved.opened_at))


def is_opening(event: e.Event, incident: Incident) -> bool:
    return isinstance(event, e.IncidentOpened) and event.incident == incident.name


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
        # else its node was not there in time, on a busy machine: then it saves, and waits
        why = "1 other nodes are held" if others_were_held_in_time(site, moved) else "there are no other nodes yet"
        assert why in moved.cause
        assert moved.step_resumed >= day.saved_before_it_left(moved.attempt)
        assert not any(node.excluded_by for node in day.state.nodes.values())
        day.ends(submitted=2)

        until(lambda: ask("sacct", "-n", "-X", "-j", cut, "-o", "State").split() == ["TIMEOUT"])
        other.start_daemon()
        closed = other.wait(lambda s: sum(i.closed_at is not None for i in s.incidents.values()) == 2 and s)
        assert [i.kind for i in closed.incidents.values()] == ["daemon_restart", "time_limit"]
        assert all(incident.proven for incident in closed.incidents.values())
        assert "TIMEOUT" in closed.incidents["1-i001"].cause
    finally:
        other.close()


@pytest.mark.soak  # in every run: the one with a grace time
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
