"""`opt-ops playbook …` on the journal of a real run with four drills."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from opt_ops import playbook_loader
from tests.commands import opt_ops

OLD = Path(__file__).parents[1] / "data" / "journal-first-light"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "runs" / "1" / "journal")
    edited = tmp_path / "edited"
    edited.mkdir()
    for path in playbook_loader.folder().glob("*.md"):
        shutil.copy(path, edited)
    return tmp_path


def edit(site: Path, page: str, old: str, new: str) -> None:
    path = site / "edited" / f"{page}.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return opt_ops(site, "playbook", *arguments)


def tried(site: Path, *more: str) -> list[dict[str, object]]:
    done = run(site, "try", "1", "--from", "edited", "-o", "json", *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["items"]


def test_the_same_pages_decide_the_same(site: Path):
    assert tried(site) == []
    assert [row["incident"] for row in tried(site, "--all")] == ["1-i000", "1-i001", "1-i002", "1-i003"]


def test_an_edited_ladder_would_have_done_otherwise(site: Path):
    edit(site, "loss_spike", "lr_factor = 0.75", "lr_factor = 0.9")
    (row,) = tried(site)
    assert (row["incident"], row["differs"]) == ("1-i003", True)
    assert row["was"] == "rollback (loss_spike, rung 1), to 100, lr × 0.75"
    assert row["would_be"] == "rollback (loss_spike, rung 1), to 100, lr × 0.9"


def test_an_edited_margin_would_have_chosen_another_checkpoint(site: Path):
    edit(site, "loss_spike", "margin_steps = 100", "margin_steps = 30 ")
    (row,) = tried(site)
    assert "to 175" in str(row["would_be"])


def test_a_page_that_excludes_nothing_any_more(site: Path):
    edit(site, "bad_gpu", '"restart"\nexclude = true', '"restart"\nexclude = false')
    (row,) = tried(site)
    assert (row["was"], row["would_be"]) == (
        "restart (bad_gpu, rung 1), excludes n2",
        "restart (bad_gpu, rung 2)",
    )


def test_a_malformed_page_is_an_error_with_its_line(site: Path):
    edit(site, "hang", "multiple = 2.0", "multiple = 0.5")
    done = run(site, "check", "--from", "edited")
    assert done.returncode == 2
    assert "hang.md, line 8: detect.multiple" in done.stderr


def test_a_page_is_found_by_its_name_and_by_what_it_answers(site: Path):
    assert run(site, "show", "checkpoint_refused").stdout == run(site, "show", "process_death").stdout != ""
    assert run(site, "show", "gremlins").returncode == 3


def test_all_pages_are_listed_and_counted(site: Path):
    listed = json.loads(run(site, "list", "-o", "json").stdout)["items"]
    assert {row["name"] for row in listed} == {path.stem for path in playbook_loader.folder().glob("*.md")}
    assert run(site, "check").stdout.startswith(f"{len(listed)} playbooks, ")
