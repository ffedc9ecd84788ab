"""The benchmark of leads: what it draws, what its faults do to the optimizer, and how it counts."""

import pytest
import torch

from benchmarks import leads
from opt_ops.core.detect.point import Point


def test_a_seed_draws_the_same_cases_of_every_kind() -> None:
    cases = leads.draw(3, 8, 2)
    assert [case.kind for case in cases] == [*leads.KINDS, *leads.KINDS, "healthy", "healthy"]
    assert cases == leads.draw(3, 8, 2)
    assert cases != leads.draw(4, 8, 2)
    assert len({case.seed for case in cases}) == 10


@pytest.mark.parametrize("case", leads.draw(1, 4, 1), ids=lambda case: case.kind)
def test_each_fault_leaves_what_is_usual_when_it_begins(case: leads.Case) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], eps=leads.EPSILON)

    def used(step: int) -> tuple[float, float]:
        case.disturb(optimizer, step)
        return case.lr_at(step), optimizer.param_groups[0]["eps"]

    before, begun, later = used(case.begins - 1), used(case.begins), used(case.begins + 200)
    if case.kind == "healthy":
        assert later[0] == case.lr
    elif case.kind == "epsilon":
        assert before[1] == begun[1] == leads.EPSILON
        assert later[1] < leads.EPSILON / 1000
        assert later[0] == before[0]
    else:
        assert later[0] > 50 * before[0]
        assert later[1] == leads.EPSILON
    assert ("optim.betas=0.9,0.9999" in case.settings()) == (case.kind == "beta2")


def row(kind: str, loss: int | None, first: int | None, lead: int | None, false: int = 0) -> dict[str, object]:
    each = {"first": first, "lead": lead, "false": false, "healthy_steps": 300}
    return {"kind": kind, "loss": loss, **dict.fromkeys(leads.MONITORS, each)}


def test_a_monitor_that_finds_nothing_ranks_last_and_a_loss_without_a_finding_does_not_count() -> None:
    rows = [row("lr", 500, 400, 100), row("lr", 500, 520, -20), row("lr", 500, None, None), row("lr", 500, 450, 50)]
    rows += [row("lr", None, 450, None), row("healthy", None, None, None, false=2)]
    told = leads.totals(rows)["update_norm"]
    assert (told["cases"], told["led"]) == (4, 2)
    assert told["lead_quartiles"] == [-20, 50, 100]
    assert (told["false_alerts"], told["healthy_steps"]) == (2, 1800)


def test_findings_before_the_fault_are_false(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finds:
        def observe(self, point: Point) -> list[Point]:
            return [point] if point.step in (100, 420) else []

    monkeypatch.setattr(leads, "MONITORS", {"update_norm": Finds})
    (case,) = leads.draw(1, 1, 0)
    points = [
        Point(
            step=step,
            ts=0.0,
            loss=2.0 if step < 450 else None,
            gnorm=1.0,
            lr=1e-3,
            betas=(),
            weight_decay=0.0,
            clip_norm=1.0,
            step_seconds=1.0,
            tokens=0,
            wps=1.0,
            finite=step < 450,
        )
        for step in range(1, 451)
    ]
    found = leads.judge(case, points)
    assert found["loss"] == 450
    assert found["update_norm"] == {"first": 420, "lead": 30, "false": 1, "healthy_steps": case.begins - 1}
