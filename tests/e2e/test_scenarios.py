"""Failures and recoveries: the real daemon, real agents and real processes, and the stub trainer.

Each scenario ends COMPLETED, or with the reason why not, and with one proven incident of the right class.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from opt_ops.core import events as e
from opt_ops.core.state.model import Incident, State
from opt_ops.core.state.status import Status
from opt_ops.core.values import Action, Outcome
from opt_ops.runfolder import lineages
from tests.e2e.site import Site, until
from tests.fake_nvml.build import FakeDriver


def only_incident(state: State, kind: str) -> Incident:
    assert [incident.kind for incident in state.incidents.values()] == [kind]
    return next(iter(state.incidents.values()))


def submissions(site: Site) -> list[str]:
    return [x.event.job for x in site.entries() if isinstance(x.event, e.AllocationSubmitted)]


def test_nothing_goes_wrong(site: Site):
    site.start("steps=60")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert state.incidents == {}
    assert [a.outcome for a in state.attempts.values()] == [Outcome.COMPLETED]
    assert max(known.checkpoint.step for known in state.checkpoints.values() if known.good) == 60
    assert all(not Path(f"/proc/{pid}").exists() for pid in site.agents().values())


def test_a_rank_that_fails_after_the_last_step_costs_nothing(site: Site):
    site.start("steps=60", "misbehave=exit-7@60:*")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert len(state.attempts) == 1
    assert only_incident(state, "process_death").proven
    assert "rank 1 on n2 left with code 7" in state.why


def test_a_rank_is_killed(site: Site):
    site.start("steps=120", "misbehave=die@55:1.00-a0")
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "process_death")
    assert incident.cause == "rank 1 on n2 was killed by signal 9 (SIGKILL)"
    assert incident.proven
    assert incident.step_resumed == 50
    assert state.status is Status.COMPLETED


def test_a_rank_leaves_with_an_error(site: Site):
    site.start("steps=100", "misbehave=exit-7@55:1.00-a0")
    site.start_daemon()
    assert "rank 1 on n2 left with code 7" in only_incident(site.ended(), "process_death").cause


def test_corrupt_data_is_rolled_back_to_before_all_agreed_without_its_node(site: Site):
    site.start("steps=100", "misbehave=corrupt@75:1.00-a0")
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "silent_data_corruption")
    assert incident.cause == "data is corrupt on rank 1 on n2: its own shards changed"
    assert incident.decision is not None
    assert (incident.decision.action, incident.decision.exclude) == (Action.ROLLBACK, ("n2",))
    assert incident.decision.checkpoint is None, "they never agreed: what was saved since the start is in doubt"
    assert incident.proven
    assert state.status is Status.COMPLETED


def test_a_user_error_is_not_tried_again(site: Site):
    site.start("steps=100", "misbehave=exit-78@1:1.00-a0")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.HALTED
    assert len(state.attempts) == 1
    assert only_incident(state, "user_error").decision.action is Action.HALT


def test_the_same_death_at_the_same_step_ends_with_a_human(site: Site):
    deaths = ",".join(f"die@55:1.00-a{n}" for n in range(9))
    site.start("steps=100", f"misbehave={deaths}")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.HALTED
    assert "the ladder of process_death is used up" in state.why or len(state.attempts) == 4


def test_the_loss_spikes_and_does_not_heal(site: Site):
    site.start("steps=160", "misbehave=spike@90:1.00-a0")
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "loss_spike")
    assert incident.onset_step == 90
    assert incident.step_resumed == 70
    assert state.run.name == "1.01"
    assert [f.factor for f in state.run.lr_factors] == [0.75]
    assert incident.proven
    assert state.status is Status.COMPLETED


def test_a_cosine_run_survives_a_kill_and_a_rollback_from_the_first_update_on(site: Site):
    site.start("steps=160", "schedule=cosine", "misbehave=die@5:1.00-a0,spike@90:1.00-a1")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert [incident.kind for incident in state.incidents.values()] == ["process_death", "loss_spike"]
    assert all(incident.proven and incident.proof["schedule_proven"] for incident in state.incidents.values())
    first, *others = next(iter(state.incidents.values())).proof["readbacks"]
    assert (first["step"], first["lr"]) == (1, 0.0), "it begins again at update 1, whose rate is 0"
    assert others, "which proves nothing: others are waited for"
    site.command("logbook", "render", "1")
    (logbook,) = site.runs.rglob("logbook.md")
    assert "following half a cosine to 10 % of it" in logbook.read_text()


def test_a_schedule_of_an_unknown_kind_is_proven_by_its_ratio_and_the_words_say_so(site: Site):
    site.start("steps=160", "schedule=greedy", "misbehave=spike@90:1.00-a0")
    site.start_daemon()
    incident = only_incident(site.ended(), "loss_spike")
    assert incident.proven
    assert (incident.proof["schedule_proven"], incident.proof["factors_proven"]) == (False, True)
    explained = site.command("run", "explain", incident.name)
    assert "The schedule is not proven: opt-ops does not compute its kind." in explained
    assert "0.75 × base_lr" in explained


def test_the_loss_is_not_finite(site: Site):
    site.start("steps=120", "misbehave=nan@75:1.00-a0")
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "non_finite_loss")
    assert (incident.step_failed, incident.step_resumed) == (75, 60)
    assert incident.proven


def test_training_hangs(site: Site):
    site.start("steps=100", "misbehave=hang@55:1.00-a0")
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "hang")
    assert "in training" in incident.cause
    assert incident.proven


def test_a_node_falls_silent_with_everything_on_it(site: Site):
    site.start("steps=800")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 3)
    os.kill(site.agents()["n2"], signal.SIGKILL)
    state = site.ended()
    incident = only_incident(state, "silent_node")
    assert incident.nodes == ("n2",)
    assert incident.proven
    assert state.attempt.nodes == ("n1", "n3")


def test_a_gpu_falls_off_the_bus_in_use_and_another_on_a_spare(site: Site, nvml_library):
    config = site.folder / "opt-ops.toml"
    config.write_text(config.read_text() + "[health]\ngpus_per_node = 2\n")
    drivers = {}
    for node in ("n1", "n2", "n3", "n4"):
        (site.folder / node).mkdir()
        drivers[node] = FakeDriver(site.folder / node, gpus=2, library=nvml_library)
        for gpu in range(2):
            drivers[node].set(gpu, uuid=f"GPU-{node}-{gpu}")
    # All local agents have the same environment. The wrapper chooses the state file by the node's name.
    wrapper = site.folder / "python"
    states = " ".join(f"{n}) export FAKE_NVML_STATE={d.env['FAKE_NVML_STATE']} ;;" for n, d in drivers.items())
    wrapper.write_text(f'#!/bin/sh\ncase "$7" in {states} esac\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    config.write_text(config.read_text() + "[local]\nnodes = ['n1', 'n2', 'n3', 'n4']\n")
    site.start("steps=100000", nodes=2, spares=2)
    wrapped = f"import opt_ops.adapters.local as local; local.sys.executable = {str(wrapper)!r}"
    site.start_daemon(wrapped, LD_LIBRARY_PATH=drivers["n1"].env["LD_LIBRARY_PATH"])
    site.wait(lambda state: len(state.checkpoints) >= 2)
    assert site.state().nodes["n1"].reason == "ok"
    drivers["n4"].set(1, ecc_volatile_uncorrected=3)
    site.wait(lambda state: state.nodes["n4"].excluded_by)
    assert len(site.state().attempts) == 1, "a spare's fault does not touch training"
    drivers["n2"].lose(0)
    state = site.wait(lambda s: len(s.incidents) == 2 and all(i.proven for i in s.incidents.values()) and s)
    first, second = state.incidents.values()
    assert (first.kind, first.cause, first.decision.action) == ("bad_gpu", "n4: ecc_uncorrected", Action.EXCLUDE)
    assert (second.kind, second.cause, second.decision.action) == ("bad_gpu", "n2: gpu_lost", Action.RESTART)
    assert second.evidence["uuid"] == "GPU-n2-0"
    assert state.bad_parts == {"GPU-n2-0": "n2", "GPU-n4-1": "n4"}
    assert state.attempt.nodes == ("n1", "n3")


def test_the_newest_checkpoint_is_damaged_before_it_is_needed(site: Site):
    site.start("steps=100", "misbehave=rot@50:1.00-a0,die@55:1.00-a0")
    site.start_daemon()
    state = site.ended()
    known = next(k for path, k in state.checkpoints.items() if path.endswith("step-00000050"))
    assert known.verified is False
    assert only_incident(state, "process_death").step_resumed == 40
    assert state.status is Status.COMPLETED


def test_the_daemon_is_killed_and_its_successor_takes_over(site: Site):
    site.start("steps=800")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    ranks = site.pids("1.00-a0")
    site.kill_daemon()
    before = site.step()
    until(lambda: site.step() > before)
    assert site.pids("1.00-a0") == ranks, "training goes on"
    site.start_daemon()
    state = site.ended()
    incident = only_incident(state, "daemon_restart")
    assert incident.decision.action is Action.ADOPT
    assert incident.proven
    assert len(state.attempts) == 1
    assert len(submissions(site)) == 1


def test_a_failure_while_no_daemon_watches_is_recovered_by_the_next_one(site: Site):
    site.start("steps=500")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 2)
    site.kill_daemon()
    os.kill(site.pids("1.00-a0")[1], signal.SIGKILL)
    until(lambda: 1 in site.ended_ranks())
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert sorted(i.kind for i in state.incidents.values()) == ["daemon_restart", "process_death"]
    assert all(i.proven for i in state.incidents.values())


def test_a_second_daemon_on_the_same_runs_is_refused(site: Site):
    site.start_daemon()
    until((site.runs / "daemon.json").exists)
    assert "a daemon already runs" in site.command("daemon", "run", code=4)


def test_an_operator_stops_a_lineage_and_leaves_a_note(site: Site):
    site.start("steps=100000")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    site.command("run", "note", "1.00", "looks <b>odd</b>", "--author", "ann")
    foreseen = site.command("run", "stop", "1", "--dry-run")
    assert "would stop    for good, as " in foreseen
    assert site.state().status is Status.TRAINING
    assert "not done without confirmation" in site.command("run", "stop", "1", code=4)
    site.command("run", "stop", "1", "--yes", "--reason", "wrong data", "--author", "ann")
    state = site.ended()
    assert (state.status, state.why) == (Status.CANCELLED, "ann: wrong data")
    assert all(not Path(f"/proc/{pid}").exists() for pid in site.pids("1.00-a0").values())
    notes = [x.event for x in site.entries() if isinstance(x.event, e.NoteAdded)]
    assert [(n.author, n.text) for n in notes] == [("ann", "looks <b>odd</b>")]


def test_too_few_nodes_end_with_a_reason(site: Site):
    with pytest.raises(AssertionError, match="this machine has 3 nodes"):
        site.start("steps=100", nodes=5)
    folder = lineages.create(site.runs)  # as a program asks that does not use the command
    shape = {"nodes": 5, "spares": 1, "ranks_per_node": 1}
    arguments = {"recipe": "stub", "settings": ["steps=100"], "data": [], "tokenizer": None, "shape": shape}
    lineages.ask(folder, "ann", "start", {"lineage": folder.name, **arguments}, time.time())
    site.start_daemon()
    site.wait(lambda state: any(a.failed for a in state.allocations.values()))
    failed = site.state().allocations["1-n0"].failed
    assert "too few nodes on this machine: 6 wanted, 3 left (n1, n2, n3)" in failed


def test_garbage_in_the_inbox_is_set_aside(site: Site):
    site.start("steps=60")
    (site.runs / "1" / "inbox" / "garbage.json").write_text("{not json")
    (site.runs / "1" / "inbox" / "strange.json").write_text('{"ts": 1, "author": "x", "verb": "fly", "arguments": {}}')
    site.start_daemon()
    assert site.ended().status is Status.COMPLETED
    refused = [x.event for x in site.entries() if isinstance(x.event, e.RequestRefused)]
    assert [r.verb for r in refused] == ["fly"]
    assert (site.runs / "1" / "inbox" / "garbage.refused").exists()


def test_drills_that_cannot_be_are_refused(site: Site):
    site.start("steps=100000")
    site.start_daemon()
    site.wait(lambda state: state.status is Status.TRAINING)
    assert "1.00-a0 has ranks 0 to 1" in site.command("drill", "kill-rank", "1", "--rank", "9", "--yes", code=4)
    assert "node n9 is not held" in site.command("drill", "xid", "1", "--node", "n9", "--yes", code=4)
