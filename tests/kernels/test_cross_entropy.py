"""The loss over a vocabulary, alone and shared by ranks, against PyTorch's own in float64."""

import math
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import bits, error, guarded, interpreted, last_program, same_in_any_order, sparse
from trainer.kernels.cross_entropy import compilations, fused, reference, supported

SEED = 7
# tokens, columns, vocab_size, first. The block of the kernels is at most 8,192 columns wide.
SHAPES = [
    (3, 300, 257, 0),
    (1, 1, 1, 0),
    (2, 128, 128, 0),
    (2, 8195, 8193, 0),
    (2, 16_500, 8192, 0),  # a block of padding alone
    (2, 50_304, 50_272, 0),
    (3, 96, 1000, 37),  # a slice without a group: its words are all words
    (3, 64, 1000, 990),
    (0, 64, 64, 0),
]
ULP = {torch.float32: 3e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def draw(tokens: int, columns: int, vocab_size: int, first: int, dtype: torch.dtype = torch.float32, spread: float = 3):
    """Logits, targets and gradients of the losses. The last real word and the first are targets."""
    torch.manual_seed(SEED)
    words = max(0, min(columns, vocab_size - first))
    targets = torch.randint(first, first + words, (tokens,))
    targets[:1], targets[1:2] = first + words - 1, first
    return (torch.randn(tokens, columns) * spread).to(dtype), targets, torch.randn(tokens) + 2


def exact(logits: Tensor, targets: Tensor, upstream: Tensor, vocab_size: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Losses and gradient of PyTorch in float64."""
    wide = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(wide[:, : max(0, vocab_size - first)], targets - first, reduction="none")
    (gradient,) = torch.autograd.grad(losses, wide, upstream.double())
    return losses.detach(), gradient


def run(op: Callable[..., Tensor], logits: Tensor, targets: Tensor, upstream: Tensor, *rest: int) -> list[Tensor]:
    """Losses and gradient of the op on a copy of ``logits``."""
    leaf = logits.detach().clone().requires_grad_()
    losses = op(leaf, targets, *rest)
    return [losses.detach(), *torch.autograd.grad(losses, leaf, upstream)]


# ---- values


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradient_are_those_of_float64(shape: tuple[int, int, int, int]) -> None:
    tokens, _, vocab_size, first = shape
    logits, targets, upstream = draw(*shape)
    expected, gradient = exact(logits, targets, upstream, vocab_size, first)
    with guarded() as copied:
        leaf = copied(logits).requires_grad_()
        losses = fused(leaf, targets, vocab_size, first)
        assert bits(leaf) == bits(logits)  # the forward pass only reads
        (found,) = torch.autograd.grad(losses, leaf, copied(upstream))
    assert losses.dtype == torch.float32
    assert error(losses, expected) < 3e-6
    assert error(found, gradient) < 3e-6
    torch.testing.assert_close(found.double(), gradient, rtol=2e-5, atol=1e-12)  # small gradients as well
    assert not found[:, max(0, vocab_size - first) :].any()
    if tokens:
        assert found.data_ptr() == leaf.data_ptr()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_the_gradient_once(dtype: torch.dtype) -> None:
    logits, targets, upstream = draw(4, 700, 650, 0, dtype)
    expected, gradient = exact(logits, targets, upstream, 650)
    losses, found = run(fused, logits, targets, upstream, 650)
    assert losses.dtype == torch.float32
    assert found.dtype == dtype
    assert error(losses, expected) < 3e-6
    # To bf16 the interpreter cuts off, where the compiled kernel rounds (cvt.rn.bf16): one unit and not a half.
    unit = ULP[dtype] * (2 if dtype == torch.bfloat16 else 1)
    torch.testing.assert_close(found.double(), gradient, rtol=1.01 * unit, atol=4e-8)


@interpreted
def test_reference_agrees() -> None:
    for shape in ((4, 300, 257, 0), (3, 96, 1000, 37)):
        logits, targets, upstream = draw(*shape)
        expected, gradient = exact(logits, targets, upstream, *shape[2:])
        losses, found = run(reference, logits, targets, upstream, *shape[2:])
        assert error(losses, expected) < 3e-6
        assert error(found, gradient) < 3e-6
        assert not found[:, max(0, shape[2] - shape[3]) :].any()


@interpreted
def test_gradients_of_the_losses_may_be_expanded_strided_or_zero() -> None:
    """A sum hands back one number with the stride 0. With fp16 it is the loss scale."""
    logits, targets, _ = draw(4, 90, 80, 0)
    rows = torch.randn(4, 3)
    cases = {
        "a sum, scaled": torch.tensor(2.0**18).expand(4),
        "every third number": rows[:, 1],
        "a token that does not count": torch.tensor([1.0, 0.0, -2.0, 0.0]),
    }
    for case, upstream in cases.items():
        _, gradient = exact(logits, targets, upstream, 80)
        _, found = run(fused, logits, targets, upstream, 80)
        assert error(found, gradient) < 3e-6, case
    assert not found[1::2].any()


@interpreted
def test_a_loss_scale_beyond_fp16_overflows_as_in_the_reference() -> None:
    """The guard must see the overflow, and only where it is: 2¹⁸ · (p − 1) at the target."""
    logits, targets, _ = draw(3, 90, 80, 0, torch.float16)
    upstream = torch.tensor(2.0**18).expand(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)
        _, found = run(fused, logits, targets, upstream, 80)
    _, expected = run(reference, logits, targets, upstream, 80)
    assert found.isinf().sum() >= 3
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=2**-10, atol=0.02)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "spread"), [(torch.float32, 1e4), (torch.float32, 1e30), (torch.float16, 2e4)], ids=str
)
def test_large_logits_do_not_overflow(dtype: torch.dtype, spread: float) -> None:
    for sign in (1, -1):  # the largest of a row, far above 0 and far below
        logits, targets, upstream = draw(2, 8300, 8300, 0, dtype, spread)
        logits = sign * (logits.abs() + spread / 2).clamp(max=torch.finfo(dtype).max)
        expected, gradient = exact(logits, targets, upstream, 8300)
        losses, found = run(fused, logits, targets, upstream, 8300)
        assert error(losses, expected) < 3e-6
        assert error(found, gradient) < 2 * ULP[dtype]


@interpreted
def test_logits_far_from_zero_lose_nothing() -> None:
    """The maximum and the target's logit are subtracted first: next to 10,000 the loss would keep three digits."""
    for shift in (1e4, -1e4, -20.0):
        logits, targets, upstream = draw(2, 8300, 8300, 0, spread=1)
        logits[0, 8200:] += 4  # the largest of a row is in the second block, or in the first
        logits[1, :100] += 4
        logits += shift
        expected, gradient = exact(logits, targets, upstream, 8300)
        losses, found = run(fused, logits, targets, upstream, 8300)
        assert error(losses, expected) < 1e-6, shift
        assert error(found, gradient) < 3e-6, shift


@interpreted
def test_padding_may_hold_anything() -> None:
    logits, targets, upstream = draw(4, 90, 80, 0)
    expected = run(fused, logits, targets, upstream, 80)
    for number in (math.nan, math.inf, -math.inf, 1e30):
        logits[:, 80:] = number
        found = run(fused, logits, targets, upstream, 80)
        assert [bits(it) for it in found] == [bits(it) for it in expected], number


# ---- what must not pass unseen


@interpreted
@pytest.mark.parametrize("columns", [90, 8200, 20000])
def test_logits_that_are_not_finite_give_the_loss_that_they_give_to_pytorch(columns: int) -> None:
    logits, targets, upstream = draw(9, columns, columns, 0)
    targets[:] = 5
    logits[0, 9] = math.nan
    logits[1, 9] = math.inf
    logits[2, 9] = -math.inf  # the probability 0
    logits[3, 5] = -math.inf  # at the target: the loss is infinite
    logits[4, 5] = math.inf
    logits[5] = -math.inf
    logits[6, -1] = math.nan
    logits[7, : columns - 9] = -math.inf  # the first blocks have no other logit
    targets[7] = columns - 1
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    finite = expected.isfinite()
    assert finite.tolist() == [False, False, True, False, False, False, False, True, True]
    for op in (fused, reference):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "invalid value|divide by zero", RuntimeWarning)
            losses, gradient = run(op, logits, targets, upstream, columns)
        assert torch.equal(losses.isnan(), expected.isnan()), op
        assert losses[3] == math.inf
        assert error(losses[finite], expected[finite]) < 3e-6
        assert gradient[finite].isfinite().all()
        assert gradient[expected.isnan()].isnan().any(1).all()


@interpreted
def test_targets_outside_the_vocabulary_give_nan_and_touch_nothing_else() -> None:
    targets = torch.tensor([5, -1, 80, 89, 90, -100, 2**32 + 3, 2**40, -(2**62), 79])
    logits, _, upstream = draw(10, 90, 80, 0)
    inside = [0, 9]
    expected, expected_gradient = exact(logits[inside], targets[inside], upstream[inside], 80)
    with guarded() as copied:
        leaf = copied(logits).requires_grad_()
        losses = fused(leaf, copied(targets), 80)
        (gradient,) = torch.autograd.grad(losses, leaf, upstream)
    assert losses.isnan().tolist() == [False, *[True] * 8, False]
    assert gradient[1:9, :80].isnan().all()
    assert not gradient[:, 80:].any()
    assert error(losses[inside], expected) < 3e-6
    assert error(gradient[inside], expected_gradient) < 3e-6
    with pytest.raises(IndexError):
        reference(logits, targets, 80)
    with pytest.raises(IndexError):  # F.cross_entropy would give it the loss 0
        reference(logits[:1], targets[5:6], 80)


@interpreted
def test_a_slice_without_a_group_knows_its_own_words_only() -> None:
    logits, _, _ = draw(5, 64, 1000, 37)
    targets = torch.tensor([36, 37, 100, 101, 999])
    assert fused(logits, targets, 1000, 37).isnan().tolist() == [True, False, False, True, True]
    for outside in (0, 3):
        with pytest.raises(IndexError):
            reference(logits[:1], targets[outside : outside + 1], 1000, 37)


# ---- orders, offsets, launches


@interpreted
def test_any_order_of_programs_gives_the_same_bits() -> None:
    logits, targets, upstream = draw(5, 8300, 8250, 0)
    same_in_any_order(lambda: run(fused, logits, targets, upstream, 8250))


@interpreted
def test_rows_beyond_two_to_the_31() -> None:
    tokens, columns, vocab_size = 43_000, 50_304, 50_272
    last, target, _ = draw(1, columns, vocab_size, 0, torch.float16)
    logits, targets = sparse((tokens, columns), torch.float16), sparse((tokens,), torch.int64)
    assert logits.numel() > 2**31
    logits[-1], targets[-1] = last[0], target[0]
    expected, expected_gradient = exact(last, target, torch.tensor([3.0]), vocab_size)
    logits.requires_grad_()
    with last_program():
        losses = fused(logits, targets, vocab_size)
        (gradient,) = torch.autograd.grad(losses, logits, torch.tensor(3.0).expand(tokens))
    assert error(losses[-1:], expected) < 3e-6
    assert error(gradient[-1:], expected_gradient) < ULP[torch.float16]


@interpreted
@pytest.mark.parametrize(("columns", "vocab_size", "first"), [(96, 80, 0), (96, 90, 0), (50, 80, 48)], ids=str)
def test_check_compiles_what_is_launched(columns: int, vocab_size: int, first: int) -> None:
    """The same parameters, block, warps and divisible numbers: they decide the width of loads."""
    launches: dict[str, dict[str, Any]] = {}

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches[self.__name__] = dict(zip(self.arg_names, args, strict=False)) | kwargs

    logits, targets, upstream = draw(2, columns, vocab_size, first, torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.interpreter.InterpretedFunction.run", record)
        run(fused, logits, targets, upstream, vocab_size, first)
    declared = compilations(columns, vocab_size, torch.float16, first)
    assert [it.function.__name__ for it in declared] == list(launches) == ["_statistics_kernel", "_backward_kernel"]
    names = {torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
    for it in declared:
        launched = launches[it.function.__name__]
        assert launched.pop("num_warps") == it.num_warps
        assert {name: launched[name] for name in it.constexprs} == it.constexprs
        assert list(launched) == list(it.signature) == it.function.arg_names
        for name, value in launched.items():
            if name in it.constexprs:
                continue
            assert it.signature[name] == (names[value.dtype] if isinstance(value, Tensor) else "i32"), name
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) or name in {"columns", "words"}:
                assert (name in it.divisible) == (number % 16 == 0), name
            assert isinstance(value, Tensor) or type(value) is int, name


class Calls(TorchDispatchMode):
    """The operations that run, and how many results are as large as the logits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names, self.large = size, list[str](), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket._qualified_op_name)
        new = isinstance(result, Tensor) and result.numel() >= self.size and "alias" not in str(func._schema)
        self.large += new and result._base is None and func.overloadpacket._qualified_op_name != "aten::detach"
        return result

    @property
    def ours(self) -> list[str]:
        return [name for name in self.names if name.startswith("opt_ops::")]


def test_one_operation_forward_and_one_backward_and_no_second_buffer() -> None:
    """On the meta device, where nothing runs. The benchmark of a layer's traffic counts the same operations."""
    logits = torch.empty(64, 1000, device="meta", requires_grad=True)
    targets = torch.empty(64, dtype=torch.int64, device="meta")
    with Calls(logits.numel()) as calls:
        losses = fused(logits, targets, 990)
        assert calls.ours == ["opt_ops::cross_entropy_statistics"]
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert calls.ours == ["opt_ops::cross_entropy_statistics", "opt_ops::cross_entropy_backward"]
    assert not calls.large
    assert (losses.shape, losses.dtype, gradient.shape) == ((64,), torch.float32, (64, 1000))
    with torch.no_grad(), Calls(logits.numel()) as calls:
        assert not fused(logits, targets, 990).requires_grad
    assert calls.ours == ["opt_ops::cross_entropy_statistics"]  # evaluation reads once


@interpreted
def test_the_ops_keep_the_promises_of_torch_library() -> None:
    logits, targets, upstream = draw(3, 70, 60, 0)
    ops = torch.ops.opt_ops
    statistics = ops.cross_entropy_statistics(logits, targets, 60, 0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it tests with
        opcheck(ops.cross_entropy_statistics.default, (logits, targets, 60, 0, False))
        opcheck(ops.cross_entropy_backward.default, (logits, targets, statistics, upstream, 60, 0))
        opcheck(ops.cross_entropy_backward.default, (logits, targets, statistics, upstream[:1].expand(3), 60, 0))


@interpreted
def test_a_compiled_caller_gets_the_same_bits() -> None:
    torch.manual_seed(SEED)
    hidden, weight, targets = torch.randn(3, 8), torch.randn(70, 8), torch.tensor([0, 59, 7])

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused(hidden @ weight.t(), targets, 60).sum() * 4

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its compiler
        for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            loss = function(*leaves)
            found.append([bits(loss), *(bits(gradient) for gradient in torch.autograd.grad(loss, leaves))])
    assert found[0] == found[1]


# ---- the gradient takes the place of the logits


@interpreted
def test_a_second_backward_pass_says_that_the_logits_are_gone() -> None:
    logits, targets, _ = draw(2, 70, 60, 0)
    loss = fused(logits.requires_grad_() * 1, targets, 60).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="an earlier one wrote the gradient over them"):
        loss.backward()


@interpreted
def test_logits_that_were_changed_meanwhile_are_refused() -> None:
    logits, targets, _ = draw(2, 70, 60, 0)
    copy = logits.requires_grad_() * 1
    loss = fused(copy, targets, 60).sum()
    copy.detach().mul_(2)
    with pytest.raises(RuntimeError, match="something else changed them"):
        loss.backward()


@interpreted
def test_another_operation_that_saved_the_logits_raises() -> None:
    logits, targets, _ = draw(2, 70, 60, 0)
    copy = logits.requires_grad_() * 1
    other = copy.logsumexp(1).sum()
    loss = other + fused(copy, targets, 60).sum()  # the last call is the first in the backward pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
def test_a_gradient_of_the_gradient_is_refused_before_the_logits_are_gone() -> None:
    logits, targets, _ = draw(2, 70, 60, 0)
    copy = logits.clone().requires_grad_()
    loss = fused(copy, targets, 60).sum()
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(loss, copy, create_graph=True)
    assert bits(copy) == bits(logits)


# ---- what it takes


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, targets = torch.empty(4, 64, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    assert supported(logits, targets, 60) is None
    assert supported(logits.half(), targets, 60, 3) is None
    refused = {
        "float64": (logits.double(), targets, 60),
        "not [4, 2, 32] and [4]": (logits.view(4, 2, 32), targets, 60),
        "not [4, 64] and [3]": (logits, targets[:3], 60),
        "torch.int32": (logits, targets.int(), 60),
        "on cpu": (logits, torch.zeros(4, dtype=torch.int64), 60),
        "contiguous": (logits.t().contiguous().t(), targets, 60),
        "logits and targets must be contiguous": (logits, torch.zeros(8, dtype=torch.int64, device="meta")[::2], 60),
        "vocab_size at least 1": (logits, targets, 0),
        "first must be at least 0": (logits, targets, 60, -1),
        "TRITON_INTERPRET=1": (torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), 60),
    }
    for words, arguments in refused.items():
        with pytest.raises(NotImplementedError) as raised:
            fused(*arguments)
        assert words in str(raised.value)
        assert supported(*arguments) == str(raised.value)


# ---- a vocabulary that ranks share


def in_group(size: int, check: Callable[[int, dist.ProcessGroup], None]) -> None:
    """Run ``check(rank, group)`` on ranks of gloo, which are forks of this process. Fails with the error of one."""
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()

    def rank(number: int, store: str) -> None:
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=size)
            assert dist.group.WORLD is not None
            check(number, dist.group.WORLD)
            dist.barrier()
        except BaseException:  # noqa: BLE001  whatever it is, the test fails with it
            errors.put(f"rank {number}: {traceback.format_exc()}")
            raise SystemExit(1) from None

    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=rank, args=(i, str(Path(folder) / "store"))) for i in range(size)]
        for process in ranks:
            process.start()
        deadline, failed = time.monotonic() + 300, False
        while (running := [it for it in ranks if it.is_alive()]) and not failed and time.monotonic() < deadline:
            multiprocessing.connection.wait([it.sentinel for it in running], 1)
            failed = any(it.exitcode for it in ranks)  # the others would wait for this one
        for process in ranks:
            process.kill()
            process.join()
    if any(process.exitcode for process in ranks) or not errors.empty():
        pytest.fail(errors.get() if not errors.empty() else f"exit codes {[process.exitcode for process in ranks]}")


