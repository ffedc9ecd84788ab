"""Ask mode with real commands, a real daemon, agents and processes, and the stub trainer."""

import json

from opt_ops.core import events as e
from opt_ops.core.state.queries import open_proposals
from opt_ops.core.state.status import Status
from opt_ops.core.values import ProposalStatus
from tests.e2e.site import Site


def patient(site: Site) -> None:
    """A proposal waits for an hour: this machine may be busy."""
    for name in ("process_death", "hang"):
        page = site.folder / "playbooks" / f"{name}.md"
        page.write_text(page.read_text().replace("minutes = 2", "minutes = 60"))


def test_a_restart_waits_for_its_approval_and_is_done_once(site: Site):
    patient(site)
    assert site.command("pending", "-q") == ""
    site.command("run", "start", "stub", "--set=steps=100000", "--set=pause=0.01", "--driver", "ask", "-q")
    site.start_daemon()
    site.wait(lambda state: len(state.checkpoints) >= 2)
    site.command("drill", "kill-rank", "1", "--rank", "1", "--yes", "-q")
    waits = site.wait(open_proposals)
    assert site.state().attempt.name == "1.00-a0"

    (row,) = json.loads(site.command("pending", "1", "-o", "json", "-q", code=5))["items"]
    assert (row["proposal"], row["incident"], row["status"]) == (waits[0].name, "1-i000", "open")
    assert (row["default"], row["by"], row["action"]) == ("act", None, "restart")
    assert set(row["cost"]) == {"steps", "seconds", "node_hours"}
    assert "needs an answer by" in site.command("q")
    assert "needs an answer by" in site.command("run", "show", "1")
    assert "needs an answer by" in site.command("run", "watch", "1", "--once")

    site.kill_daemon()
    site.start_daemon()
    site.wait(lambda state: state.epoch == 2)
    site.looked()
    assert site.state().attempt.name == "1.00-a0", "the question is still open"

    name = open_proposals(site.state())[0].name
    site.command("run", "approve", "1-i000", "--reason", "seen", "--author", "bo", "-q")
    state = site.wait(lambda state: len(state.attempts) == 2 and state.status is Status.TRAINING and state)
    proposal = state.incidents["1-i000"].proposal
    assert (proposal.name, proposal.status, proposal.answer.author) == (name, ProposalStatus.APPROVED, "bo")
    assert state.incidents["1-i000"].decision.why.startswith("approved by bo: seen; ")
    assert sum(isinstance(x.event, e.RecoveryDecided) and x.event.incident == "1-i000" for x in site.entries()) == 1
    assert site.command("pending", "-q") == ""

    late = site.command("run", "approve", "1-i000", code=4)
    assert f"{name} was approved by bo" in late
    assert "no proposal is open now" in late
    site.command("run", "hand-back", "1", "--yes", "-q")
    assert site.wait(lambda state: state.driver.acts and not open_proposals(state))
