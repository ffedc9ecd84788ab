"""A note while no daemon watches."""

import fcntl
import json
import time
from pathlib import Path

from opt_ops.core import events as e
from opt_ops.runfolder import lineages
from opt_ops.runfolder.files import write_json
from tests.commands import opt_ops
from tests.core.story import Story


def notes(folder: Path) -> list[str]:
    events = [entry.event for entry in lineages.entries(folder / "runs" / "12")]
    return [event.text for event in events if isinstance(event, e.NoteAdded)]


def test_the_command_writes_it_itself(tmp_path: Path):
    Story().training(100).save(tmp_path / "runs" / "12")
    for text in ("the switch is new", "it was the switch"):
        done = opt_ops(tmp_path, "note", text, "-o", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["items"][0]["status"] == "journaled"
        assert "The note is in the journal; nobody watches: no daemon has ever run for" in done.stderr
        assert "next: opt-ops daemon ensure" in done.stderr
    assert notes(tmp_path) == ["the switch is new", "it was the switch"]
    assert not list((tmp_path / "runs/12").glob("inbox/*.json"))


def test_it_waits_where_somebody_holds_the_lock(tmp_path: Path):
    Story().training(100).save(tmp_path / "runs" / "12")
    with (tmp_path / "runs" / "daemon.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = opt_ops(tmp_path, "note", "the switch is new")
    assert (done.returncode, done.stdout) == (75, "")
    assert f"the note waits in {tmp_path}/runs/12/inbox for a daemon" in done.stderr
    assert notes(tmp_path) == []
    assert len(list((tmp_path / "runs/12/inbox").glob("*.json"))) == 1


def test_it_waits_where_a_daemon_of_another_host_was_heard_of_late(tmp_path: Path):
    """An NFS client may show the daemon's file late, so 40 seconds of silence prove nothing."""
    Story().training(100).save(tmp_path / "runs" / "12")
    sign = {"ts": time.time() - 40.0, "host": "head", "pid": 1, "version": "0", "policy": "p", "lineages": ["12"]}
    write_json(tmp_path / "runs" / "daemon.json", sign)
    assert opt_ops(tmp_path, "note", "the switch is new").returncode == 75
    assert notes(tmp_path) == []


def test_a_note_that_need_not_be_waited_for_is_queued(tmp_path: Path):
    Story().training(100).save(tmp_path / "runs" / "12")
    assert opt_ops(tmp_path, "note", "the switch is new", "--no-wait").returncode == 0
    assert notes(tmp_path) == []
