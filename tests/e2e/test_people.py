"""Requests of operators while a lineage runs: real commands, daemon, agents and processes, and the stub trainer."""

import json
import time
from pathlib import Path

from opt_ops.core import events as e
from opt_ops.core.state.model import State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Driver, Outcome
from tests.e2e.site import Site


def test_pause_resume_set_and_rollback(site: Site):
    site.start("steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 3)
    foreseen = site.command("run", "pause", "1", "--dry-run")
    assert "would end     1.00-a0 on n1" in foreseen
    site.command("run", "pause", "1", "--yes", "--reason", "power work", "--author", "ann", "-q")
    paused = site.wait(lambda state: state.status is Status.PAUSED and not state.live_allocations and state)
    assert paused.why == "ann: power work"
    assert paused.attempts["1.00-a0"].outcome is Outcome.STOPPED
    assert paused.incidents == {}
    last = paused.attempts["1.00-a0"].last_step

    site.command("run", "resume", "1", "--yes", "-q")
    again = site.wait(lambda state: state.status is Status.TRAINING and state.attempt.first_step and state)
    assert last - again.attempt.first_step < 10, "it saved before it rested"

    site.command("run", "set", "1", "clip=0.5", "lr=5e-4", "--yes", "--author", "ann", "-q")
    changed = site.wait(lambda state: len(state.runs) == 2 and state.incidents["1-i000"].closed_at and state)
    incident = changed.incidents["1-i000"]
    assert (incident.kind, incident.proven) == ("operator", True), "clip and rate were read back"
    assert changed.run.settings == ("optim.clip_norm=0.5",)

    site.command("run", "rollback", "1", "--to", "25", "--lr-scale", "0.5", "--skip-batches", "7", "--yes", "-q")
    back = site.wait(lambda state: len(state.runs) == 3 and state.incidents["1-i001"].closed_at and state)
    assert back.run.checkpoint.step == 20
    assert back.incidents["1-i001"].proven
    assert [skip.first for skip in back.run.skips] == [21]
    assert "there is no verified healthy checkpoint" in site.command(
        "run", "rollback", "1", "--to", "5", "--yes", code=4
    )


def test_a_person_takes_over_and_hands_back(site: Site):
    site.start("steps=100000", "pause=0.01")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 2)
    site.command("run", "take-over", "1", "--yes", "-q")
    site.command("drill", "kill-rank", "1", "--rank", "1", "--yes", "-q")
    state = site.wait(lambda state: state.incidents and state.incidents["1-i000"].closed_at and state)
    assert state.driver is Driver.OPERATOR
    assert state.incidents["1-i000"].decision.advice
    site.looked()
    assert site.state().attempt.stop_why is None, "nothing is done by itself"
    assert "advisory: an operator drives" in site.command("run", "explain", "1")
    site.command("run", "hand-back", "1", "--yes", "-q")
    state = site.wait(lambda state: len(state.attempts) == 2 and state.status is Status.TRAINING and state)
    # Both are right. If a last step comes after the death was seen, the attempt has outlived that finding, and it is
    # restarted because the others wait for the dead rank. The test cannot control which of the two comes first.
    assert state.incidents["1-i001"].kind in ("process_death", "hang")
    assert state.incidents["1-i001"].decision.action is Action.RESTART


def test_a_training_of_another_launcher_is_watched_and_not_touched(site: Site):
    other = site.folder / "elsewhere"
    other.mkdir()
    lines = [
        {
            "ts": time.time(),
            "num_updates": step,
            "loss": 3.0 if step < 150 else 9.0,
            "gnorm": 0.3,
            "lr": 1e-3,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "finite": True,
            "step_seconds": 0.1,
            "tokens": step,
            "wps": 1.0,
        }
        for step in range(1, 250)
    ]
    (other / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = sorted(path.name for path in other.iterdir())
    assert "nothing" in site.command("run", "shadow", str(other), "--dry-run")
    site.start_daemon()
    assert site.command("run", "shadow", str(other), "-q").strip() == "1"
    state = site.wait(lambda state: any(i.closed_at for i in state.incidents.values()) and state)
    (incident,) = state.incidents.values()
    assert (incident.kind, incident.onset_step, incident.proven) == ("loss_spike", 150, None)
    assert incident.decision.advice
    assert not state.live_allocations
    assert sorted(path.name for path in other.iterdir()) == before
    assert not [x for x in site.entries() if isinstance(x.event, e.AllocationIntended)]
    site.command("run", "stop", "1", "--yes", "-q")
    assert site.ended().status is Status.CANCELLED


def test_training_shrinks_rather_than_waits_and_grows_when_a_node_is_allowed_again(site: Site):
    playbook = site.folder / "playbooks" / "capacity.md"
    text = playbook.read_text()
    text = text.replace("shrink_seconds = 120.0", "shrink_seconds = 1.0")
    text = text.replace("grow_seconds = 600.0", "grow_seconds = 1.0").replace(
        "top_up_seconds = 600.0", "top_up_seconds = 1.0"
    )
    playbook.write_text(text)
    site.start("steps=100000", "pause=0.01", nodes=3, spares=0, min_nodes=2)
    site.start_daemon()

    def trains_on(nodes: int) -> State:
        return site.wait(lambda state: state.status is Status.TRAINING and len(state.attempt.nodes) == nodes and state)

    whole = trains_on(3)  # on a busy machine it begins with two, and grows when the third has come
    site.wait(lambda state: len(state.checkpoints) >= len(whole.checkpoints) + 2)
    site.command("drill", "xid", "1", "--node", "n2", "--xid", "79", "--yes", "-q")
    state = trains_on(2)
    assert state.attempt.nodes == ("n1", "n3")
    shrunk = state.attempt.name
    site.command("node", "allow", "1", "n2", "--yes", "--reason", "it was only a drill", "-q")
    state = trains_on(3)
    assert [i.kind for i in state.incidents.values()][len(whole.incidents) :] == ["bad_gpu", "nodes_returned"]
    assert state.attempts[shrunk].leave_why, "it saved before it moved"


def test_a_rank_that_hangs_is_named_before_anything_is_killed(site: Site):
    site.start("steps=100000", "pause=0.01", nodes=3, spares=0)
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 2)
    site.command("drill", "hang", "1", "--rank", "1", "--yes", "-q")
    state = site.wait(lambda state: state.incidents and all(i.proven for i in state.incidents.values()) and state)
    (incident,) = state.incidents.values()
    assert (incident.kind, incident.drill) == ("hang", "d000")
    assert (incident.stacks.odd, incident.stacks.silent, incident.nodes) == ((1,), (1,), ("n2",))
    assert incident.stacks.groups[0].ranks == (0, 2)
    assert "wait_in_a_collective" in " ".join(incident.stacks.groups[0].frames)
    kinds = [e.kind_of(x.event) for x in site.entries()]
    assert kinds.index("stacks_taken") < kinds.index("stop_intended")
    assert (Path(site.runs) / "1/1.00/a0/stacks").is_dir()
