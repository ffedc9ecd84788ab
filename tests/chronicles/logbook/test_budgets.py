"""What a reader's patience allows: of the committed example, and of a small lineage that really ran."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chronicles.logbook.render import render
from scripts.example_chronicle import LARGEST, TARGET, measured

MARKDOWN = (TARGET / "logbook.md").read_text(encoding="utf-8")
PAGE = (TARGET / "logbook.html").read_text(encoding="utf-8")


def test_the_example_is_short_enough_to_be_read():
    found = measured(MARKDOWN)
    assert found["words"] <= 15_000
    assert 150 <= found["words of the story"] <= 600
    assert found["share of different headings"] >= 0.5
    assert found["longest run of headings that are alike"] <= 3
    assert len(PAGE.encode()) <= LARGEST


def test_the_story_stands_first():
    assert re.findall(r"^## (.*)$", MARKDOWN, re.MULTILINE)[0] == "Story"
    assert MARKDOWN.startswith("> **Simulated."), "and the page says first that it is simulated"


def test_nothing_of_the_example_gets_lost_on_the_page():
    known = {int(number) for number in re.findall(r"\b12-i(\d{3,})\b", PAGE)}
    opened = sum(map(int, re.findall(r"(\d+) (?:incidents|planned moves?|requested changes?)[,;:. ]", _lead())))
    assert len(known) == opened > 200
    assert known == set(range(opened))
    ids = set(re.findall(r'\bid="(12-i\d+)"', PAGE))
    assert ids == {f"12-i{number:03d}" for number in known}, "each can be linked to"


def _lead() -> str:
    return next(line for line in MARKDOWN.splitlines() if line.startswith("**COMPLETED"))


def test_routine_of_the_example_is_told_in_few_entries():
    routine = [line for line in MARKDOWN.splitlines() if line.startswith("### ") and "without ranks excluded" in line]
    members = re.findall(r"^\| .*excluded: .*\| (12-i\d+) \|$", MARKDOWN, re.MULTILINE)
    assert len(members) > 100
    assert len(routine) <= 35


@pytest.mark.parametrize("file", ["logbook.md", "logbook.html"])
def test_a_small_lineage_is_told_in_a_paragraph_and_loses_nothing(lineage: Path, file: str):
    render(lineage)
    text = (lineage / "chronicle" / file).read_text(encoding="utf-8")
    assert all(f"1-i{number:03d}" in text for number in range(4))
    if file.endswith(".md"):
        found = measured(text)
        assert found["share of different headings"] >= 0.5
        assert found["longest run of headings that are alike"] <= 3
        assert found["words"] <= 2_200
        assert found["words of the story"] <= 150
        story = text.partition("## Story\n")[2].partition("\n## ")[0]
        assert len([line for line in story.splitlines() if line]) == 1, "one paragraph, no phases"
