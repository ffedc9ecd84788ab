import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.harness import SMALL, Ranks, engine_of
from tests.trainer.test_parallel import build, samples
from trainer import recipes
from trainer.hashing import MASK, key, mix, mix32_, mix_
from trainer.kernels.dropout_add_layer_norm import keep_mask, reference
from trainer.model.dropout import DropoutClock
from trainer.model.opt import OPT
from trainer.step.measured import Progress
from trainer.step.step import forward_backward

CPU = torch.device("cpu")


def mask(p: float = 0.1, site: int = 0, shape: tuple[int, int, int] = (16, 64, 96), **clock: int) -> torch.Tensor:
    return keep_mask(torch.Size(shape), p, site, DropoutClock(**({"seed": 1, "step": 1} | clock)).now(CPU))


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=50))
def test_tensors_and_integers_are_mixed_alike(words: list[int]) -> None:
    mixed = [mix(word) for word in words]
    assert mix_(torch.tensor(words)).tolist() == mixed
    assert [word & MASK for word in mix32_(torch.tensor(words).to(torch.int32)).tolist()] == mixed


def test_masks_have_the_bits_they_always_had() -> None:
    # Golden values from when masks were hashed in int64; the place is beyond 32 bits.
    now = torch.tensor([key(7, 1000), 2**40 + 2**32 - 2, 2**31 - 2])
    weights = torch.tensor([key(i) for i in range(3 * 5 * 257)]).view(3, 5, 257)
    sums = [(keep_mask(torch.Size((3, 5, 257)), p, 95, now) * weights).sum().item() for p in (0.1, 0.5, 0.73)]
    assert sums == [7580679359984, 4338676751219, 2357822156109]


def test_mixing_gives_the_bits_it_always_gave() -> None:
    # Golden values: another function would change the order of data and every mask of runs that are under way.
    assert [mix(word) for word in (0, 1, 2, MASK)] == [0, 0x86D2FA73, 0x0DA7F4E7, 0x99B5E683]
    assert key(1, 2, 3) == 0x127DF55E


@given(
    batch=st.tuples(st.integers(0, 4), st.integers(1, 4)),
    sequence=st.tuples(st.integers(0, 12), st.integers(1, 12)),
    step=st.integers(1, 10**6),
    sample=st.integers(0, 2**40),
)
def test_the_mask_of_a_shard_is_the_slice_of_the_whole(
    batch: tuple[int, int], sequence: tuple[int, int], step: int, sample: int
) -> None:
    (b, height), (t, length) = batch, sequence
    whole = mask(0.5, shape=(8, 24, 16), step=step, first_sample=sample)
    shard = mask(0.5, shape=(height, length, 16), step=step, first_sample=sample + b, first_position=t)
    assert torch.equal(shard, whole[b : b + height, t : t + length])


def test_the_share_dropped_is_p_in_every_direction() -> None:
    for p in (0.1, 0.5):
        dropped = 1 - mask(p).double()
        for dims in ((0, 1), (0, 2), (1, 2)):
            count = dropped.numel() / dropped.mean(dims).numel()
            deviations = (dropped.mean(dims) - p) / (p * (1 - p) / count) ** 0.5
            assert deviations.abs().max() < 4.5
            assert 0.6 < deviations.std() < 1.4, "as even or as uneven as no independent draws are"


def test_masks_of_neighbours_are_independent() -> None:
    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()

    first = mask(0.5)
    others = {
        "step": mask(0.5, step=2),
        "seed": mask(0.5, seed=2),
        "site": mask(0.5, site=1),
        "channel": first.roll(1, 2),
        "position": first.roll(1, 1),
        "sample": first.roll(1, 0),
    }
    limit = 4.5 / first.numel() ** 0.5
    assert {name: c for name, other in others.items() if abs(c := correlation(first, other)) > limit} == {}


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    """``x`` after dropout."""
    ones, site = torch.ones(x.shape[-1]), torch.tensor(3)
    now = DropoutClock(seed=1, step=1).now(CPU)
    return reference(x, torch.zeros_like(x), ones.to(x.dtype), ones.to(x.dtype), now, site, p)[0]


def test_the_mean_is_kept_and_gradients_pass_where_values_do() -> None:
    x = torch.ones(16, 64, 96, requires_grad=True)
    y = dropped(x, 0.2)
    assert abs(y.mean().item() - 1) < 0.01
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled_alike_in_every_precision(dtype: torch.dtype) -> None:
    # Not ones: 1.109375 is the bf16 nearest to 1/0.9, so ones would not show a factor that was rounded to bf16.
    x = (1 + torch.rand(8, 640, 128, generator=torch.Generator().manual_seed(1))).to(dtype)
    y = dropped(x, 0.1).double()
    kept = x.double()[y != 0]
    assert abs(y.sum() / kept.sum() * 0.9 - 1) < 2e-4


def test_without_dropout_nothing_is_touched() -> None:
    x = torch.randn(1, 2, 3)
    assert torch.equal(dropped(x, 0.0), x)


ATTENTION = ("model.attention_dropout=0.5", "model.dropout=0")


def gradients(*changes: str) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the second batch, on one rank that ran nothing before it."""
    recipe = build(1, 1, *changes)
    engine, progress = engine_of(recipe), Progress(step=1, data_position=recipe.data.global_batch)
    shares = forward_backward(engine, samples(recipe), recipe, progress)
    return shares.loss.item(), [gradient.clone() for gradient in engine.gradients()]


def test_attention_dropout_depends_on_the_step_and_not_on_what_was_drawn_before(ranks: Ranks) -> None:
    plain, *first = (ranks(1, gradients, *changes)[0] for changes in ((), ATTENTION, ATTENTION))
    assert first[0][0] == first[1][0], "so a resumed run draws the masks that it would have drawn"
    assert all(torch.equal(one, other) for one, other in zip(first[0][1], first[1][1], strict=True))
    assert first[0][0] != plain[0]


def test_layers_that_are_computed_again_have_the_same_attention_dropout(ranks: Ranks) -> None:
    whole, again = (ranks(1, gradients, *ATTENTION, *more)[0] for more in ((), ("checkpoint_activations=true",)))
    assert again[0] == whole[0]
    for one, other in zip(again[1], whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_without_training_there_is_no_attention_dropout() -> None:
    recipe = recipes.build("opt-tiny", [*SMALL, *ATTENTION])
    model, tokens = OPT(recipe.model, seed=1), torch.arange(4, 20)[None]
    trained, evaluated = model(tokens)[0], model.eval()(tokens)[0]
    plain = OPT(recipes.build("opt-tiny", [*SMALL, "model.dropout=0"]).model, seed=1)(tokens)[0]
    assert torch.equal(evaluated, plain)
    assert not torch.equal(trained, plain)
