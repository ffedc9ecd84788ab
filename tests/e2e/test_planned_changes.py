"""A change of the data that raises the loss for good: real commands, daemon, agents and processes, the stub trainer."""

from opt_ops.core.state.status import Status
from opt_ops.core.values import Action
from tests.e2e.site import Site

CHANGE = 200
STEPS = "steps=500"


def test_a_change_that_is_declared_at_the_start_or_later_is_left_alone(site: Site):
    site.start(STEPS, "pause=0.01", f"misbehave=stage@{CHANGE}:*", planned=f"{CHANGE}:stage b")
    site.start_daemon()
    site.wait(lambda state: state.checkpoints)
    site.command("run", "set", "1", "--planned", f"{CHANGE + 150}:stage c", "--reason", "the mix", "--yes", "-q")
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert [incident.kind for incident in state.incidents.values()] == []
    assert len(state.attempts) == 1, "a declaration restarts nothing"
    shown = site.command("run", "show", "1")
    assert "stage b" in shown
    assert "stage c" in shown
    assert "changes_declared" in site.command("events", "1")


def test_an_undeclared_change_with_another_batch_is_paged_and_not_rolled_back(site: Site):
    site.start(STEPS, "pause=0.01", f"misbehave=stage@{CHANGE}:*,batch@{CHANGE}:*")
    site.start_daemon()
    state = site.ended()
    assert state.status is Status.COMPLETED
    assert [(i.kind, i.decision.action) for i in state.incidents.values()] == [("undeclared_change", Action.NOTIFY)]
    assert len(state.attempts) == 1