def shared_vocabulary(rank: int, group: dist.ProcessGroup, shape: tuple[int, int, int], shift: float = 0) -> None:
    """The slice of ``rank``: losses, gradient, the same bits on all ranks, for kernels and reference."""
    tokens, padded, vocab_size = shape
    logits, targets, upstream = draw(tokens, padded, vocab_size, 0)
    columns = padded // group.size()
    logits += shift
    logits[0, : padded // 2] -= 500  # the largest logit of a row is on another rank
    edges = torch.tensor([vocab_size - 1, columns, columns - 1, 0])[:tokens]  # a word before or after them is a fault
    targets[: len(edges)] = edges
    expected, gradient = exact(logits, targets, upstream, vocab_size)
    mine = slice(rank * columns, (rank + 1) * columns)
    for op in (fused, reference):
        losses, found = run(op, logits[:, mine].contiguous(), targets, upstream, vocab_size, mine.start, group)
        assert error(losses, expected) < 3e-6, op
        assert (
            error(torch.cat([found, gradient[:, :1].float()], 1), torch.cat([gradient[:, mine], gradient[:, :1]], 1))
            < 3e-6
        )
        torch.testing.assert_close(found.double(), gradient[:, mine], rtol=2e-5, atol=1e-12)
        assert not found[:, max(0, vocab_size - mine.start) :].any()
        gathered = [torch.empty_like(losses) for _ in range(group.size())]
        dist.all_gather(gathered, losses, group)
        assert len({bits(it) for it in gathered}) == 1


def trouble_on_one_rank(rank: int, group: dist.ProcessGroup) -> None:
    """Each rank must see that one of them holds a number that is not finite, or that no rank has the target."""
    logits, targets, _ = draw(9, 96, 88, 0)
    targets[:] = 20
    for row, column, number in ((0, 9, math.nan), (1, 87, math.inf), (2, 9, -math.inf), (3, 20, -math.inf)):
        logits[row, column] = number
    logits[4, :48] = -math.inf  # all of the first rank's words, or of the first two ranks'
    logits[5] = -math.inf
    targets[4], targets[6], targets[7] = 60, 88, -100
    expected = F.cross_entropy(logits[:, :88].double(), targets.clamp(0, 87), reduction="none")
    expected[6:8] = math.nan
    columns = 96 // group.size()
    mine = logits[:, rank * columns : (rank + 1) * columns].contiguous()
    for op in (fused, reference):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "invalid value|divide by zero", RuntimeWarning)
            losses = op(mine, targets, 88, rank * columns, group)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@interpreted
