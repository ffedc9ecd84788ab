"""An evaluation leaves hundreds of requests: nothing waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opt_ops.core.events import CheckpointEvaluated, NoteAdded
from opt_ops.ports import Request
from opt_ops.runfolder.files import read_json
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.supervise.operator_requests import RequestWatch
from opt_ops.supervise.request_arguments import MOST_AT_ONCE
from tests.core.story import Story

RESULT = {"run": "12.00", "step": 100, "digest": "a" * 64, "task": "mmlu", "task_version": "1", "shots": 0}
RESULT |= {"value": 0.5, "stderr": 0.1, "n": 10, "harness": "lm-eval 0.4.13", "file": "x.json", "sha256": "b" * 64}


class Counted(FileInbox):
    """An inbox that counts how often its folder is read."""

    read = 0

    def requests(self) -> Sequence[Request]:
        self.read += 1
        return super().requests()


def test_the_inbox_is_read_once_and_an_operator_goes_before_results(tmp_path: Path):
    inbox = Counted(tmp_path)
    for number in range(150):
        arguments = RESULT | {"metric": f"acc{number}"}
        inbox.put(Request(request=f"evaluated-{number}", author="ann", verb="evaluated", arguments=arguments), number)
    note = {"target": "12", "text": "look here", "correction": False}
    inbox.put(Request(request="note", author="ann", verb="note", arguments=note), 1_000)
    story = Story().training(checkpoints=(100,))
    watch = RequestWatch(inbox, lambda: 1_000.0)

    def tick() -> list[type[object]]:
        kinds: list[type[object]] = []
        for event in watch.observe(lambda: story.state):
            story.write(event)
            kinds.append(type(event))
        return kinds

    first = tick()
    assert inbox.read == 1, "with hundreds of requests, reading it for each one would hold up the watch for minutes"
    assert first[0] is NoteAdded
    assert 0 < first.count(CheckpointEvaluated) < 150, "the rest of a tick goes before the rest of the results"
    while tick():
        pass
    assert len(story.state.scores) == 150
    assert not inbox.requests()


def test_an_operator_who_leaves_hundreds_of_requests_holds_up_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    inbox = FileInbox(tmp_path)
    for number in range(150):
        note = {"target": "12", "text": f"{number}", "correction": False}
        inbox.put(Request(request=f"note-{number}", author="ann", verb="note", arguments=note), number)
    read: list[str] = []

    def counted(path: Path, *_: Any, **__: Any) -> Any:
        read.append(path.name)
        return read_json(path, orders=True)

    monkeypatch.setattr("opt_ops.runfolder.inbox.read_json", counted)
    story, watch = Story().training(), RequestWatch(inbox, lambda: 1_000.0)
    ticks: list[list[str]] = []
    while not ticks or ticks[-1]:
        ticks.append([])
        for event in watch.observe(lambda: story.state):
            story.write(event)
            ticks[-1].append(event.text)
    assert [len(each) for each in ticks] == [MOST_AT_ONCE, 150 - MOST_AT_ONCE, 0]
    assert [text for each in ticks for text in each] == [str(number) for number in range(150)], "the oldest first"
    assert len(read) == 150, "each file was read once"
