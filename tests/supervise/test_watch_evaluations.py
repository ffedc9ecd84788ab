"""The end of an evaluation as the daemon sees it, and the checkpoint that is kept meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from opt_ops.core import events as e
from opt_ops.core.health import EvaluationReport
from opt_ops.core.values import Checkpoint, EvaluationEnd
from opt_ops.supervise.watch_evaluations import EvaluationWatch
from tests.core.decide.test_evaluation import policy
from tests.core.story import Story


@dataclass
class World:
    """What a node reports, what ended beside the daemon, and which checkpoints are kept."""

    reported: dict[str, EvaluationReport] = field(default_factory=dict[str, EvaluationReport])
    codes: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    kept: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])
    gone: bool = False

    def evaluation(self, node: str) -> EvaluationReport | None:
        return self.reported.get(node)

    def ended(self) -> list[tuple[str, int]]:
        codes, self.codes = self.codes, []
        return codes

    def written(self, _: Checkpoint) -> int:
        return int(not self.gone)

    def pin(self, checkpoint: Checkpoint, holder: str) -> None:
        self.kept.add((checkpoint.step, holder))

    def unpin(self, checkpoint: Checkpoint, holder: str) -> None:
        self.kept.discard((checkpoint.step, holder))


def watch(world: Any) -> EvaluationWatch:
    return EvaluationWatch(world, world, world)


def story(on_spares: bool) -> Story:
    told = Story(policy(on_spares=on_spares)).training(checkpoints=(100,))
    told.checkpoint(200)
    assert told.state.evaluation is not None
    return told


def report(world: World, on_spares: bool, name: str, code: int | None) -> None:
    if on_spares:
        world.reported["n3"] = EvaluationReport(name=name, code=code)
    elif code is not None:
        world.codes.append((name, code))


@pytest.mark.parametrize("on_spares", [True, False])
@pytest.mark.parametrize(
    ("code", "end", "said"),
    [
        (0, EvaluationEnd.DONE, ""),
        (
            65,
            EvaluationEnd.FAILED,
            "exit code 65, the checkpoint is damaged; its output is in evaluations/12-ev001.log",
        ),
        (
            126,
            EvaluationEnd.FAILED,
            "exit code 126, it could not be started, and the log of the daemon or of the node says why",
        ),
        (137, EvaluationEnd.FAILED, "exit code 137; its output is in evaluations/12-ev001.log"),
    ],
)
def test_the_code_says_how_it_ended(on_spares: bool, code: int, end: EvaluationEnd, said: str):
    told, world = story(on_spares), World()
    watcher = watch(world)
    report(world, on_spares, "12-ev001", None)
    assert list(watcher.observe(told.state)) == []
    report(world, on_spares, "12-ev000", code)
    assert list(watcher.observe(told.state)) == [], "of another one"
    report(world, on_spares, "12-ev001", code)
    assert list(watcher.observe(told.state)) == [e.EvaluationEnded(evaluation="12-ev001", end=end, why=said)]


def test_one_that_did_not_find_its_checkpoint_has_not_failed():
    told, world = story(on_spares=True), World(gone=True)
    report(world, True, "12-ev001", 3)
    gone, ended = watch(world).observe(told.state)
    assert gone == e.CheckpointsGone(run="12.00", paths=(told.state.evaluation.intended.checkpoint.path,))
    assert ended.end is EvaluationEnd.GIVEN_UP
    assert [e.kind_of(each) for each in told.see(gone, ended)] == [], "there is nothing left to evaluate"


def test_its_checkpoint_is_kept_while_it_runs_whichever_daemon_began_it():
    told, world = story(on_spares=True), World()
    list(watch(world).observe(told.state))
    assert world.kept == {(200, "12-ev001")}
    told.see(e.EvaluationEnded(evaluation="12-ev001", end=EvaluationEnd.DONE))
    told.checkpoint(400)
    watcher = watch(world)  # of the next daemon process
    list(watcher.observe(told.state))
    assert world.kept == {(400, "12-ev002")}
    report(world, True, "12-ev002", 0)
    list(watcher.observe(told.state))
    assert world.kept == set(), "a lineage that is finished by this end is not looked at again"
