"""`opt-ops doctor --repair`: from the last good line, with what was cut said and kept, above every epoch seen."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from opt_ops.cli import app
from opt_ops.core import events as e
from opt_ops.errors import Refused
from opt_ops.runfolder import lineages, snapshot
from opt_ops.runfolder.journal import Journal, JournalError, read
from opt_ops.runfolder.owner import OwnerWatch
from opt_ops.runfolder.repair import find, repair
from tests.runfolder.test_journal_gaps import written


def damaged(folder: Path, number: int, line: int) -> None:
    path = folder / f"{number:06d}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"ann", b"bob")
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(("number", "line", "good", "lost"), [(2, 2, 5, 6), (1, 1, 0, 11), (3, 1, 7, 4), (3, 3, 9, 2)])
def test_a_lineage_goes_on_from_the_last_good_line(tmp_path: Path, number: int, line: int, good: int, lost: int):
    lineage = tmp_path / "12"
    folder = written(lineage / "journal", 4, 3, 4)
    before = read(folder)[0]
    damaged(folder, number, line)
    damage = find(lineage)
    assert damage is not None
    assert (damage.good.seq, damage.lines) == (good, lost)
    assert f"00000{number}.jsonl, line {line}: fails its checksum" in damage.why
    aside = repair(lineage, damage, "ann")
    entries, notes = read(folder)
    assert entries[:-1] == before[:good]
    assert (entries[-1].epoch, entries[-1].seq, notes) == (4, good + 1, [])
    assert isinstance(entries[-1].event, e.NoteAdded)
    assert f"line {line}: fails its checksum" in entries[-1].event.text
    assert f"{lost} lines" in entries[-1].event.text
    kept = sum(len(path.read_bytes().splitlines()) for path in aside.iterdir())
    assert kept >= lost
    assert find(lineage) is None
    assert lineages.state(lineage).seq == good + 1


def test_missing_files_and_a_missing_end_are_repaired(tmp_path: Path):
    folder = written(tmp_path / "12" / "journal", 4, 3, 4)
    (folder / "000003.jsonl").unlink()
    damage = find(tmp_path / "12")
    assert damage is not None
    assert "000003.jsonl is missing" in damage.why
    repair(tmp_path / "12", damage, "ann")
    assert [entry.seq for entry in read(folder)[0]] == [*range(1, 8), 8]


def test_an_event_that_cannot_follow_is_found_with_its_line(tmp_path: Path):
    folder = tmp_path / "12" / "journal"
    journal = Journal(folder)
    for event in (e.DrillDone(drill="none"), e.NoteAdded(request="r", author="a", target="12", text="t")):
        journal.append(journal.stamp(event, 0.0))
    journal.close()
    with pytest.raises(JournalError, match=r"000001\.jsonl, line 1: drill_done names"):
        lineages.state(tmp_path / "12")
    damage = find(tmp_path / "12")
    assert damage is not None
    assert (damage.good.seq, damage.lines) == (0, 2)
    repair(tmp_path / "12", damage, "ann")
    assert lineages.state(tmp_path / "12").seq == 1


def test_the_new_epoch_is_above_all_that_agents_have_seen(tmp_path: Path):
    folder = written(tmp_path / "12" / "journal", 2, 2)
    damaged(folder, 2, 1)
    (tmp_path / "12" / "health").mkdir()
    beat = {"ts": 1.0, "node": "n1", "host": "n1", "nvml": "ok", "orders": [41, 3], "gpus": [], "xids": []}
    (tmp_path / "12" / "health" / "n1.jsonl").write_text(json.dumps(beat) + "\n")
    damage = find(tmp_path / "12")
    assert damage is not None
    assert damage.epoch == 42
    watch = OwnerWatch(folder, 0.0)
    repair(tmp_path / "12", damage, "ann")
    assert read(folder)[0][-1].epoch == 42
    assert watch.changed(), "a daemon that gave the lineage up looks again"


def test_what_a_newer_version_wrote_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written(tmp_path / "12" / "journal", 2)
    monkeypatch.setattr("opt_ops.runfolder.journal_reader.VERSION", 0)
    with pytest.raises(Refused, match="version 1"):
        find(tmp_path / "12")
    assert (folder / "000001.jsonl").read_bytes().count(b"\n") == 2


def test_a_person_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "runs" / "12" / "journal", 4)
    written(tmp_path / "runs" / "13" / "journal", 1)
    damaged(folder, 1, 2)
    refused = CliRunner().invoke(app, ["doctor", "--repair", "12"])
    assert isinstance(refused.exception, Refused)
    assert "line 2: fails its checksum" in refused.stdout
    with pytest.raises(JournalError):
        read(folder)
    done = CliRunner().invoke(app, ["doctor", "--repair", "--yes"])
    assert done.exit_code == 0, done.output
    assert "continued after seq 1" in done.stdout
    assert len(read(folder)[0]) == 2
    assert not snapshot.path_of(folder).exists()
