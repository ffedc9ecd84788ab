import pytest
import torch

from opt_ops.core.schedule import expected_lr
from opt_ops.core.values import LrFactor
from opt_ops.runfolder.fields import Record
from opt_ops.runfolder.schedule_fields import schedule_of
from trainer import optim, recipes
from trainer.errors import UserError
from trainer.optim_config import OptimConfig, stated

CONFIG = OptimConfig(peak_lr=1.0, warmup_steps=10, total_steps=110, final_fraction=0.1)


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (10_000, 0.1)]
)
def test_warm_up_then_decay_then_constant(step: int, expected: float) -> None:
    assert optim.learning_rate(step, CONFIG) == pytest.approx(expected, rel=1e-12)


def test_the_schedule_is_the_formula_of_the_formats() -> None:
    c = CONFIG
    for step in range(1, c.total_steps + 1):
        decay = 1 - (1 - c.final_fraction) * max(0, step - c.warmup_steps) / (c.total_steps - c.warmup_steps)
        assert optim.learning_rate(step, c) == c.peak_lr * min(step / c.warmup_steps, decay)


def test_factors_touch_the_updates_after_their_step_and_multiply() -> None:
    factors = [(60, 0.5), (20, 0.75)]

    def ratio(step: int) -> float:
        return optim.learning_rate(step, CONFIG, factors) / optim.learning_rate(step, CONFIG)

    assert [ratio(step) for step in (20, 21, 60, 61, 200)] == pytest.approx([1, 0.75, 0.75, 0.375, 0.375])


def test_readback_tells_what_the_optimizer_has_not_what_was_configured() -> None:
    optimizer = optim.build(torch.nn.Linear(2, 2).parameters(), CONFIG)
    assert optim.readback(optimizer) == {"lr": 0.0, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip_norm": 1.0}
    optimizer.param_groups[0] |= {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.0, "clip_norm": 2.5}
    assert optim.readback(optimizer) == {"lr": 0.5, "betas": [0.8, 0.9], "weight_decay": 0.0, "clip_norm": 2.5}


def test_all_parameters_decay_biases_and_norms_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = optim.build(model.parameters(), CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    optim.set_learning_rate(optimizer, 0.5)
    optim.update(optimizer, optim.gradient_factor(optimizer, 0.0, 1.0))
    assert [p.unique().item() for p in model.parameters()] == pytest.approx([0.95] * 4)


@pytest.mark.parametrize(
    ("gnorm", "divisor", "factor"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (0.5, 8.0, 1 / 8), (4.0, 8.0, 1 / 32)]
)
def test_gradients_are_clipped_and_what_they_are_too_large_by_is_taken_out(
    gnorm: float, divisor: float, factor: float
) -> None:
    """Adam hides what is left of a scale, until the scale changes: its moments would mix both."""
    (weight,) = torch.nn.Linear(2, 1, bias=False).parameters()
    optimizer = optim.build([weight], CONFIG)
    weight.grad = torch.tensor([[3.0, -4.0]])
    found = optim.gradient_factor(optimizer, gnorm, divisor)
    assert (found.item(), found.dtype, found.shape) == (factor, torch.float32, ())
    optim.update(optimizer, found)
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([pytest.approx([0.3 * factor, -0.4 * factor])])


OTHERS = ("optim.decay_steps=30", "optim.decay=sqrt", "optim.cycles=1.5", "optim.exponent=2.0")


@pytest.mark.parametrize("kind", ["cosine", "polynomial", "constant", "wsd"])
def test_other_schedules_are_those_of_the_formats_and_config_json_states_them(kind: str) -> None:
    recipe = recipes.build("opt-tiny", ["optim.total_steps=110", f"optim.schedule={kind}", *OTHERS])
    said = stated(recipe.optim)
    assert said["kind"] == kind
    schedule = schedule_of(Record(said))
    for step in (1, 59, 60, 61, 80, 100, 110, 200):
        expected = expected_lr(schedule, [LrFactor(step=70, factor=0.5)], step)
        assert optim.learning_rate(step, recipe.optim, [(70, 0.5)]) == pytest.approx(expected, rel=1e-12)


def test_a_linear_schedule_is_stated_and_digested_as_before_there_were_others() -> None:
    linear = recipes.build("opt-tiny", OTHERS)
    assert stated(linear.optim) == {"peak_lr": 1e-3, "warmup_steps": 60, "total_steps": 600, "final_fraction": 0.1}
    digests = [
        recipes.trajectory_digest(recipes.build("opt-tiny", settings), [], [], "")
        for settings in ([], OTHERS, ["optim.schedule=cosine"], ["optim.schedule=cosine", "optim.cycles=1.5"])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["optim.schedule=exp"], "is not one of linear, cosine, polynomial, constant, wsd"),
        (["optim.schedule=wsd"], "optim.decay_steps must be from 1 to 540"),
        (["optim.schedule=wsd", "optim.decay_steps=541"], "optim.decay_steps must be from 1 to 540"),
        (["optim.exponent=0"], "optim.exponent must be above 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(settings: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        recipes.build("opt-tiny", settings)
