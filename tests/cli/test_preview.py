"""`--dry-run`: a sentence for each event that the daemon would journal, and the state replayed once."""

import dataclasses
import sys
from pathlib import Path
from string import Formatter
from types import ModuleType

import pytest

from opt_ops.cli import node
from opt_ops.cli.preview import _SENTENCES
from opt_ops.runfolder import lineages
from tests.cli.test_cli import told


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    told().save(folder / "runs" / "12")
    return folder


def test_templates_name_fields_that_their_events_have():
    for event, sentence in _SENTENCES.items():
        if isinstance(sentence, str):
            named = {name.removeprefix("event.") for _, name, _, _ in Formatter().parse(sentence) if name}
            assert named <= {field.name for field in dataclasses.fields(event)}, event


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "pause", "12"], ["Would pause after one more checkpoint and release the nodes."]),
        (["run", "pause", "12", "--keep-nodes"], ["Would pause after one more checkpoint and keep the nodes."]),
        (["run", "rollback", "12", "--lr-scale", "0.5", "--skip-batches", "7"], [
            "Would start the next run from step 300 or before, learning rate × 0.5, 7 batches skipped.",
            "Would discard 20 steps.",
        ]),
        (["run", "set", "12", "clip=0.5"], [
            "Would start the next run after one more checkpoint, optim.clip_norm=0.5.",
        ]),
        (["run", "set", "12", "--planned", "48000:stage b", "--planned", "310"], [
            "Would declare as planned: step 48,000 (stage b), step 310; the loss detectors learn again there.",
        ]),
        (["run", "take-over", "12"], ["Would switch to advisory mode: the daemon acts on requests only."]),
        (["node", "exclude", "12", "n1"], ["Would exclude n1: no attempt starts there."]),
        (["node", "allow", "12", "n2"], ["Would allow attempts on n2 again."]),
        (["drill", "lr", "12"], [
            "Would inject the fault lr into attempt 12.01-a1 (from_step 321, updates 30, factor 40.0).",
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
    app([*arguments, "--dry-run"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in said if line not in lines] == [], lines
    assert all(line.startswith("Would ") and line.endswith(".") for line in lines), lines
    assert len(replays) == 1


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
