"""`opt-ops q`: what lives and what ended within a day, and how old what is shown is."""

import getpass
import json
import re
import time
from pathlib import Path

import pytest

from opt_ops.cli.queue import _COLUMNS
from opt_ops.core import events as e
from opt_ops.core.values import Outcome
from opt_ops.runfolder.files import write_json
from tests.cli.test_tables import on_a_terminal
from tests.commands import opt_ops
from tests.core.story import Story
from tests.e2e.stub_trainer import telemetry

DAY = 86400.0
AS_OF = "2026-11-30T02:00:00.000Z"


def training(runs: Path, name: str, began: float, *, last_step: float, every: float = 10.0) -> Story:
    """A lineage that trains, with ten steps in its telemetry, one `every` seconds; the last one `last_step` ago."""
    story = Story()
    story.now = began
    story.training(100).save(runs / name)
    folder = runs / name / "12.00" / "a0"
    folder.mkdir(parents=True)
    at = time.time() - last_step
    lines = [telemetry(step, 1e-3, 2.5, 0.5) | {"ts": at - every * (100 - step)} for step in range(91, 101)]
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return story


def over(runs: Path, name: str, ago: float) -> None:
    """A lineage that its operator stopped so long ago."""
    story = Story()
    story.now = time.time() - ago - 110.0
    story.training(100)
    story.see(e.StopRequested(request="r", author="ann", reason="wrong tokenizer"))
    story.ends(Outcome.STOPPED)
    assert str(story.state.status) == "CANCELLED"
    story.save(runs / name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lineage 1 ended two days ago, 2 an hour ago; 3 and 4 train, 4 has made no step for a minute; nobody watches 4."""
    folder = tmp_path_factory.mktemp("site")
    over(folder / "runs", "1", 2 * DAY)
    over(folder / "runs", "2", 3600.0)
    training(folder / "runs", "3", time.time() - 500.0, last_step=1.0)
    training(folder / "runs", "4", time.time() - 500.0, last_step=300.0)
    write_json(folder / "runs" / "2" / "chronicle" / "report.json", {"as_of": AS_OF, "goodput": {"goodput": 0.75}})
    return folder


@pytest.fixture(autouse=True)
def daemon(site: Path) -> None:
    """The daemon of another host watches lineage 3, and has just said so."""
    sign = {"ts": time.time() + 20.0, "host": "head", "pid": 1, "version": "0", "policy": "p", "lineages": ["3"]}
    write_json(site / "runs" / "daemon.json", sign)


def names(text: str) -> list[str]:
    return [line.split("\t")[0] for line in text.splitlines()[1:]]


def test_what_ended_longer_ago_is_only_counted(site: Path):
    done = opt_ops(site, "q")
    assert names(done.stdout) == ["2", "3", "4"]
    assert "1 that ended longer ago: opt-ops q -a\n" in done.stderr
    assert names(opt_ops(site, "q", "-a").stdout) == ["1", "2", "3", "4"]


def test_programs_get_all_of_them_with_what_they_need(site: Path):
    rows = json.loads(opt_ops(site, "q", "-o", "json").stdout)["items"]
    assert [row["lineage"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["watched"] for row in rows] == [None, None, True, False]
    assert [row["ended_at"] is None for row in rows] == [False, False, True, True]
    assert [row["goodput"] for row in rows] == [None, 0.75, None, None]
    assert [row["goodput_as_of"] for row in rows] == [None, AS_OF, None, None]
    assert all(row["author"] == "ann" for row in rows)
    assert 300.0 <= rows[3]["data_age_seconds"] <= 400.0
    assert opt_ops(site, "q", "-o", "name").stdout == "1\n2\n3\n4\n"


def test_a_filter_by_state_or_by_author(site: Path):
    assert names(opt_ops(site, "q", "--state", "training", "--state", "HALTED").stdout) == ["3", "4"]
    assert names(opt_ops(site, "q", "--mine").stdout) == (["2", "3", "4"] if getpass.getuser() == "ann" else [])
    wrong = opt_ops(site, "q", "--state", "CANCELED")
    assert (wrong.returncode, "did you mean CANCELLED?" in wrong.stderr) == (2, True)


def test_nobody_watches_is_said_once_with_the_next_command(site: Path):
    done = opt_ops(site, "q")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("4\t")]
    assert line.split("\t")[-1] == "nobody watches yet"
    assert done.stderr.count("nobody watches yet: the daemon, pid 1 on head, has not taken it over\n") == 1
    assert "  next: opt-ops daemon status\n" in done.stderr


def test_reasons_are_short_and_whole_in_wide(site: Path):
    rows = [line.split("\t") for line in opt_ops(site, "q", "-a").stdout.splitlines()]
    assert rows[0][-2:] == ["AGE", "REASON"]
    assert max(len(row[-1]) for row in rows) <= 40
    wide = opt_ops(site, "q", "-a", "-o", "wide").stdout
    assert "SINCE" in wide.splitlines()[0]
    assert "has not taken it over; no step for" in wide


def test_colours_say_what_is_well(site: Path):
    shown = on_a_terminal(site, 200, "q", "-a")
    colours = {row: re.findall(r"\x1b\[(\d+)m", line) for line in shown.splitlines() if (row := line[:1]).isdigit()}
    assert colours == {"1": ["90", "0"], "2": ["90", "0"], "3": ["32", "0"], "4": ["33", "0", "31", "0"]}
    assert [column.heading for column in _COLUMNS if column.colour] == ["STATE", "AGE"]
