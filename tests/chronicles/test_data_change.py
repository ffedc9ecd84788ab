"""What readers see of data that was changed: entry, mark, report, card and statement; and what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chronicles.comparison import settings as compared
from chronicles.comparison.family import Family
from chronicles.logbook.drawing.marks import marks
from chronicles.logbook.entries.build import entries
from chronicles.record import LineageRecord, load
from chronicles.release import statement
from chronicles.report.build import build
from tests.core.decide.test_data_change import changed, with_change

CHANGE = "+ code 10 %, wiki 50 % → 90 %, − books"


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> LineageRecord:
    """The data was changed after step 195, and a rollback to step 100 has taken it back."""
    story = with_change()
    changed(story, to_step=100)
    story.train(120)
    folder = tmp_path_factory.mktemp("runs") / "12"
    story.save(folder)
    return load(folder)


def test_the_logbook_has_an_entry_of_its_own_and_a_mark(record: LineageRecord) -> None:
    report = build(record)
    known = {entry.title: entry for entry in entries(record, report)}
    change = {each.what: (each.before, each.after) for each in known[f"data changed at step 195: {CHANGE}"].changes}
    assert change["data"] == ("wiki 50 %, books 50 %", "wiki 90 %, code 10 %")
    (back,) = [title for title in known if title.startswith("rolled back")]
    assert "data of before step 195" in back
    assert next((mark.step, mark.title) for mark in marks(report)) == (195, "data changed")
    assert [run.data_changes for run in report.runs] == [(), ((195, CHANGE),), ()]


def corpus(name: str, share: float) -> dict[str, Any]:
    return {"name": name, "share": share, "tokens": 10, "documents": 2, "digest": f"sha256:{name}", "sources": ["/d"]}


CONFIG = {
    "data": {
        "digest": "sha256:old",
        "tokens": 10,
        "tokenizer": "sha256:t",
        "corpora": [corpus("wiki", 1.0)],
        "validation": [],
        "since": [
            {"step": 0, "digest": "sha256:old", "first_sample": 0, "corpora": [corpus("wiki", 1.0)]},
            {
                "step": 61000,
                "digest": "sha256:new",
                "first_sample": 9,
                "corpora": [corpus("wiki", 0.9), corpus("code", 0.1)],
            },
        ],
    }
}


def test_the_statement_has_each_stretch_up_to_the_released_step() -> None:
    behind = statement.data(CONFIG, str.upper, 62000)
    assert [(each["from_step"], each["to_step"]) for each in behind["stretches"]] == [(1, 61000), (61001, 62000)]
    assert behind["stretches"][1]["corpora"] == [{"name": "WIKI", "share": 0.9}, {"name": "CODE", "share": 0.1}]
    assert (behind["digest"], behind["tokens"], len(behind["corpora"])) == ("sha256:new", 20, 2)
    assert "sources" not in json.dumps(behind), "no path of the site"
    before = statement.data(CONFIG, str.upper, 61000)
    assert [(each["from_step"], each["to_step"]) for each in before["stretches"]] == [(1, 61000)]
    assert before["digest"] == "sha256:old"
    assert statement.data(None, str, 5)["stretches"] == []


def test_two_lineages_are_compared_by_the_shares_since_each_step(tmp_path: Path, record: LineageRecord) -> None:
    families = []
    for name, since in (("a", CONFIG["data"]["since"]), ("b", CONFIG["data"]["since"][:1])):
        attempt = tmp_path / name / "12.00" / "a0"
        attempt.mkdir(parents=True)
        (attempt / "config.json").write_text(json.dumps({"data": {"since": since}}))
        own = SimpleNamespace(state=SimpleNamespace(attempts={"12.00-a0": None}, lineage=None))
        families.append(cast("Family", SimpleNamespace(own=own, folder=tmp_path / name)))
    (only,) = compared.differences((families[0], families[1]))
    assert (only.key, only.values) == ("data.since.61000", ("wiki 90 %, code 10 %", None))
