"""An evaluation leaves hundreds of requests: nothing waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opt_ops.core.events import CheckpointEvaluated, NoteAdded
from opt_ops.ports import Request
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.supervise.operator_requests import RequestWatch
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
