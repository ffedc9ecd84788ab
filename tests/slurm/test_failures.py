"""Failures on a real Slurm with four nodes: what was seen, named, done and proven, and that nothing else was done."""

import json

import pytest

from opt_ops.core import events as e
from opt_ops.core.values import Action
from tests.e2e.site import Site
from tests.slurm.day import Day, until

pytestmark = pytest.mark.slurm


def good(day: Day) -> int:
    return max(known.checkpoint.step for known in day.state.checkpoints.values() if known.good)


def ended_ranks(site: Site) -> list[int]:
    """Of the newest attempt."""
    reports = [json.loads(path.read_text()) for path in (site.attempt_folder() / "nodes").glob("*.json")]
    return [rank["rank"] for report in reports for rank in report["ranks"] if rank["ended"]]


def test_ranks_that_end(site: Site):
    day = Day(site, "evaluate=25", ranks=2)
    first, second = day.state.attempt.nodes
    (job,) = [allocation.job for allocation in day.state.allocations.values()]

    died = day.fault("die", "process_death", nodes=(first,))
    assert died.cause == f"rank 1 on {first} was killed by signal 9 (SIGKILL)"
    assert died.steps_lost < 25
    assert day.state.attempt.nodes == (first, second), "once is no reason to leave a node out"

    day.finished()
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
    assert f"step-{torn.step_resumed + 10:08d}" not in str(list(day.state.checkpoints)), "no marker, no checkpoint"

    assert day.state.allocation.job == job, "all of it inside one allocation"
    day.ends(submitted=1)


def test_ranks_that_hang(site: Site):
    day = Day(site, "evaluate=25", ranks=2)
    first = day.state.attempt.nodes[0]
    for what, phase in (("hang", "training"), ("hang-evaluation", "evaluation"), ("hang-saving", "saving")):
        day.finished()
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


def test_training_that_goes_astray(site: Site):
    day = Day(site, "pause=0.01")

    day.trained(40)
    nan = day.fault("nan", "non_finite_loss")
    assert nan.decision.action is Action.ROLLBACK
    assert nan.step_resumed <= nan.step_failed - 10
    assert day.state.run.name == "1.01"

    spike = day.fault("spike", "loss_spike")
    assert spike.step_resumed <= spike.onset_step - 20
    assert spike.step_failed >= spike.onset_step + 20, "it had time to heal"
    assert [factor.factor for factor in day.state.run.lr_factors] == [0.75, 0.75]

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


def test_checkpoints_that_cannot_be_used(site: Site):
    day = Day(site)

    site.fault("rot")
    rotten = site.wait(lambda state: next((k for k in state.checkpoints.values() if k.verified is False), None))
    site.fault("die")  # instead: what is saved from here on is sound again
    died = day.sees("process_death")
    assert died.step_resumed != rotten.checkpoint.step

    day.finished()
    site.fault("die")
    until(lambda: ended_ranks(site))
    # Read by the supervisor, and found sound; the disk changes its mind afterwards.
    shard = max((site.runs / "1/1.00/checkpoints").glob("step-*/COMMITTED")).with_name("__0_0.distcp")
    newest = until(lambda: (step := good(day)) == int(shard.parent.name.removeprefix("step-")) and step)
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    day.expected.append("process_death")
    refused = day.sees("checkpoint_refused")
    assert refused.step_resumed < newest
    assert "left with code 65" in refused.cause
    day.ends(submitted=1)


def test_a_user_error_is_not_tried_again(site: Site):
    site.start("steps=10000", "misbehave=exit-78@1:1.00-a0")
    site.start_daemon()
    state = site.ended()
    assert (state.status, len(state.attempts)) == ("HALTED", 1)
    assert [i.kind for i in state.incidents.values()] == ["user_error"]
