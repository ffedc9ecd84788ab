"""The benchmark of cures: what it draws, what it counts, and that its trainer breaks what it says."""

import json
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from benchmarks import cures, cures_report, cures_trainer
from benchmarks.cures_draws import Draw, draws
from benchmarks.cures_site import Ran
from opt_ops.core.failures.causes import Cause
from trainer import optim
from trainer.checkpoint import Checkpointer
from trainer.data.samples import Mixture, Samples
from trainer.parallel.engine import Engine
from trainer.recipes import OptimConfig
from trainer.step import step as steps_of_a_step
from trainer.step.step import Steps
from trainer.telemetry import Telemetry

TOUCHED = (
    (Mixture, "batch"),
    (Steps, "take"),
    (Engine, "update"),
    (Checkpointer, "load"),
    (Telemetry, "record"),
    (optim, "learning_rate"),
    (steps_of_a_step, "forward_backward"),
)


@pytest.fixture
def injected(tmp_path, monkeypatch):
    """Breaks the trainer as orders say; undone after the test."""
    monkeypatch.setattr(sys, "argv", ["x", "--attempt", "1.00-a0", "--checkpoint-dir", str(tmp_path / "1/1.00/c")])
    for owner, name in TOUCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    path = tmp_path / "inject.json"

    def inject(orders):
        path.write_text(json.dumps(orders))
        cures_trainer.inject(path)

    return inject


@pytest.mark.parametrize("seed", [1, 2, 777])
def test_eight_cases_have_six_causes_and_the_same_seed_draws_the_same(seed):
    for count in (8, 9, 20):
        chosen = draws(seed, count)
        assert len(chosen) == count == len({draw.id for draw in chosen})
        assert len({draw.injected for draw in chosen}) >= 6
        assert chosen == draws(seed, count)
        assert chosen[:8] == draws(seed, 8)
    assert set(Counter(draw.injected for draw in draws(seed, 20)).values()) == {2}, "all ten causes, twice"


def test_another_seed_draws_others():
    assert [draw.inject for draw in draws(1, 10)] != [draw.inject for draw in draws(2, 10)]


def test_the_list_trains_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cures", "--seed", "777", "--count", "8", "--list", "-o", "json"])
    assert cures.main() == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "opt-ops/cures/1"
    assert printed["seed"] == 777
    assert [set(each) for each in printed["cases"]] == [{"id", "injected"}] * 8
    assert {each["injected"] for each in printed["cases"]} <= set(Cause)


@pytest.mark.parametrize("draw", draws(1, 20), ids=lambda draw: draw.id)
def test_what_is_drawn_can_be_injected(draw, injected):
    before = [getattr(owner, name) for owner, name in TOUCHED]
    injected(dict(draw.inject))
    assert [getattr(owner, name) for owner, name in TOUCHED] != before


def ran(
    losses: dict[int, float], *incidents: dict[str, Any], lines: int | None = None, status: str = "COMPLETED"
) -> Ran:
    by_step = {step: (loss, 1024 * step) for step, loss in losses.items()}
    return Ran(status=status, losses=by_step, lines=lines or len(losses), incidents=list(incidents))


def incident(kind: str = "loss_spike", **fields: Any) -> dict[str, Any]:
    known = {"kind": kind, "acted": True, "action": "rollback", "remedy": None, "lr_factor": None, "skip_batches": 0}
    return {**known, "settings": [], "causes": [], **fields}


def draw(cause: Cause) -> Draw:
    return Draw(id="1-00-x", injected=cause, seed=1)


def flat(loss: float, steps: int = 100) -> dict[int, float]:
    return dict.fromkeys(range(1, steps + 1), loss)


def test_a_case_that_one_remedy_cured():
    found = incident(skip_batches=60, causes=["bad_data", "lr_too_high"])
    case = cures_report.case(draw(Cause.BAD_DATA), ran(flat(3.01), found, lines=140), ran(flat(3.0)))
    assert case["named"] == "bad_data"
    assert case["remedies"] == ["rollback+skip"]
    assert case["cured"]
    assert case["cured_by_first"]
    assert (case["loss"], case["twin_loss"], case["tokens"], case["twin_tokens"]) == (3.01, 3.0, 102400, 102400)
    assert (case["steps"], case["repeated_steps"], case["twin_actions"]) == (100, 40, 0)


def test_a_second_remedy_or_a_distance_is_no_first_cure():
    twice = ran(flat(3.0), incident(lr_factor=0.75), incident(lr_factor=0.67))
    case = cures_report.case(draw(Cause.LR_TOO_HIGH), twice, ran(flat(3.0)))
    assert case["cured"]
    assert not case["cured_by_first"]
    assert case["remedies"] == ["rollback+lr", "rollback+lr"]
    far = cures_report.case(draw(Cause.LR_TOO_HIGH), ran(flat(3.03), incident()), ran(flat(3.0)))
    assert not far["cured"]
    assert not far["cured_by_first"]
    halted = cures_report.case(draw(Cause.LR_TOO_HIGH), ran(flat(3.0), incident(), status="HALTED"), ran(flat(3.0)))
    assert not halted["cured"]


