"""The watch over the checkpoint that a fork began from: seen, pinned until it is not needed, told when it is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opt_ops.contract import manifest
from opt_ops.core import events as e
from opt_ops.core.values import Parent
from opt_ops.runfolder.checkpoints import FileCheckpoints
from opt_ops.supervise.watch_checkpoints import CheckpointWatch
from tests.core.story import Story
from tests.e2e.stub_trainer import save


def look(story: Story, store: FileCheckpoints, watch: CheckpointWatch | None = None) -> list[e.Event]:
    """What a watch finds, told to the story; without one, a new daemon process looks."""
    found = list((watch or CheckpointWatch(store)).observe(story.state, lambda _: ""))
    story.see(*found)
    return found


def told(folder: Path) -> tuple[Story, Parent, FileCheckpoints]:
    (folder / "11" / "11.02" / "checkpoints").mkdir(parents=True)
    for step in (100, 200):
        save(folder / "11" / "11.02" / "checkpoints", step, "11.02-a0", {"num_updates": step}, [])
    path = folder / "11" / "11.02" / "checkpoints" / "step-00000100"
    parent = Parent(lineage="11", run="11.02", step=100, checkpoint=str(path))
    story = Story()
    story.daemon()
    asked = {"request": "r0", "author": "ann", "lineage": "12", "recipe": "x", "settings": (), "shape": story.shape}
    story.see(e.LineageStarted(**asked, parent=parent))
    return story, parent, FileCheckpoints(folder / "12")


def test_the_parents_checkpoint_is_seen_alone_and_pinned_until_the_fork_has_its_own(tmp_path: Path):
    story, parent, store = told(tmp_path)
    pin = Path(f"{parent.checkpoint}.pinned")
    assert look(story, store) == [e.CheckpointSeen(checkpoint=parent.saved)]
    assert pin.read_text() == "lineage-12\n"
    story.see(e.CheckpointVerified(checkpoint=parent.saved, healthy=True, why=""))
    watch = CheckpointWatch(store)
    assert look(story, store, watch) == []
    assert pin.read_text() == "lineage-12\n", "asked for once more by the next daemon process, and held once"
    story.hold()
    story.train(180)
    checkpoints = tmp_path / "12" / "12.00" / "checkpoints"
    checkpoints.mkdir(parents=True)
    save(checkpoints, 150, "12.00-a0", {"num_updates": 150}, [])
    own = store.committed("12.00")[0]
    story.see(e.CheckpointSeen(checkpoint=own), e.CheckpointVerified(checkpoint=own, healthy=True, why=""))
    look(story, store, watch)
    assert not pin.exists()
    manifest.remove(Path(parent.checkpoint))
    assert look(story, store, watch) == [e.CheckpointsGone(run="11.02", paths=(parent.checkpoint,))]


def test_a_pin_of_somebody_else_stays(tmp_path: Path):
    (tmp_path / "step-00000100").mkdir()
    path = tmp_path / "step-00000100"
    manifest.pin(path, "lineage-12")
    manifest.pin(path, "lineage-13")
    manifest.unpin(path, "lineage-12")
    assert manifest.pinned(path)
    manifest.unpin(path, "lineage-13")
    assert not manifest.pinned(path)
    manifest.pin(path, "lineage-12")
    manifest.pin(path)  # for good
    manifest.pin(path, "lineage-13")
    manifest.unpin(path, "lineage-12")
    manifest.unpin(path, "lineage-13")
    assert manifest.pinned(path)


def test_a_pipe_in_place_of_a_pin_holds_up_nobody(tmp_path: Path):
    os.mkfifo(tmp_path / "step-00000100.pinned")
    for change in (manifest.pin, manifest.unpin):
        with pytest.raises(OSError, match="not a regular file"):
            change(tmp_path / "step-00000100", "lineage-12")


def test_a_fork_that_was_stopped_needs_it_no_more(tmp_path: Path):
    story, parent, store = told(tmp_path)
    watch = CheckpointWatch(store)
    look(story, store, watch)
    story.see(e.StopRequested(request="r1", author="ann", reason="enough"))
    look(story, store, watch)
    assert not manifest.pinned(Path(parent.checkpoint))
