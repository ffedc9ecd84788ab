"""Commands without an ID mean the newest lineage that lives, and say so. A change does not guess among several."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

from opt_ops.cli import app
from opt_ops.core import events as e
from tests.commands import opt_ops
from tests.core.story import Story


def ended(lineage: Path) -> None:
    """Write a lineage that its operator has stopped."""
    story = Story().training(100)
    story.see(e.StopRequested(request="r", author="ann", reason="wrong tokenizer"))
    story.ends()
    story.save(lineage)


def lives(lineage: Path) -> None:
    """Write a lineage that trains."""
    Story().training(100).save(lineage)


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    def made(**lineages: Callable[[Path], None]) -> Path:
        for name, write in lineages.items():
            write(tmp_path / "runs" / name.removeprefix("of_"))
        return tmp_path

    return made


def test_the_newest_that_lives_is_meant_and_named(site: Callable[..., Path]):
    folder = site(of_12=lives, of_13=ended)
    done = opt_ops(folder, "events", "-o", "jsonl")
    assert (done.returncode, done.stderr) == (0, "lineage 12\n")
    assert opt_ops(folder, "run", "suggest", "-q").stderr.count("lineage 12\n") == 0


def test_if_none_lives_the_newest_is_meant(site: Callable[..., Path]):
    folder = site(of_12=ended, of_13=ended)
    assert opt_ops(folder, "explain").stderr == "lineage 13\n"


def test_a_change_does_not_guess_among_two_that_live(site: Callable[..., Path]):
    folder = site(of_11=ended, of_12=lives, of_13=lives)
    done = opt_ops(folder, "run", "pause", "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "two live: 12 and 13; name one" in done.stderr
    assert opt_ops(folder, "run", "pause", "12", "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("words", "verb", "arguments"),
    [
        (["note", "the switch is new"], "note", {"target": "12", "text": "the switch is new"}),
        (["run", "set", "lr=1e-4", "clip=1", "--yes"], "change", {"lr": 1e-4, "settings": ["optim.clip_norm=1"]}),
        (["node", "exclude", "n2", "--yes"], "exclude", {"node": "n2"}),
    ],
)
def test_one_argument_is_what_follows_the_id(site: Callable[..., Path], words: list[str], verb: str, arguments: dict):
    folder = site(of_12=lives)
    done = opt_ops(folder, *words, "--no-wait")
    assert (done.returncode, "lineage 12\n" in done.stderr) == (0, True), done.stderr
    (request,) = (folder / "runs/12/inbox").glob("*.json")
    asked = json.loads(request.read_text())
    assert asked["verb"] == verb
    assert {name: asked["arguments"][name] for name in arguments} == arguments


def test_an_id_alone_is_no_text(site: Callable[..., Path]):
    done = opt_ops(site(of_12=lives), "note", "12")
    assert (done.returncode, "nothing follows the ID 12" in done.stderr) == (2, True)


def test_every_id_may_be_left_out():
    """But for what a fork begins with, and for the proposal that is answered."""

    def required(command: object, path: str = "") -> list[str]:
        children = getattr(command, "commands", {})
        found = [name for each in children for name in required(children[each], f"{path} {each}")]
        arguments = [each for each in getattr(command, "params", ()) if each.name == "identifier"]
        arguments = [each for each in arguments if each.metavar not in ("RUN", "PROPOSAL")]
        return found + [path for each in arguments if each.required or each.metavar != "ID"]

    assert required(typer.main.get_command(app)) == []