def test_what_heals_is_cured_by_doing_nothing():
    told = incident(acted=False, action="tell", causes=["none"])
    assert cures_report.case(draw(Cause.NONE), ran(flat(3.0), told), ran(flat(3.0)))["cured_by_first"]
    assert cures_report.case(draw(Cause.NONE), ran(flat(3.0)), ran(flat(3.0)))["named"] == "none"
    acted = cures_report.case(draw(Cause.NONE), ran(flat(3.0), incident()), ran(flat(3.0)))
    assert (acted["cured"], acted["cured_by_first"]) == (True, False), "done in vain"
    nothing = cures_report.case(draw(Cause.BAD_DATA), ran(flat(3.0)), ran(flat(3.0)))
    assert (nothing["cured"], nothing["cured_by_first"]) == (True, False), "nothing was done where something was due"


def test_the_twin_is_compared_at_the_same_tokens():
    twin = ran({step: 4.0 - step / 100 for step in range(1, 201)}, incident(kind="loss_spike"))
    case = cures_report.case(draw(Cause.BAD_DATA), ran(flat(3.25)), twin)
    assert case["twin_tokens"] == case["tokens"] == 102400
    assert case["twin_loss"] == pytest.approx(4.0 - 0.755, abs=1e-4)
    assert case["twin_actions"] == 1


def test_an_ordinary_death_is_no_remedy():
    died = incident(kind="process_death", action="restart")
    case = cures_report.case(
        draw(Cause.BAD_RESTORE), ran(flat(3.0), died, incident(kind="bad_restore")), ran(flat(3.0))
    )
    assert case["remedies"] == ["rollback"]
    assert case["named"] == "bad_restore"
    assert case["cured_by_first"]


def test_totals():
    one = cures_report.case(draw(Cause.NONE), ran(flat(3.0)), ran(flat(3.0)))
    two = cures_report.case(draw(Cause.BAD_DATA), ran(flat(3.1), incident(), lines=150), ran(flat(3.0)))
    assert cures_report.totals([one, two]) == {
        "cases": 2,
        "named": 1,
        "cured_by_first": 1,
        "cured": 1,
        "median_gap": 0.05,
        "repeated_share": 0.2,
        "probe_share": 0.0,
    }


def test_the_rate_by_cause_and_the_spread_of_twins():
    none = cures_report.case(draw(Cause.NONE), ran(flat(3.0)), ran(flat(3.0)))
    bad = cures_report.case(draw(Cause.BAD_DATA), ran(flat(3.1), incident()), ran(flat(3.0)))
    assert cures_report.by_cause([none, bad]) == {
        "none": {"cases": 1, "named": 1, "cured_by_first": 1, "cured": 1},
        "bad_data": {"cases": 1, "named": 0, "cured_by_first": 0, "cured": 0},
    }
    twins = {"a": ran(flat(3.0)), "b": ran(flat(3.004))}
    assert cures_report.spread(twins) == {"losses": [3.0, 3.004], "spread": 0.004}
    assert "| bad_data | 1 | 0 | 0 | 0 |" in cures_report.table(
        {"cases": [none, bad], "by_cause": cures_report.by_cause([none, bad])}
    )


def test_garbage_is_there_for_those_samples_each_time(injected):
    mixture = Mixture([Samples(np.arange(10_000) % 50, 8, 1)], [1])
    clean = [t.clone() for t in mixture.batch(16, 32)]
    injected({"what": "garbage", "first": 20, "last": 22, "salt": 3})
    inputs, targets = mixture.batch(16, 32)
    changed = [row for row in range(32) if not (inputs[row] == clean[0][row]).all()]
    assert changed == [4, 5, 6], "samples 20 to 22"
    assert (inputs == mixture.batch(16, 32)[0]).all()
    assert (inputs[5, 1:] == targets[5, :-1]).all()


def test_a_wrong_rate_is_that_of_one_attempt(injected, monkeypatch):
    config = OptimConfig(peak_lr=1e-3, warmup_steps=10, total_steps=100)
    planned = [optim.learning_rate(step, config) for step in range(40, 60)]
    injected({"what": "rate", "step": 50, "factor": 4.0, "stuck": False})
    wrong = [optim.learning_rate(step, config) for step in range(40, 60)]
    assert wrong[:10] == planned[:10]
    assert wrong[10:] == [4 * lr for lr in planned[10:]]
    monkeypatch.undo()
    assert optim.learning_rate(55, config) == planned[15]


def test_a_wrong_rate_does_not_come_back(injected, tmp_path):
    config = OptimConfig(peak_lr=1e-3, warmup_steps=10, total_steps=100)
    planned = optim.learning_rate(55, config)
    (tmp_path / "inject.done").write_text('{"attempt": "1.00-a7"}')
    injected({"what": "rate", "step": 50, "factor": 4.0, "stuck": False})
    assert optim.learning_rate(55, config) == planned


def test_fp16_overflows_until_the_scale_is_low(injected, monkeypatch):
    import torch

    class FakeEngine:
        grads = (torch.ones(3),)

        def gradients(self):
            return self.grads

    class FakeProgress:
        step = 9

    monkeypatch.setattr(steps_of_a_step, "forward_backward", lambda *_: "shares")
    injected({"what": "overflow", "step": 10, "bearable": 0.5})
    for scale, finite in ((None, True), (0.25, True), (1.0, False)):
        engine = FakeEngine()
        assert steps_of_a_step.forward_backward(engine, None, None, FakeProgress(), scale) == "shares"
        assert bool(torch.isfinite(engine.gradients()[0]).all()) is finite
