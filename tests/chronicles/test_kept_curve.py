"""The settled curve, against a plain simulation of taking back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chronicles.kept_curve import attempt_curves, kept_points
from opt_ops.core.detect.point import Point
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.values import Checkpoint


def point(step: int, ts: float = 0.0, finite: bool = True) -> Point:
    return Point(
        step=step,
        ts=ts,
        loss=1.0 if finite else None,
        gnorm=1.0,
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        clip_norm=1.0,
        step_seconds=1.0,
        tokens=0,
        wps=1.0,
        finite=finite,
    )


def attempt(name: str, start: int) -> Attempt:
    checkpoint = Checkpoint(run="1.00", step=start, path="/c") if start else None
    return Attempt(
        name=name,
        run="1.00",
        nodes=("n1",),
        ranks_per_node=1,
        checkpoint=checkpoint,
        incident=None,
        intended_at=0.0,
    )


def parts_of(history: list[tuple[int, int]]):
    """From (start, number of steps made) of each attempt."""
    names = [f"1.00-a{number}" for number in range(len(history))]
    attempts = {name: attempt(name, start) for name, (start, _) in zip(names, history, strict=True)}
    points = {
        name: [point(step) for step in range(start + 1, start + made + 1)]
        for name, (start, made) in zip(names, history, strict=True)
    }
    return attempt_curves(attempts, points)


histories = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=8)


@given(histories)
def test_the_settled_curve_is_what_taking_back_leaves(history: list[tuple[int, int]]):
    kept: list[tuple[str, int]] = []
    taken: dict[tuple[str, int], str] = {}
    for number, (start, made) in enumerate(history):
        name = f"1.00-a{number}"
        for each in [each for each in kept if each[1] > start]:
            kept.remove(each)
            taken[each] = name
        kept += [(name, step) for step in range(start + 1, start + made + 1)]

    parts = parts_of(history)

    assert [(part.attempt, p.step) for part, p in kept_points(parts)] == kept
    assert {
        (part.attempt, p.step): part.discarded_by(p.step) for part in parts for p in part.points if not part.is_kept(p)
    } == taken


@given(histories)
def test_settled_steps_rise(history: list[tuple[int, int]]):
    steps = [p.step for _, p in kept_points(parts_of(history))]
    assert steps == sorted(set(steps))


def test_an_update_that_was_not_applied_does_not_count():
    attempts = {"1.00-a0": attempt("1.00-a0", 0)}
    parts = attempt_curves(attempts, {"1.00-a0": [point(1), point(2), point(3, finite=False)]})
    assert [p.step for _, p in kept_points(parts)] == [1, 2]
    assert parts[0].discarded_by(3) is None, "it is not taken back either"


def test_a_trainer_that_began_earlier_than_asked_has_taken_more_back():
    attempts = {"1.00-a0": attempt("1.00-a0", 0), "1.00-a1": attempt("1.00-a1", 50)}
    points = {"1.00-a0": [point(step) for step in range(1, 61)], "1.00-a1": [point(41), point(42)]}
    assert [p.step for _, p in kept_points(attempt_curves(attempts, points))] == [*range(1, 41), 41, 42]
