"""Probes on idle nodes: real commands, daemon, agents and processes, the stub trainer, a shard of odd data."""

import json
from pathlib import Path

from opt_ops.core.failures.causes import Cause
from opt_ops.core.values import Action
from tests.e2e.site import Site

SHARD = (100, 180)


def test_a_shard_is_skipped_because_only_the_same_data_spikes_in_a_probe(tmp_path: Path):
    """The daemon is killed while the probes run; the next one goes on with them."""
    site = Site(tmp_path, loss_spike={"[proof]": "[probe]\n\n[proof]"})
    try:
        site.start("steps=260", "pause=0.03", f"shard={SHARD[0]}:{SHARD[1]}", nodes=1, spares=2)
        site.start_daemon()
        site.wait(lambda state: any(incident.probes for incident in state.incidents.values()))
        site.kill_daemon()
        site.start_daemon()
        state = site.ended()
        (incident,) = [each for each in state.incidents.values() if each.kind == "loss_spike"]
        assert {str(each.probe): each.spiked for each in incident.probe_ends} == {
            "other_data": False,
            "same_data": True,
        }
        assert incident.causes[0].cause is Cause.BAD_DATA
        decision = incident.decision
        assert (decision.action, decision.cause, bool(decision.skips)) == (Action.ROLLBACK, Cause.BAD_DATA, True)
        assert incident.proven
        kinds = [json.loads(line)["kind"] for line in site.command("events", "1", "-o", "jsonl").splitlines()]
        assert kinds.count("probes_intended") == 1, "the daemon that takes over begins none again"
        shown = site.command("run", "explain", incident.name)
        assert "other_data" in shown
        assert "did not spike" in shown
        site.command("logbook", "render", "1")
        logbook = (site.runs / "1" / "chronicle" / "logbook.md").read_text()
        assert "| Probe | Node | Result |" in logbook
        assert "other_data stayed in the band" in logbook.replace("\\", "")
        folder = site.runs / "1" / "probes" / incident.name
        assert {each.name for each in folder.iterdir()} == {"other_data", "same_data"}
        reports = [json.loads(path.read_text()) for path in folder.glob("*/nodes/*.json")]
        assert len(reports) == 2
        assert all(rank["ended"] for report in reports for rank in report["ranks"]), "they were ended"
    finally:
        site.close()
