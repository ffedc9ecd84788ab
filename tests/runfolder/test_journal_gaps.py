"""Whatever is removed, doubled, swapped, cut or put in: a journal is refused with its place, or tells the same."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.runfolder.journal import Journal, JournalError, read
from tests.runfolder.test_journal import note, texts


def written(folder: Path, *files: int) -> Path:
    """A journal with so many lines in each file."""
    for number, lines in enumerate(files, 1):
        journal = Journal(folder)
        for line in range(lines):
            journal.append(journal.stamp(note(f"{number}-{line}"), 1_795_000_000.0 + line))
        journal.close()
    return folder


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


@given(st.data())
def test_a_line_that_is_removed_doubled_or_moved_is_never_taken_in_silence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    folder = written(tmp_path_factory.mktemp("lineage") / "journal", 4, 3, 5)
    whole = texts(folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    lines = lines_of(path)
    at = data.draw(st.integers(0, len(lines) - 1))
    other = data.draw(st.sampled_from([each for each in sorted(folder.iterdir()) if each != path]))
    match data.draw(st.sampled_from(["remove", "double", "swap", "cut", "foreign", "flip"])):
        case "remove":
            del lines[at]
        case "double":
            lines.insert(data.draw(st.integers(0, len(lines))), lines[at])
        case "swap":
            lines.insert(data.draw(st.integers(0, len(lines) - 1)), lines.pop(at))
        case "cut":
            del lines[at:]
        case "flip":
            bit = data.draw(st.integers(0, 8 * len(lines[at]) - 1))
            flipped = bytearray(lines[at])
            flipped[bit // 8] ^= 1 << bit % 8
            lines[at] = bytes(flipped)
        case _:
            lines[at : at + 1] = [data.draw(st.sampled_from(lines_of(other)))]
    path.write_bytes(b"".join(lines))
    try:
        entries, notes = read(folder)
    except JournalError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert str(folder) in str(refused)
        assert "doctor --repair" in refused.hint
        return
    # What a crash may leave behind, a last line that is torn or damaged, is skipped, and said.
    told = [entry.event.text for entry in entries]
    assert told == whole or (told == whole[:-1] and any("the last line" in each for each in notes))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_file_is_noticed(tmp_path: Path, number: int):
    folder = written(tmp_path / "journal", 3, 3, 3)
    (folder / f"00000{number}.jsonl").unlink()
    with pytest.raises(JournalError, match=r"missing"):
        read(folder)


def test_an_old_copy_as_the_newest_file_is_noticed(tmp_path: Path):
    folder = written(tmp_path / "journal", 4, 2)
    shutil.copy(folder / "000001.jsonl", folder / "000003.jsonl")
    with pytest.raises(JournalError, match=r"000003\.jsonl, line 1: belongs to epoch 1"):
        read(folder)


def test_an_older_copy_of_the_newest_file_is_noticed(tmp_path: Path):
    folder = written(tmp_path / "journal", 2, 4)
    path = folder / "000002.jsonl"
    path.write_bytes(b"".join(lines_of(path)[:2]))
    with pytest.raises(
        JournalError, match=r"000002\.jsonl, line 2: the file ends at seq 4, and was written up to seq 6"
    ):
        read(folder)


def test_the_file_of_another_lineage_is_noticed_although_its_numbers_fit(tmp_path: Path):
    folder, other = written(tmp_path / "1" / "journal", 3, 2), tmp_path / "2" / "journal"
    journal = Journal(other)
    for text in "abc":
        journal.append(journal.stamp(note(text), 0.0))
    shutil.copy(other / "000001.jsonl", folder / "000001.jsonl")
    with pytest.raises(JournalError, match=r"000002\.jsonl, line 1: does not follow"):
        read(folder)


def test_files_of_an_older_version_need_no_chain(tmp_path: Path):
    from opt_ops.runfolder.journal import _line

    journal = Journal(tmp_path / "journal")
    first, second = journal.stamp(note("a"), 0.0), note("b")
    os.write(journal._descriptor, _line(first))
    os.write(journal._descriptor, _line(e.Entry(seq=2, epoch=1, ts=0.0, event=second)))
    assert texts(tmp_path / "journal") == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["٣٣٣٣٣٣.jsonl", "1.jsonl", "000000.jsonl", "99999999999999999999.jsonl", "x.txt", "²²²²²².jsonl"]
)
def test_what_is_no_journal_file_is_named_and_fences_nobody(tmp_path: Path, name: str):
    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal" / name).touch()
    (tmp_path / "journal" / "000007.jsonl").mkdir()
    journal.append(journal.stamp(note("a"), 0.0))
    assert texts(tmp_path / "journal") == ["a"]
    notes = read(tmp_path / "journal")[1]
    assert notes == [f"{each!a} is no journal file and is ignored" for each in sorted([name, "000007.jsonl"])]


def test_an_empty_file_with_a_large_number_fences_nobody(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal" / "000900.jsonl").touch()
    journal.append(journal.stamp(note("a"), 0.0))
    later = Journal(tmp_path / "journal")
    assert later.epoch == 2
    later.append(later.stamp(note("b"), 0.0))
    assert texts(tmp_path / "journal") == ["a", "b"]


def test_a_withdrawn_file_leaves_no_gap(tmp_path: Path):
    written(tmp_path / "journal", 2)
    Journal(tmp_path / "journal").withdraw()
    later = Journal(tmp_path / "journal")
    later.append(later.stamp(note("b"), 0.0))
    assert later.epoch == 3
    assert texts(tmp_path / "journal") == ["1-0", "1-1", "b"]


def test_who_cannot_read_the_journal_does_not_fence_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "journal")
    journal.append(journal.stamp(note("a"), 0.0))
    monkeypatch.setattr("opt_ops.runfolder.journal_reader.VERSION", 0)  # an older opt-ops
    with pytest.raises(JournalError, match="version 1"):
        Journal(tmp_path / "journal")
    monkeypatch.undo()
    journal.append(journal.stamp(note("b"), 0.0))
    assert texts(tmp_path / "journal") == ["a", "b"]
