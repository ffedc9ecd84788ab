"""The state by a snapshot is that by the whole journal, to the last bit; any doubt throws the snapshot away."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ops.core.codec import plain
from opt_ops.core.state.fold import fold, replay
from opt_ops.core.state.model import State
from opt_ops.laboratory.simulated import Costs
from opt_ops.runfolder import lineages, snapshot
from opt_ops.runfolder.journal import Journal, JournalError, read
from opt_ops.runfolder.journal_reader import scan
from tests.core.state.test_fold import happenings, tell
from tests.core.story import Story
from tests.laboratory.simulated_lineage import SimulatedLineage, physics, without_sync
from tests.laboratory.test_kill_matrix import RECOVERIES
from tests.runfolder.test_journal import note


def text_of(state: State) -> str:
    """All of a state, floats with every digit, mappings in their order."""
    return json.dumps(plain(state), allow_nan=False)


def write(folder: Path, what: list[tuple[str, int]], at: int, every: int = 17) -> None:
    """The journal of a story, with a new file now and then, and a snapshot of the state at entry `at`."""
    story = Story()
    story.begin()
    for name, number in what:
        tell(story, name, number)
    state, journal = State(), Journal(folder)
    for position, entry in enumerate(story.entries):
        if position % every == every - 1:
            journal.close()
            journal = Journal(folder)
        stamped = journal.stamp(entry.event, entry.ts + 0.1 * position)
        state = fold(state, stamped)
        journal.append(stamped)
        if position == at % len(story.entries):
            journal.save_snapshot(state)
    journal.close()


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sync(monkeypatch)


@settings(max_examples=60, deadline=None)
@given(happenings, st.integers(0, 500))
def test_snapshot_and_rest_give_what_a_whole_replay_gives(
    tmp_path_factory: pytest.TempPathFactory, what: list[tuple[str, int]], at: int
):
    lineage = tmp_path_factory.mktemp("lineage")
    write(lineage / "journal", what, at)
    found = snapshot.load(lineage / "journal")
    assert found is not None
    assert text_of(found[0]) == text_of(replay(e for e in read(lineage / "journal")[0] if e.seq <= found[1].seq))
    whole = replay(read(lineage / "journal")[0])
    assert text_of(lineages.state(lineage)) == text_of(whole)
    assert lineages.state(lineage) == whole
    for seq in (0, found[1].seq - 1, found[1].seq, whole.seq - 1, whole.seq):
        assert [e.seq for e in lineages.entries_after(lineage, seq)] == list(range(seq + 1, whole.seq + 1))


@pytest.fixture
def lineage(tmp_path: Path) -> Path:
    story = [("train", 40), ("checkpoint", 0), ("rank_dies", 3), ("train", 80)] * 3
    write(tmp_path / "1" / "journal", story, at=6, every=3)
    return tmp_path / "1"


def test_a_snapshot_with_any_byte_changed_is_thrown_away(lineage: Path):
    path = snapshot.path_of(lineage / "journal")
    good, whole = path.read_bytes(), text_of(lineages.state(lineage))
    for position in range(0, len(good), 61):
        path.write_bytes(good[:position] + bytes([good[position] ^ 2]) + good[position + 1 :])
        assert text_of(lineages.state(lineage)) == whole
        path.write_bytes(good[:position])
        assert text_of(lineages.state(lineage)) == whole


@pytest.mark.parametrize("content", [b"", b"null\nnull\n", b"[]\n", b"{}\n{}\n", b"\xff\n\n", b"[" * 10_000 + b"\n1\n"])
def test_what_is_no_snapshot_is_thrown_away(lineage: Path, content: bytes):
    snapshot.path_of(lineage / "journal").write_bytes(content)
    assert snapshot.load(lineage / "journal") is None
    assert lineages.state(lineage) == replay(read(lineage / "journal")[0])


def test_a_snapshot_of_other_code_or_a_later_version_is_thrown_away(lineage: Path, monkeypatch: pytest.MonkeyPatch):
    assert snapshot.load(lineage / "journal") is not None
    monkeypatch.setattr(snapshot, "code_version", lambda: "00000000")
    assert snapshot.load(lineage / "journal") is None
    monkeypatch.undo()
    monkeypatch.setattr(snapshot, "VERSION", 0)
    assert snapshot.load(lineage / "journal") is None


def test_a_snapshot_that_others_may_write_is_not_read(lineage: Path):
    snapshot.path_of(lineage / "journal").chmod(0o664)
    assert snapshot.load(lineage / "journal") is None


@pytest.mark.parametrize("change", ["touch", "remove line", "remove file", "replace", "add file", "cut"])
def test_a_snapshot_is_thrown_away_when_the_journal_under_it_has_changed(lineage: Path, change: str):
    first, *_, last = sorted((lineage / "journal").iterdir())
    whole = text_of(lineages.state(lineage))
    covered = snapshot.load(lineage / "journal")
    assert covered is not None
    if change == "touch":
        os.utime(first, ns=(1, 1))
    elif change == "remove line":
        first.write_bytes(b"".join(first.read_bytes().splitlines(keepends=True)[1:]))
    elif change == "remove file":
        first.unlink()
    elif change == "replace":
        copy = first.with_name("copy")
        copy.write_bytes(first.read_bytes())
        copy.replace(first)
    elif change == "add file":
        (lineage / "journal" / "000001.jsonl").rename(lineage / "journal" / "000000.jsonl")
    else:
        path = lineage / "journal" / f"{covered[1].epoch:06d}.jsonl"
        path.write_bytes(path.read_bytes()[: covered[1].offset - 10])
    assert snapshot.load(lineage / "journal") is None
    try:
        assert text_of(lineages.state(lineage)) == whole
    except JournalError:
        assert change in ("remove line", "remove file", "add file", "cut")
    assert last.exists()


def test_a_takeover_that_voids_a_covered_line_is_seen(tmp_path: Path):
    """The older process was stopped between its look at the owner and its write; its line is in the snapshot."""
    folder = tmp_path / "1" / "journal"
    old = Journal(folder)
    old.append(old.stamp(note("a"), 0.0))
    new = Journal(folder)
    old.check_fence = lambda: None  # type: ignore[method-assign]
    late = old.stamp(note("late"), 0.0)
    old.append(late)
    old.save_snapshot(fold(fold(State(), read(folder)[0][0]), late))
    assert snapshot.load(folder) is not None
    new.append(new.stamp(note("b"), 0.0))
    assert [entry.event.text for entry in scan(folder).entries] == ["a", "b"]
    assert lineages.state(tmp_path / "1").requests == {"a", "b"}


def test_a_daemon_leaves_snapshots_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opt_ops.supervise.supervisor.SNAPSHOT_EVENTS", 20)
    lineage = SimulatedLineage(
        tmp_path / "1", RECOVERIES.plan, physics(300, save_every=30, step_seconds=6.0), Costs(queue=10.0)
    )
    lineage.drive(until=4_000.0, tick=10.0, settle=60.0)
    found = snapshot.load(tmp_path / "1" / "journal")
    assert found is not None
    assert lineage.state.seq - found[1].seq < 60
    assert text_of(lineages.state(tmp_path / "1")) == text_of(lineage.state)
    assert lineage.supervisor is not None
    lineage.supervisor.close()
    lineage.open_journals.clear()
    found = snapshot.load(tmp_path / "1" / "journal")
    assert found is not None
    assert found[1].seq == lineage.state.seq
