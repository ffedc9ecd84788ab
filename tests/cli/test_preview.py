"""`--dry-run`: a sentence for each event that the daemon would journal, and the state replayed once."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from opt_ops.cli.node import commands as node
from opt_ops.cli.shared.foreseen import Loss
from opt_ops.runfolder import lineages
from tests.cli.test_cli import told


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "pause", "12"], [
            "would save    at step 320 or soon after",
            "would end     12.01-a1 on n1, n3",
            "would give back  3 nodes",
            "would lose    the steps that are trained while that checkpoint is written: that is known afterwards",
        ]),
        (["run", "pause", "12", "--keep-nodes"], [
            "would save    at step 320 or soon after",
            "would end     12.01-a1 on n1, n3",
            "would lose    the steps that are trained while that checkpoint is written: that is known afterwards",
        ]),
        (["run", "stop", "12"], [
            "would stop    for good, as ann asks",
            "would end     12.01-a1 on n1, n3",
            "would withdraw  the request for 1 node",
            "would give back  3 nodes",
            "would lose    20 steps since the newest good checkpoint",
        ]),
        (["run", "rollback", "12", "--lr-scale", "0.5", "--skip-batches", "7"], [
            "would end     12.01-a1 on n1, n3",
            "would begin   12.02 from step 300, learning rate × 0.5, without the batches 301 to 307",
            "would train   with the learning rate 0.375 × the schedule from step 301 on (0.000275795 there)",
            "would lose    20 steps",
        ]),
        (["run", "set", "12", "clip=0.5"], [
            "would save    at step 320 or soon after",
            "would end     12.01-a1 on n1, n3",
            "would begin   the next run there, with optim.clip_norm=0.5",
            "would train   with the learning rate 0.75 × the schedule from there on; it is 0.75 × now",
            "would lose    the steps that are trained while that checkpoint is written: that is known afterwards",
        ]),
        (["run", "set", "12", "--planned", "48000:stage b", "--planned", "310"], [
            "would expect  2 changes at steps 48,000 (“stage b”), 310; the loss detectors learn again there",
            "would lose    nothing that is trained",
        ]),
        (["run", "take-over", "12"], [
            "would act     on requests only, until you hand back",
            "would lose    nothing that is trained",
        ]),
        (["node", "exclude", "12", "n1"], [
            "would exclude  n1",
            "would ask     Slurm to drain n1",
            "would ask     for 1 node, without n1, n2",
            "would lose    nothing that is trained",
        ]),
        (["node", "allow", "12", "n2"], ["would let     n2 run again", "would lose    nothing that is trained"]),
        (["drill", "lr", "12"], [
            "would inject  a fault in 12.01-a1: learning rate × 40 for 30 updates from step 321",
            "would lose    what the fault costs: that is known afterwards",
        ]),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_would_happen_and_replays_the_journal_once(
    site: Path,
    arguments: list[str],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from opt_ops.cli import app

    replays = []

    def count(module: ModuleType, name: str) -> None:
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *journal: replays.append(1) or whole(*journal))

    count(lineages, "replayed")
    count(node, "replay")  # of entries that it needs for the parts of the node, too
    monkeypatch.chdir(site)
    monkeypatch.setattr(sys, "argv", ["opt-ops"])
    author = [] if arguments[0] == "drill" else ["--author", "ann"]
    app([*arguments, *author, "--dry-run"], standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == said
    assert len(replays) == 1


def test_programs_read_every_event_that_is_foreseen_and_the_cost_last(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from opt_ops.cli import app

    monkeypatch.chdir(site)
    monkeypatch.setattr(sys, "argv", ["opt-ops"])
    app(["run", "rollback", "12", "--lr-scale", "0.5", "--dry-run", "-o", "json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "opt-ops/foreseen/1"
    *events, cost = found["items"]
    kinds = [each["kind"] for each in events]
    assert kinds == ["change_requested", "incident_opened", "recovery_decided", "stop_intended", "run_planned"]
    assert all(set(each) == {"kind", "text", "fields"} and each["text"].startswith("would ") for each in events)
    assert events[-1]["fields"]["run"] == "12.02"
    assert cost == {
        "kind": "cost", "text": "would lose 20 steps", "steps": 20, "seconds": None, "node_hours": None
    }  # fmt: skip


def test_a_loss_says_what_it_has_cost():
    assert (
        Loss(steps=2240, seconds=46860.0, nodes=124).text == "2,240 steps (13 h 1 min of 124 nodes, 1,614 node-hours)"
    )
    assert Loss(steps=1, since=" since then").text == "1 step since then"
    assert Loss(steps=0).row() == {
        "kind": "cost", "text": "would lose nothing that is trained", "steps": 0, "seconds": 0.0, "node_hours": 0.0
    }  # fmt: skip


@pytest.mark.parametrize("options", [["--factor", "nan"], ["--factor", "inf"], ["--factor", "0.5"], ["--updates", "0"]])
def test_the_limits_of_a_drill_are_checked_before_anything_is_asked(
    site: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
):
    from typer import BadParameter

    from opt_ops.cli import app
    from opt_ops.errors import UsageError

    monkeypatch.chdir(site)
    monkeypatch.setattr(sys, "argv", ["opt-ops"])
    with pytest.raises((UsageError, BadParameter)):
        app(["drill", "lr", "12", *options, "--yes", "--no-wait"], standalone_mode=False)
    assert not list((site / "runs" / "12").glob("inbox/*.json"))
