"""What `run fork` takes over from its parent: what was in force at the checkpoint, and nothing that came later."""

from __future__ import annotations

import pytest

from opt_ops.cli.run.fork import _arguments
from opt_ops.core import events as e
from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import Checkpoint, LrFactor
from tests.core.story import SCHEDULE, Story


def steered() -> Story:
    """Rolled back from 450 to 300 with a factor, as 12.01; later a setting and a factor from 360 on, as 12.02."""
    story = Story().training(450)
    story.see(e.ChangeRequested(request="r1", author="ann", reason="x", to_step=300, lr_factor=0.5))
    story.ends()
    story.train(360)
    story.checkpoint(360)
    story.see(e.ChangeRequested(request="r2", author="ann", reason="x", lr_factor=0.5, settings=("optim.clip_norm=2",)))
    story.ends()
    assert story.state.run is not None
    assert [(each.step, each.factor) for each in story.state.run.lr_factors] == [(300, 0.5), (360, 0.5)]
    return story


def taken(story: Story, run: str, step: int, *own: str, lr: float | None = None) -> tuple[list[str], list[LrFactor]]:
    origin = Checkpoint(run=run, step=step, path=f"/runs/12/{run}/checkpoints/step-{step:08d}")
    found = _arguments(story.state, "12.02", origin, own, (lr, None), [])
    assert found["parent"] == {"lineage": "12", "run": run, "step": step, "checkpoint": origin.path}
    return found["settings"], [LrFactor(**each) for each in found["lr_factors"]]


@pytest.mark.parametrize(
    ("run", "step", "settings", "factors"),
    [
        ("12.00", 200, [], []),
        ("12.00", 300, [], [(300, 0.5)]),
        ("12.01", 360, ["optim.clip_norm=2"], [(300, 0.5), (360, 0.5)]),
    ],
)
def test_what_was_in_force_at_the_checkpoint(
    run: str, step: int, settings: list[str], factors: list[tuple[int, float]]
):
    found = taken(steered(), run, step)
    assert found == (settings, [LrFactor(step=at, factor=factor) for at, factor in factors])


def test_ones_own_settings_come_last_and_a_learning_rate_becomes_a_factor():
    settings, factors = taken(steered(), "12.00", 300, "optim.clip_norm=0.3", lr=1e-4)
    assert settings == ["optim.clip_norm=0.3"]
    assert expected_lr(SCHEDULE, factors, 301) == pytest.approx(1e-4)
