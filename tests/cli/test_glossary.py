"""`opt-ops glossary` prints the table of docs/glossary.md."""

import json
from pathlib import Path

from tests.cli.test_cli import opt_ops

PAGE = Path(__file__).parents[2] / "docs" / "glossary.md"


def test_the_glossary_is_the_table_of_its_page(tmp_path: Path):
    answer = json.loads(opt_ops(tmp_path, "glossary", "-o", "json").stdout)
    assert answer["schema"] == "opt-ops/glossary/1"
    terms = [row["term"] for row in answer["items"]]
    assert (
        terms
        == [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line[:1] == "|"][2:]
    )
    assert len(terms) == len(set(terms)) <= 40
    assert all(set(row) == {"term", "meaning"} and row["meaning"] for row in answer["items"])


def test_one_term_of_one_word_or_two(tmp_path: Path):
    (only,) = json.loads(opt_ops(tmp_path, "glossary", "Retry", "budget", "-o", "json").stdout)["items"]
    assert only["term"] == "retry budget"
    assert opt_ops(tmp_path, "glossary", "xid", "-o", "name").stdout == "Xid\n"


def test_an_unknown_term_is_not_found_with_a_guess(tmp_path: Path):
    done = opt_ops(tmp_path, "glossary", "goodpt")
    assert (done.returncode, done.stdout) == (3, "")
    assert "the glossary has no term goodpt; did you mean goodput?" in done.stderr
    assert "next: opt-ops glossary" in done.stderr