@pytest.mark.parametrize(
    ("size", "shapes"),
    [
        (2, [(3, 96, 70)]),
        # Rank 2 ends in padding and rank 3 is nothing else; then 32 words of padding, as each recipe has them.
        (4, [(4, 96, 70), (2, 50_304, 50_272)]),
    ],
    ids=["2", "4"],
)
def test_ranks_that_share_the_vocabulary(size: int, shapes: list[tuple[int, int, int]]) -> None:
    def check(rank: int, group: dist.ProcessGroup) -> None:
        for shape in shapes:
            shared_vocabulary(rank, group, shape)
        trouble_on_one_rank(rank, group)

    in_group(size, check)


@interpreted
def test_groups_beside_each_other() -> None:
    """Ranks 0 and 1 share a vocabulary, and so do 2 and 3, with other logits. Nothing passes between the two groups."""

    def check(rank: int, _: dist.ProcessGroup) -> None:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = pairs[rank // 2]
        assert isinstance(group, dist.ProcessGroup)
        shared_vocabulary(rank % 2, group, (3, 96, 70), shift=1000.0 * (rank // 2))

    in_group(4, check)


# ---- on a GPU, where the compiled kernels run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    device = torch.device("cuda")
    tokens, columns, vocab_size = 2048, 50_304, 50_272
    logits, targets, upstream = (it.to(device) for it in draw(tokens, columns, vocab_size, 0, dtype))
    expected, gradient = exact(logits, targets, upstream, vocab_size)
    first, second = (run(fused, logits, targets, upstream, vocab_size) for _ in range(2))
    record_property("worst_error", error(first[0], expected))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert error(first[0], expected) < 3e-6
    torch.testing.assert_close(first[1].double(), gradient, rtol=max(2e-5, 1.01 * ULP[dtype]), atol=4e-8)
    assert not first[1][:, vocab_size:].any()


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_on_a_gpu() -> None:
    device = torch.device("cuda")
    tokens, columns, vocab_size = 43_000, 50_304, 50_272
    few, few_targets, _ = (it.to(device) for it in draw(4, columns, vocab_size, 0, torch.bfloat16))
    logits = torch.zeros(tokens, columns, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    logits[-4:], targets[-4:] = few, few_targets
    expected, expected_gradient = exact(few, few_targets, torch.full((4,), 3.0, device=device), vocab_size)
    logits.requires_grad_()
    losses = fused(logits, targets, vocab_size)
    (gradient,) = torch.autograd.grad(losses, logits, torch.tensor(3.0, device=device).expand(tokens))
    assert gradient.data_ptr() == logits.data_ptr()
    assert error(losses[-4:], expected) < 3e-6
    assert error(losses[:-4], torch.full((tokens - 4,), math.log(vocab_size), device=device)) < 3e-6
    assert error(gradient[-4:], expected_gradient) < ULP[torch.bfloat16]
