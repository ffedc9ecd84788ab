"""The checkpoints that the watch over training pins: those to which a rollback would return."""

from __future__ import annotations

from types import SimpleNamespace

from opt_ops.supervise.watch_training import TrainingWatch
from tests.core.story import Story


class Watched:
    """A lineage that trains at step 450 with good checkpoints every 100, and what is pinned in it."""

    def __init__(self) -> None:
        self.story = Story().training()
        self.pinned: list[int] = []
        self.start()

    def start(self) -> None:
        """Start another daemon process with the same journal."""
        trainer = SimpleNamespace(config=lambda _: None, phases=lambda _: (), points=lambda _: ())
        checkpoints = SimpleNamespace(
            committed=lambda _: (), examined=lambda: (), pin=lambda checkpoint: self.pinned.append(checkpoint.step)
        )
        clock = SimpleNamespace(monotonic=lambda: self.story.now, now=lambda: self.story.now)
        self.watch = TrainingWatch(self.story.policy, trainer, checkpoints, clock)

    def look(self) -> list[int]:
        """Return what one call pins."""
        self.pinned.clear()
        list(self.watch.observe(self.story.state))
        return [*self.pinned]


def test_nothing_is_pinned_while_nothing_is_wrong():
    assert Watched().look() == []


def test_the_last_good_one_before_the_onset_is_pinned_once():
    training = Watched()
    training.story.checkpoint(340, healthy=False)
    training.story.spike(450, onset=350)
    assert training.look() == [300], "neither the newest, nor one that is not healthy"
    assert training.look() == []
    training.start()
    assert training.look() == [300], "it may have died between the signal and the pin"


def test_a_checkpoint_of_the_very_step_of_the_onset_is_too_late():
    training = Watched()
    training.story.spike(450, onset=300)
    assert training.look() == [200]


def test_what_has_no_onset_or_nothing_good_before_it_pins_nothing():
    training = Watched()
    training.story.rank_dies(450)
    training.story.spike(450, onset=100)
    assert training.look() == []
