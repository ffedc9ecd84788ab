import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import bits, error, guarded, interpreted, last_program, same_in_any_order, sparse
from trainer.kernels import bias_relu
from trainer.kernels.bias_relu import fused, reference, supported

# Largest difference from fp64, relative to the largest number.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# [..., inputs] and outputs. A program has tiles of 8 rows by 512 columns, and 32 rows or more.
SHAPES = [
    ((1, 1), 1),
    ((5,), 7),
    ((3, 7, 5), 33),  # less than a tile
    ((2, 33, 12), 512),  # a tile's width, and three programs below each other, the last with 2 rows
    ((41, 8), 1027),  # three tiles beside each other, the last with 3 columns
    ((2, 0, 6), 9),
]


def inputs(shape: Sequence[int], outputs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """``x``, ``weight``, ``bias``, and a gradient of the output whose rows and columns all differ."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias, gradient = (
        torch.randn(size, generator=draw) for size in (shape, (outputs, shape[-1]), (outputs,), (*shape[:-1], outputs))
    )
    return [t.to(dtype) for t in (x, weight / shape[-1] ** 0.5, bias, gradient)]


def gradients(op: object, x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The output of the op, and the gradients of its inputs."""
    given = [t.requires_grad_() for t in (x, weight, bias)]
    output = op(*given)  # type: ignore[operator]
    return output.detach(), *torch.autograd.grad(output, given, gradient)


def check(found: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    expected = gradients(reference, *(t.detach().double() for t in given))
    for name, one, other in zip(("output", "x", "weight", "bias"), found, expected, strict=True):
        assert one.dtype == given[0].dtype
        assert error(one, other) <= TOLERANCE[one.dtype], name


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
def test_values_and_gradients(shape: Sequence[int], outputs: int, dtype: torch.dtype) -> None:
    given = inputs(shape, outputs, dtype)
    with guarded() as copied:
        found = gradients(fused, *map(copied, given))
    check(found, given)


@interpreted
def test_a_program_takes_more_rows_where_there_are_many() -> None:
    for rows in (96, 97, 131):  # up to 3 × 32 rows, programs have 32
        given = inputs((rows, 3), 20)
        with pytest.MonkeyPatch.context() as patch, guarded() as copied:
            patch.setattr(bias_relu, "_MOST_GROUPS", 3)
            found = gradients(fused, *map(copied, given))
        check(found, given)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_zero_nan_and_infinity_are_treated_as_pytorch_treats_them(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, float("inf"), float("nan"), torch.finfo(dtype).tiny]
    output, gradient = torch.tensor([*itertools.product(special, [*special, -1.0, -float("inf")])], dtype=dtype).T
    output, gradient = output[:, None].contiguous(), gradient[:, None].contiguous()
    product, sums = torch.ops.opt_ops.bias_relu_backward(gradient, output)
    expected = torch.ops.aten.threshold_backward(gradient, output, 0)
    assert bits(torch.nan_to_num(product, 7.0)) == bits(torch.nan_to_num(expected, 7.0))
    assert torch.isnan(sums).all()
    x = torch.tensor([[float("nan"), 1.0]], dtype=dtype)
    assert torch.isnan(fused(x, torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype))).any()


@interpreted
def test_results_do_not_depend_on_the_order_of_programs() -> None:
    *_, gradient = inputs((70, 1), 600)
    output = torch.relu(inputs((70, 1), 600, seed=1)[-1])
    same_in_any_order(lambda: torch.ops.opt_ops.bias_relu_backward(gradient, output))


@interpreted
def test_offsets_beyond_two_to_the_31() -> None:
    rows, columns = 107_400, 20_000
    output, gradient = sparse((rows, columns), torch.float16), sparse((rows, columns), torch.float16)
    last = slice(127 * 840, rows), slice(39 * 512, columns)  # 128 programs below each other, with 840 rows at most
    values, upstream = torch.relu(torch.randn(720, 32)), torch.randn(720, 32)
    output[last], gradient[last] = values, upstream
    with last_program():
        product, sums = torch.ops.opt_ops.bias_relu_backward(gradient, output)
    expected = upstream.half() * (values.half() > 0)
    assert torch.equal(product[last], expected)
    assert error(sums[last[1]], expected.double().sum(0)) < 1e-3
    assert not product[-1, : last[1].start].any()


@interpreted
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_the_gradient_of_the_bias_is_rounded_once(dtype: torch.dtype, large: float) -> None:
    """In 16 bits, large + 1 is large: within a program, and where the programs are added up."""
    gradient = torch.zeros(40, 20, dtype=dtype)
    gradient[0], gradient[8], gradient[33] = large, 1, -large  # the second program begins at row 32
    _, sums = torch.ops.opt_ops.bias_relu_backward(gradient, torch.ones_like(gradient))
    assert torch.equal(sums, torch.ones(20, dtype=dtype))


@interpreted
def test_an_upstream_gradient_may_have_strides() -> None:
    x, weight, bias, _ = inputs((4, 9, 6), 10)
    for gradient in (torch.tensor(2.0).expand(4, 9, 10), torch.randn(4, 10, 9).transpose(1, 2)):
        given = [x, weight, bias, gradient]
        check(gradients(fused, *(t.detach() for t in given)), given)


class Seen(TorchDispatchMode):
    """The operations that run, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view:
            self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


FORWARD, BACKWARD, PRODUCT = "opt_ops.bias_relu", "opt_ops.bias_relu_backward", "aten.mm"


@pytest.mark.parametrize(
    ("needed", "operations"),
    [
        ((True, True, True), [BACKWARD, PRODUCT, PRODUCT]),
        ((False, True, True), [BACKWARD, PRODUCT]),
        ((True, False, False), [BACKWARD, PRODUCT]),
        ((False, False, True), [BACKWARD]),
        ((False, False, False), []),
    ],
)
def test_only_gradients_that_are_needed_are_computed_and_products_are_seen_as_such(
    needed: Sequence[bool], operations: list[str]
) -> None:
    *given, gradient = (t.to("meta") for t in inputs((2, 16, 8), 32, torch.bfloat16))
    for tensor, wanted in zip(given, needed, strict=True):
        tensor.requires_grad_(wanted)
    with Seen() as seen:
        output = fused(*given)
        if output.requires_grad:
            output.backward(gradient)
    assert seen.names == [FORWARD, *operations]
    assert [t.grad is not None for t in given] == list(needed)


def test_one_tensor_of_the_size_of_the_output_is_kept() -> None:
    x, weight, bias, _ = (t.to("meta").requires_grad_() for t in inputs((2, 16, 8), 32))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None):
        output = fused(x, weight, bias)
    assert sorted(kept) == sorted([x.shape, weight.shape, output.shape])


@interpreted
def test_autograd_and_the_compiler_may_rely_on_the_ops() -> None:
    *given, gradient = inputs((3, 4, 5), 6)
    torch.library.opcheck(torch.ops.opt_ops.bias_relu, [t.requires_grad_() for t in given])
    torch.library.opcheck(torch.ops.opt_ops.bias_relu_backward, (gradient, torch.relu(gradient)))


def test_what_the_kernel_cannot_do_is_said_in_words() -> None:
    x, weight, bias, _ = (t.to("meta") for t in inputs((4, 6), 10))
    assert supported(x, weight, bias) is None
    for given, words in (
        ((x[:, :5].contiguous(), weight, bias), r"\[4, 5\], \[10, 6\], \[10\]"),
        ((x, weight, bias[:9]), r"\[9\]"),
        ((x, weight.half(), bias), "float32, float16, float32"),
        ((x, weight, bias.half()), "float32, float32, float16"),
        ((x.double(), weight.double(), bias.double()), "float64"),
        ((x.t().contiguous().t(), weight, bias), "contiguous"),
        ((x, weight, torch.zeros(10)), "different devices: meta, meta, cpu"),
        ((x, torch.zeros(10, 6), bias), "different devices: meta, cpu, meta"),
        ((x, weight.t().contiguous().t(), bias), "contiguous"),
        ((x, weight, torch.zeros(20, device="meta")[::2]), "contiguous"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            fused(*given)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET"):
        fused(*inputs((4, 6), 10)[:3])


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "outputs"), [((8, 2048, 2048), 8192), ((2, 2048, 4096), 16384), ((3, 7, 5), 33)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_a_gpu(
    shape: Sequence[int], outputs: int, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    given = [t.cuda() for t in inputs(shape, outputs, dtype)]
    found = gradients(fused, *given)
    # Products of PyTorch are as exact as its own: what is compared is the same sum in another order, and bf16 or fp16.
    expected = gradients(reference, *(t.detach().float() for t in given))
    limit = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    errors = [error(one.cpu(), other.cpu()) for one, other in zip(found, expected, strict=True)]
    record_property("worst_error", max(errors))
    assert max(errors) <= limit
    again = gradients(fused, *(t.detach() for t in given))
    assert bits(found[3].cpu()) == bits(again[3].cpu())  # the order of its sum is fixed
