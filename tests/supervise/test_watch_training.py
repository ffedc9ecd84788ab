"""The watch over training: what each daemon process pins."""

from types import SimpleNamespace

from opt_ops.core.values import Outcome
from opt_ops.supervise.watch_training import TrainingWatch
from tests.core.story import POLICY, Story


def pinned_by_a_new_process(story: Story) -> list[int]:
    pinned: list[int] = []
    store = SimpleNamespace(pin=lambda checkpoint: pinned.append(checkpoint.step))
    clock = SimpleNamespace(now=lambda: story.now, monotonic=lambda: story.now)
    TrainingWatch(POLICY, SimpleNamespace(), store, clock)._pin(story.state)
    return pinned


def test_a_new_process_pins_for_recent_signals_and_not_for_old_ones():
    story = Story().training(450)
    story.spike(450, 390)
    assert pinned_by_a_new_process(story) == [300], "the last good one before the onset"
    for step in (460, 470):
        story.ends(last_step=step)
        story.train(step)
        story.rank_dies(step)
    story.ends(Outcome.FAILED, 470)
    assert len(story.state.attempts) > 2
    assert pinned_by_a_new_process(story) == []
