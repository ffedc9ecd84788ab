"""`opt-ops glossary` prints the table of docs/glossary.md."""

import json
from pathlib import Path

from opt_ops.cli.glossary import _terms
from tests.cli.test_cli import commands
from tests.commands import opt_ops

PAGE = Path(__file__).parents[2] / "docs" / "glossary.md"


def test_the_glossary_is_the_table_of_its_page(tmp_path: Path):
    answer = json.loads(opt_ops(tmp_path, "glossary", "-o", "json").stdout)
    assert answer["schema"] == "opt-ops/glossary/1"
    terms = [row["word"] for row in answer["items"]]
    written = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    assert terms == written[2:]
    # A page that is read once, at the beginning, so it stays short.
    assert 40 <= len(terms) == len(set(terms)) <= 50
    for row in answer["items"]:
        assert list(row) == ["word", "term", "meaning", "see", "also"]
        assert row["meaning"].endswith(".")
        assert row["see"].startswith(("opt-ops ", "docs/"))


def test_what_a_term_refers_to_exists():
    known = dict(commands())
    for row in _terms():
        if row.see.startswith("docs/"):
            assert (PAGE.parents[1] / row.see).exists(), row
        else:
            words = row.see.split()[1:]
            assert any(" ".join(words[:count]) in known for count in (1, 2)), row


def test_other_words_for_it_are_found():
    names = [name for row in _terms() for name in (row.word, *row.also)]
    assert len(names) == len(set(names)), "one word for one thing"


def test_a_word_of_others_leads_to_ours(tmp_path: Path):
    for word, ours in (
        ("taken out", "excluded"),
        ("taken back", "discarded"),
        ("called", "page"),
        ("budget", "retry budget"),
    ):
        assert opt_ops(tmp_path, "glossary", *word.split(), "-o", "name").stdout == f"{ours}\n"


def test_one_term_of_one_word_or_two(tmp_path: Path):
    (only,) = json.loads(opt_ops(tmp_path, "glossary", "Retry", "budget", "-o", "json").stdout)["items"]
    assert only["word"] == only["term"] == "retry budget"
    assert opt_ops(tmp_path, "glossary", "xid", "-o", "name").stdout == "Xid\n"


def test_an_unknown_term_is_not_found_with_a_guess(tmp_path: Path):
    done = opt_ops(tmp_path, "glossary", "goodpt")
    assert (done.returncode, done.stdout) == (3, "")
    assert "the glossary has no term goodpt; did you mean goodput?" in done.stderr
    assert "next: opt-ops glossary" in done.stderr
