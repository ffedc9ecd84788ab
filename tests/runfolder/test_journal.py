"""The journal on a real disk: torn, damaged, fenced, or of another version."""

import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from opt_ops.core import events as e
from opt_ops.ports import Ports
from opt_ops.runfolder.journal import Fenced, Journal, JournalError, read
from opt_ops.supervise.executor import Site
from opt_ops.supervise.supervisor import DaemonIdentity, Supervisor
from tests.core.story import POLICY


def note(text: str) -> e.NoteAdded:
    return e.NoteAdded(request=text, author="ann", target="12", text=text)


def write(folder: Path, *texts: str) -> Journal:
    journal = Journal(folder)
    for text in texts:
        journal.append(journal.stamp(note(text), 1_795_000_000.1234))
    return journal


def texts(folder: Path) -> list[str]:
    return [entry.event.text for entry in read(folder)[0]]


def test_what_was_written_is_read_by_the_next_life(tmp_path: Path):
    first = write(tmp_path, "a", "b — ünïcode \u2028 and\nnewline")
    second = write(tmp_path, "c")
    entries, notes = read(tmp_path)
    assert [(x.seq, x.epoch) for x in entries] == [(1, 1), (2, 1), (3, 2)]
    assert texts(tmp_path)[1] == "b — ünïcode \u2028 and\nnewline"
    assert notes == []
    assert (first.epoch, second.epoch) == (1, 2)


def test_an_entry_is_equal_before_and_after_the_disk(tmp_path: Path):
    journal = Journal(tmp_path)
    entry = journal.stamp(note("x"), 1_795_000_000.123987)
    journal.append(entry)
    assert read(tmp_path)[0] == [entry]


@pytest.mark.parametrize("keep", [1, 20, -2, -1])
def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path, keep: int):
    write(tmp_path, "a", "b").close()
    path = tmp_path / "000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:keep])
    assert texts(tmp_path) == ["a"]
    assert "torn" in read(tmp_path)[1][0]
    write(tmp_path, "c")
    assert texts(tmp_path) == ["a", "c"]


def test_a_damaged_last_line_is_left_out_and_said(tmp_path: Path):
    write(tmp_path, "a", "b").close()
    path = tmp_path / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"B"'))
    assert texts(tmp_path) == ["a"]
    assert "checksum" in read(tmp_path)[1][0]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path):
    write(tmp_path, "a", "b", "c").close()
    path = tmp_path / "000001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"B"'))
    with pytest.raises(JournalError, match=r"000001\.jsonl, line 2: fails its checksum"):
        read(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    write(tmp_path, "a", "b").close()
    path = tmp_path / "000001.jsonl"
    good = path.read_bytes()
    end_of_first = good.index(b"\n")
    for position in range(0, end_of_first, 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(JournalError):
            read(tmp_path)


def test_a_newer_version_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opt_ops.runfolder.journal.VERSION", 2)
    write(tmp_path, "a").close()
    monkeypatch.undo()
    with pytest.raises(JournalError, match="version 2"):
        read(tmp_path)


def test_an_older_life_is_fenced_before_it_writes(tmp_path: Path):
    old = write(tmp_path, "a")
    write(tmp_path, "b")
    with pytest.raises(Fenced, match="epoch 2 has taken over"):
        old.append(old.stamp(note("late"), 0.0))
    assert texts(tmp_path) == ["a", "b"]


def test_a_line_that_an_older_life_slipped_in_is_void(tmp_path: Path):
    old = write(tmp_path, "a")
    new = Journal(tmp_path)
    # The older process has passed its fence check when the new one begins: its bytes still reach its own file.
    from opt_ops.runfolder.journal import _line

    os.write(old._descriptor, _line(old.stamp(note("late"), 0.0)))
    new.append(new.stamp(note("b"), 0.0))
    assert texts(tmp_path) == ["a", "b"]
    assert "is void" in read(tmp_path)[1][0]


def test_lives_that_begin_at_once_get_different_epochs(tmp_path: Path):
    epochs: list[int] = []
    threads = [threading.Thread(target=lambda: epochs.append(Journal(tmp_path).epoch)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epochs) == list(range(1, 9))


def test_a_line_that_does_not_fit_on_the_disk_ends_this_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = write(tmp_path, "a")
    monkeypatch.setattr("opt_ops.runfolder.journal.os.write", lambda descriptor, line: 5)
    with pytest.raises(OSError, match="wrote 5 of"):
        journal.append(journal.stamp(note("b"), 0.0))


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No byte can be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lives_on_a_full_disk_leave_neither_files_nor_descriptors(tmp_path: Path, full_disk: None):
    ports = Ports(**dict.fromkeys((field.name for field in fields(Ports)), SimpleNamespace(now=time.time)))
    ports = replace(ports, clock=SimpleNamespace(now=time.time, monotonic=time.monotonic))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(OSError, match="File too large"):
            Supervisor(
                tmp_path,
                ports,
                POLICY,
                Site(folder=str(tmp_path), trainer=()),
                DaemonIdentity(host="h", pid=1, last_liveness=None),
            )
    assert list((tmp_path / "journal").iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_journal_that_cannot_be_read_is_let_go(tmp_path: Path):
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.append(journal.stamp(e.RequestRefused(request="r", author="a", verb="v", why="w"), 0.0))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes().replace(b'"v"', b'"w"', 1))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(JournalError):
        Journal(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_pipe_in_place_of_the_tip_holds_up_no_line(tmp_path: Path):
    journal = write(tmp_path / "journal", "a")
    journal.close()
    (tmp_path / "journal.tip").unlink()
    os.mkfifo(tmp_path / "journal.tip")
    assert texts(tmp_path / "journal") == ["a"]
    write(tmp_path / "journal", "b")
    assert texts(tmp_path / "journal") == ["a", "b"]
