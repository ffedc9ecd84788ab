"""Failures on a real Slurm with four nodes: what was seen, named, done and proven, and that nothing else was done."""

from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import Action
from tests.e2e.site import Site
from tests.slurm.day import Day

pytestmark = pytest.mark.slurm


def test_ranks_that_end(site: Site):
    day = Day(site, "evaluate=25", ranks=2)
    first, second = day.state.attempt.nodes
    (job,) = [allocation.job for allocation in day.state.allocations.values()]

    died = day.fault("die", "process_death", nodes=(first,))
    assert died.cause == f"rank 1 on {first} was killed by signal 9 (SIGKILL)"
    assert died.step_resumed == day.sound_before(died.next_attempt)
    assert day.state.attempt.nodes == (first, second), "once is no reason to leave a node out"

    day.settled()
    failed = day.fault("exit-7", "process_death", nodes=(first,))
    assert f"rank 1 on {first} left with code 7" in failed.cause
    assert failed.decision.exclude == ()

    memory = day.fault("oom", "out_of_memory", nodes=(first,))
    assert "CUDA out of memory. Tried to allocate 20.00 GiB" in memory.cause
    lost = day.fault("nccl", "communication", nodes=(first,))
    assert "ncclRemoteError" in lost.evidence["line"]
    full = day.fault("full", "storage", nodes=(first,))
    assert "No space left on device" in full.cause

    torn = day.fault("torn", "process_death")
    assert torn.evidence["rank"] == 0
    step = day.state.attempts[torn.attempt].last_step  # which the next attempt saves again, and then it is one
    assert step % 10 == 0
    events = [entry.event for entry in site.entries()]
    again = next(i for i, x in enumerate(events) if isinstance(x, e.AttemptStarted) and x.attempt == torn.next_attempt)
    seen = [x.checkpoint.step for x in events[:again] if isinstance(x, e.CheckpointSeen)]
    assert step not in seen, "no marker, no checkpoint"
    assert torn.step_resumed == day.sound_before(torn.next_attempt)

    assert day.state.allocation.job == job, "all of it inside one allocation"
    day.ends(submitted=1)


@pytest.mark.soak  # in every run: scenarios/test_everywhere.py has a hang on a Slurm, e2e/test_scenarios.py the rest
def test_ranks_that_hang(site: Site):
    day = Day(site, "evaluate=25", ranks=2)
    first = day.state.attempt.nodes[0]
    for what, phase in (("hang", "training"), ("hang-evaluation", "evaluation"), ("hang-saving", "saving")):
        day.settled()
        hung = day.fault(what, "hang", nodes=(first,))
        assert f"in {phase}" in hung.cause
        assert hung.stacks.odd == (1,)
        assert [group.ranks for group in hung.stacks.groups] == [(0, 2, 3), (1,)]
        assert any("elsewhere" in frame for frame in hung.stacks.groups[1].frames)
        stop = next(x for x in site.entries() if isinstance(x.event, e.StopIntended) and x.event.incident == hung.name)
        taken = next(x for x in site.entries() if isinstance(x.event, e.StacksTaken) and x.event.incident == hung.name)
        assert taken.seq < stop.seq, "asked before anything was killed"
        assert hung.decision.exclude == ()
    day.ends(submitted=1)


@pytest.mark.soak  # in every run: e2e/test_scenarios.py; a rollback needs nothing of Slurm
def test_training_that_goes_astray(site: Site):
    day = Day(site, "pause=0.01")

    day.trained(40)
    nan = day.fault("nan", "non_finite_loss")
    assert nan.decision.action is Action.ROLLBACK
    assert nan.step_resumed <= nan.step_failed - 10
    assert day.state.run.name == "1.01"

    day.trained(40)  # what rises with an attempt's first points is taken for its restore
    spike = day.fault("spike", "loss_spike")
    assert spike.step_resumed < spike.onset_step
    assert spike.step_failed >= spike.onset_step + 20, "it had time to heal"
    assert spike.decision.action is Action.ROLLBACK

    floor = day.fault("floor", "loss_scale_floor")
    assert floor.step_resumed <= floor.onset_step - 20
    assert day.state.run.name == "1.03"

    day.site.fault("nospace")
    signal = day.site.wait(lambda state: next((s for s in state.signals.values() if s.signal == "save_failed"), None))
    assert "No space left on device" in signal.evidence["error"]
    attempt = day.attempt
    day.trained(20)
    assert day.attempt == attempt, "an alert touches nothing"
    day.ends(submitted=1)


@pytest.mark.soak  # in every run: e2e/test_scenarios.py; checkpoints need nothing of Slurm
def test_checkpoints_that_cannot_be_used(site: Site):
    day = Day(site)

    site.fault("rot")
    rotten = site.wait(lambda state: next((k for k in state.checkpoints.values() if k.verified is False), None))
    site.fault("die")  # instead: what is saved from here on is sound again
    died = day.sees("process_death")
    assert died.step_resumed != rotten.checkpoint.step

    day.settled()
    # Read by the supervisor, and found sound; the disk changes its mind before the next attempt reads it.
    hold, attempts = site.runs / "1/hold", len(day.state.attempts)
    hold.touch()
    site.fault("die")
    site.wait(lambda state: len(state.attempts) > attempts)
    newest = day.state.attempt.checkpoint
    shard = Path(newest.path) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    hold.unlink()
    day.expected.append("process_death")
    refused = day.sees("checkpoint_refused")
    assert refused.step_resumed < newest.step
    assert "left with code 65" in refused.cause
    day.ends(submitted=1)


@pytest.mark.soak  # in every run: e2e/test_scenarios.py
def test_a_user_error_is_not_tried_again(site: Site):
    site.start("steps=10000", "misbehave=exit-78@1:1.00-a0")
    site.start_daemon()
    state = site.ended()
    assert (state.status, len(state.attempts)) == ("HALTED", 1)
    assert [i.kind for i in state.incidents.values()] == ["user_error"]
