"""The op against fp64, the mask against plain integers, and everything that values at usual sizes do not show."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import bits, error, guarded, interpreted, last_program, same_in_any_order, sparse
from trainer.hashing import MASK, ODD, key, mix
from trainer.kernels import dropout_add_layer_norm as op
from trainer.kernels.dropout_add_layer_norm import compilations, fused, keep_mask, supported
from trainer.kernels.jit import TYPES

BOTH, TOTAL, NORMED = (True, True), (True, False), (False, True)
LIMITS = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}

# 21 rows are two programs of the backward pass. Rows of more than 8,192 channels are cut into tiles there.
AWKWARD = [(3, 7, 100), (2, 2, 129), (1, 3, 1), (2, 3, 768), (1, 3, 2560), (2, 2, 8200), (1, 3, 9216)]
NOW = (key(7, 1000), 2**40 + 2**32 - 2, 5)


class Case:
    """Inputs of the op and upstream gradients, drawn from a seed. Rows differ in size and in mean."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(sum(shape))

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        rows = torch.arange(shape[0] * shape[1]).view(*shape[:2], 1)
        size = 10.0 ** -(rows % 3)  # the square of the smallest is close to eps
        drawn = [draw(*shape) * size + (rows % 2) * size, draw(*shape) * size, 1 + draw(shape[2]) / 4, draw(shape[2])]
        self.inputs = [it.to(device, dtype) for it in drawn]
        self.upstream = [draw(*shape).to(device, dtype), draw(*shape).to(device, dtype)]
        self.now = torch.tensor(NOW, device=device)

    def run(self, function: Any, p: float, use: tuple[bool, bool], site: int = 11) -> list[Tensor | None]:
        """Both results, and the gradients of x, residual, weight and bias."""
        inputs = [it.detach().requires_grad_() for it in self.inputs]
        results = function(*inputs, self.now, torch.tensor(site), p)
        used = [(result, it) for result, it, yes in zip(results, self.upstream, use, strict=True) if yes]
        torch.autograd.backward(*zip(*used, strict=True))
        return [*(it.detach() for it in results), *(it.grad for it in inputs)]

    def expected(self, p: float, use: tuple[bool, bool], site: int = 11) -> list[Tensor | None]:
        """The same in fp64. The norm is of the rounded sum."""
        x, residual, weight, bias = (it.double() for it in self.inputs)
        keep = keep_mask(x.shape, p, site, self.now)
        total = (residual + keep * x / (1 - p)).to(self.inputs[0].dtype).double().requires_grad_()
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        normed = F.layer_norm(total, weight.shape, weight, bias, 1e-5)
        of_total = self.upstream[0].double() * use[0]
        if not use[1]:
            return [total.detach(), normed.detach(), keep * of_total / (1 - p), of_total, None, None]
        normed.backward(self.upstream[1].double())
        assert total.grad is not None
        of_total = of_total + total.grad
        return [total.detach(), normed.detach(), keep * of_total / (1 - p), of_total, weight.grad, bias.grad]


def worst(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest error of any element, relative to the largest element of its row."""
    assert [it is None for it in found] == [it is None for it in expected]
    errors = [0.0]
    for a, b in zip(found, expected, strict=True):
        if a is not None and b is not None and b.numel():
            assert a.shape == b.shape
            row = b.abs().amax(-1, keepdim=True)
            difference = (a.double() - b).abs() / row.clamp(min=1e-3 * row.max().item() + 1e-6)
            errors.append(difference.nan_to_num(torch.inf).max().item())
    return max(errors)


@interpreted
@pytest.mark.parametrize("shape", AWKWARD)
def test_values_and_gradients(shape: tuple[int, int, int]) -> None:
    case = Case(shape)
    with guarded() as copied:
        case.inputs = [copied(it) for it in case.inputs]
        case.upstream = [copied(it) for it in case.upstream]
        found = case.run(fused, 0.1, BOTH)
    assert worst(found, case.expected(0.1, BOTH)) < LIMITS[torch.float32]


@interpreted
@pytest.mark.parametrize("use", [TOTAL, NORMED, BOTH])
@pytest.mark.parametrize("p", [0.3, 0.0])
@pytest.mark.parametrize("shape", [(2, 3, 100), (1, 2, 8200)])
def test_each_result_alone_and_no_dropout(shape: tuple[int, int, int], use: tuple[bool, bool], p: float) -> None:
    case = Case(shape)
    with guarded():
        found = case.run(fused, p, use)
    assert worst(found, case.expected(p, use)) < LIMITS[torch.float32]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7, 100), (1, 2, 12288)])
def test_values_and_gradients_in_16_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    # The interpreter cuts bits off where it makes bf16, and does not round: hence its limit.
    case = Case(shape, dtype)
    found, expected = case.run(fused, 0.1, BOTH), case.expected(0.1, BOTH)
    assert worst(found, expected) < LIMITS[dtype]
    assert {it.dtype for it in found if it is not None} == {dtype}


@interpreted
def test_the_norm_is_of_the_rounded_sum() -> None:
    # In fp16, 2,048 + 0.4 is 2,048: the sum has no variance, and its norm is the bias.
    x, residual = torch.full((1, 1, 64), 0.4).half(), torch.full((1, 1, 64), 2048.0).half()
    x[..., ::2] = -0.4
    bias = torch.randn(64).half()
    total, normed = fused(x, residual, torch.ones(64).half(), bias, torch.tensor(NOW), 0, 0.0)
    assert torch.equal(total, residual)
    assert torch.equal(normed[0, 0], bias)


@interpreted
def test_the_variance_is_that_of_the_differences() -> None:
    # The mean of the squares less the square of the mean would be wrong by 1e-3 here.
    x, residual = torch.randn(1, 2, 768, generator=torch.Generator().manual_seed(0)), torch.full((1, 2, 768), 100.0)
    total, normed = fused(x, residual, torch.ones(768), torch.zeros(768), torch.tensor(NOW), 0, 0.0)
    assert error(normed, F.layer_norm(total.double(), (768,))) < 1e-5


@interpreted
@pytest.mark.parametrize("eps", [1e-2, 1e-12])
def test_eps_is_the_callers(eps: float) -> None:
    case = Case((1, 3, 100))
    results = fused(*case.inputs, case.now, 11, 0.1, eps)
    assert error(results[1], op.reference(*case.inputs, case.now, 11, 0.1, eps)[1]) < 3e-6


@interpreted
def test_the_norms_weight_may_be_of_another_type() -> None:
    case = Case((2, 2, 100), torch.float16)
    case.inputs[2:] = [it.float() for it in case.inputs[2:]]
    found = case.run(fused, 0.1, BOTH)
    assert worst(found, case.expected(0.1, BOTH)) < LIMITS[torch.float16]
    assert [it.dtype for it in found if it is not None] == [torch.float16] * 4 + [torch.float32] * 2


@interpreted
@pytest.mark.parametrize(("p", "site", "now"), [
    (0.1, 0, NOW), (0.1, 190, (MASK, 0, 2047)), (0.6, 3, (0, 2**32 - 1, 2**31 - 2)), (2.0**-32, 1, NOW),
])  # fmt: skip
def test_the_mask_has_the_bits_of_keep_mask(p: float, site: int, now: tuple[int, int, int]) -> None:
    shape = torch.Size((3, 2, 257))
    x, zeros = torch.ones(shape, requires_grad=True), torch.zeros(shape)
    total, _ = fused(x, zeros, torch.ones(257), torch.zeros(257), torch.tensor(now), site, p)
    total.sum().backward()
    keep = keep_mask(shape, p, site, torch.tensor(now))
    assert x.grad is not None
    assert torch.equal(total != 0, keep)
    assert torch.equal(x.grad != 0, keep)
    assert torch.equal(total[keep], torch.full_like(total[keep], 1 / (1 - p)))
    # What the mask is, in plain integers.
    for sample, position, channel in ((0, 0, 0), (1, 1, 256), (2, 0, 100)):
        token = mix((mix((now[1] + sample + mix((now[0] + site + ODD) & MASK)) & MASK) + now[2] + position) & MASK)
        assert keep[sample, position, channel] == (mix((token + channel) & MASK) >= round(p * 2**32))


@interpreted
@pytest.mark.parametrize(("more", "kept"), [(0.0, True), (0.4, True), (0.6, False)])
def test_an_element_whose_hash_is_the_rounded_threshold_is_kept(more: float, kept: bool) -> None:
    now = (5, 0, 0)
    token = mix(mix(mix((now[0] + 3 + ODD) & MASK)))
    p = (mix((token + 7) & MASK) + more) / 2**32  # exact
    x, zeros = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
    keep = keep_mask(x.shape, p, 3, torch.tensor(now))
    total, _ = fused(x, zeros, torch.ones(8), torch.zeros(8), torch.tensor(now), 3, p)
    assert keep[0, 0, 7] == kept
    assert torch.equal(total != 0, keep)


@interpreted
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_gradients_of_weight_and_bias_are_rounded_once(dtype: torch.dtype, large: float, wide: bool) -> None:
    """In 16 bits, large + 1 is large: within a program, and where the programs are added up."""
    case = Case((1, 20, 24), dtype)
    case.inputs[1] = case.inputs[1][:, :1].expand(1, 20, 24).contiguous()  # all rows are alike
    case.upstream[1].zero_()
    case.upstream[1][0, 0], case.upstream[1][0, 1], case.upstream[1][0, 17] = large, 1, -large
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(op, "_MOST_CHANNELS_BACKWARD", 16)
            patch.setattr(op, "_TILE", 16)
        case.inputs[0].zero_()
        found, expected = case.run(fused, 0.1, NORMED), case.expected(0.1, NORMED)
    assert worst(found[4:], expected[4:]) < LIMITS[dtype]


@interpreted
def test_the_dropouts_result_is_not_rounded_before_the_sum() -> None:
    # 4/3 rounded to fp16, taken from 4/3, leaves what was rounded off.
    x, residual = torch.ones(1, 2, 100).half(), torch.full((1, 2, 100), -4 / 3).half()
    total, _ = fused(x, residual, torch.ones(100).half(), torch.zeros(100).half(), torch.tensor(NOW), 0, 0.25)
    keep = keep_mask(x.shape, 0.25, 0, torch.tensor(NOW))
    expected = 4 / 3 + residual.double()[keep]
    assert expected.all()
    torch.testing.assert_close(total[keep].double(), expected, rtol=1e-2, atol=0)


@interpreted
def test_what_is_dropped_counts_nothing_whatever_it_is() -> None:
    x, zeros = torch.full((1, 2, 100), torch.nan), torch.zeros(1, 2, 100)
    total, _ = fused(x, zeros, torch.ones(100), torch.zeros(100), torch.tensor(NOW), 0, 0.5)
    keep = keep_mask(x.shape, 0.5, 0, torch.tensor(NOW))
    assert torch.equal(total == 0, ~keep)
    assert torch.equal(total.isnan(), keep)


@interpreted
@pytest.mark.parametrize("wide", [False, True])
def test_no_bit_depends_on_the_order_of_programs(wide: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_LEAST_ROWS", 3)
        if wide:  # two tiles
            patch.setattr(op, "_MOST_CHANNELS_BACKWARD", 16)
            patch.setattr(op, "_TILE", 16)
        case = Case((1, 8, 24))  # three programs, the last of them with two rows
        same_in_any_order(lambda: [it for it in case.run(fused, 0.1, BOTH) if it is not None])
        assert worst(case.run(fused, 0.1, BOTH), case.expected(0.1, BOTH)) < LIMITS[torch.float32]


@interpreted
def test_many_rows_make_longer_programs_and_not_more() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_MOST_PROGRAMS", 2)
        case = Case((5, 7, 24))  # 18 rows and 17
        with guarded():
            found = case.run(fused, 0.1, BOTH)
    assert worst(found, case.expected(0.1, BOTH)) < LIMITS[torch.float32]


@interpreted
@pytest.mark.parametrize("width", [8192, 12288])
def test_offsets_are_of_64_bits(width: int) -> None:
    shape = (-(-(2**31) // (2048 * width)) + 1, 2048, width)
    small = Case((1, 1, width), torch.float16)
    inputs = [sparse(shape, torch.float16), sparse(shape, torch.float16), *small.inputs[2:]]
    upstream = [sparse(shape, torch.float16), sparse(shape, torch.float16)]
    for large, it in zip((*inputs[:2], *upstream), (*small.inputs[:2], *small.upstream), strict=True):
        large[-1, -1] = it[0, 0]
    now = torch.tensor([NOW[0], 1, 2])
    small.now = torch.tensor([NOW[0], shape[0], 2049])
    with pytest.MonkeyPatch.context() as patch, last_program():
        patch.setattr(op, "_MOST_PROGRAMS", 2**31)
        inputs = [it.detach().requires_grad_() for it in inputs]
        results = fused(*inputs, now, 11, 0.1)
        torch.autograd.backward(results, upstream)
    found = [
        *(it[-1:, -1:] for it in results),
        *(it.grad[-1:, -1:] for it in inputs[:2]),
        *(it.grad for it in inputs[2:]),
    ]
    first = (width - 1) // 2048 * 2048 if width > 8192 else 0  # only the last tile of the backward pass has run
    expected = small.expected(0.1, BOTH)
    assert worst([it[..., first:] for it in found], [it[..., first:] for it in expected]) < LIMITS[torch.float16]


@interpreted
def test_no_rows() -> None:
    case = Case((0, 5, 8))
    found = case.run(fused, 0.1, BOTH)
    assert [tuple(it.shape) for it in found if it is not None] == [(0, 5, 8)] * 4 + [(8,)] * 2
    assert not any(it.any() for it in found[4:] if it is not None)


@interpreted
@pytest.mark.parametrize("needed", [[0], [1], [2], [3], [0, 3]])
def test_some_inputs_need_no_gradient(needed: list[int]) -> None:
    case = Case((1, 2, 24))
    inputs = [it.detach().requires_grad_(i in needed) for i, it in enumerate(case.inputs)]
    _, normed = fused(*inputs, case.now, 11, 0.1)
    normed.sum().backward()  # a gradient of stride 0
    case.upstream[1] = torch.ones_like(normed)
    expected = case.expected(0.1, NORMED)[2:]
    assert worst([it.grad for it in inputs], [it if i in needed else None for i, it in enumerate(expected)]) < 3e-6


@interpreted
def test_it_is_an_op_that_the_compiler_can_trust() -> None:
    case = Case((2, 2, 24))
    inputs = [it.requires_grad_() for it in case.inputs]
    site = torch.tensor(11)
    for p in (0.1, 0.0):
        torch.library.opcheck(torch.ops.opt_ops.dropout_add_layer_norm, (*inputs, case.now, site, p, 1e-5))
    for p, use in ((0.1, BOTH), (0.1, TOTAL), (0.0, NORMED)):
        upstream = [it if yes else None for it, yes in zip(case.upstream, use, strict=True)]
        kept = inputs[0].detach(), inputs[2].detach(), torch.ones(4), torch.ones(4), case.now, site, p
        torch.library.opcheck(torch.ops.opt_ops.dropout_add_layer_norm_backward, (*upstream, *kept))


@interpreted
def test_compiled_code_takes_the_site_as_an_argument() -> None:
    case = Case((2, 3, 24))
    inputs = [it.requires_grad_() for it in case.inputs]
    compiled = torch.compile(lambda site: fused(*inputs, case.now, site, 0.1), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for site in (0, 1, 16):
            eager = fused(*inputs, case.now, site, 0.1)
            for a, b in zip(compiled(torch.tensor(site)), eager, strict=True):
                assert torch.equal(a, b)
                one, two = (torch.autograd.grad(it.sum(), inputs[0], retain_graph=True)[0] for it in (a, b))
                assert torch.equal(one, two)


class Seen(TorchDispatchMode):
    """The operations that PyTorch sees, but those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in ("aten::detach", "aten::unbind", "aten::select"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def meta(shape: tuple[int, int, int] = (2, 16, 64)) -> list[Tensor]:
    inputs = [torch.empty(it, device="meta", requires_grad=True) for it in (shape, shape, shape[2:], shape[2:])]
    return [*inputs, torch.empty(3, dtype=torch.int64, device="meta")]


@pytest.mark.parametrize("p", [0.1, 0.0])
def test_each_pass_is_one_operation(p: float) -> None:
    inputs = meta()
    upstream = [torch.empty_like(inputs[0], requires_grad=False) for _ in range(2)]
    site = torch.tensor(1)
    with Seen() as seen:
        results = fused(*inputs, site, p)
        gradients = torch.autograd.grad(results, inputs[:4], upstream)
    assert seen.names == ["opt_ops::dropout_add_layer_norm", "opt_ops::dropout_add_layer_norm_backward"]
    assert [it.shape for it in gradients] == [it.shape for it in inputs[:4]]


def test_why_it_cannot_run_is_said_in_words() -> None:
    x, residual, weight, bias, now = meta()

    def why(
        x: Tensor = x,
        residual: Tensor = residual,
        weight: Tensor = weight,
        bias: Tensor = bias,
        now: Tensor = now,
        site: Any = 0,
        p: float = 0.1,
    ) -> str:
        reason = supported(x, residual, weight, bias, now, site, p) or ""
        with pytest.raises(NotImplementedError) as raised:
            fused(x, residual, weight, bias, now, site, p)
        assert str(raised.value) == reason
        return reason

    assert supported(x, residual, weight, bias, now, torch.tensor(0), 0.1) is None
    assert "contiguous, and these are not: x" in why(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert "not: residual" in why(residual=x.transpose(0, 1).contiguous().transpose(0, 1))
    assert "not: weight" in why(weight=torch.empty(128, device="meta")[::2])
    assert "not: bias" in why(bias=torch.empty(128, device="meta")[::2])
    assert "these are not: residual, bias" in why(residual=torch.zeros(2, 16, 64), bias=torch.zeros(64))
    assert "they are float32, float16" in why(residual=residual.half())
    assert "[2, 16, 32]" in why(x[..., :32])
    assert "[channel]" in why(weight=weight[:32])
    assert "float64" in why(x.double())
    assert "weight and bias must both be" in why(weight=weight.half())
    assert "now must be int64 [3], and it is int64 [2]" in why(now=now[:2])
    assert "these are not: now" in why(now=torch.zeros(3, dtype=torch.int64))
    assert "site must be" in why(site=torch.tensor(1.0))
    assert "less than 1, and it is 1.0" in why(p=1.0)
    assert "-0.1" in why(p=-0.1)
    big = [torch.empty(it, device="meta") for it in ((1, 1, 16385), (1, 1, 16385), (16385,), (16385,))]
    assert "1 to 16384 channels" in (supported(*big, now, 0, 0.1) or "")
    cpu = [torch.zeros(it.shape, dtype=it.dtype) for it in (x, residual, weight, bias, now)]
    assert "TRITON_INTERPRET=1" in (supported(*cpu, 0, 0.1) or "")


@interpreted
@pytest.mark.parametrize("width", [768, 9216])
def test_what_check_compiles_is_what_is_launched(width: int) -> None:
    launched: dict[str, dict[str, Any]] = {}

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launched.update(
                {self.kernel.__name__: dict(zip(self.kernel.arg_names, args, strict=False)) | options}
            )

    case = Case((1, 2, width), torch.float16)
    expected = compilations(width, torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        for it in ("_forward_kernel", "_products_kernel", "_backward_kernel"):
            patch.setattr(op, it, Spy(getattr(op, it)))
        case.run(fused, 0.1, BOTH)
    assert [*launched] == [it.function.__name__ for it in expected]
    names = TYPES | {torch.int64: "i64"}
    for it in expected:
        args = launched[it.function.__name__]
        assert args.pop("num_warps") == it.num_warps
        assert {name: value for name, value in args.items() if it.signature[name] == "constexpr"} == it.constexprs
        for name, value in args.items():
            if it.signature[name] != "constexpr":
                type_ = f"*{names[value.dtype]}" if isinstance(value, Tensor) else "i32"
                assert (name, type_) == (name, it.signature[name])
                assert (name in it.divisible) == isinstance(value, Tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 2048, 2048), (1, 2048, 4096), (1, 640, 12288), (3, 7, 100)])
@pytest.mark.parametrize("p", [0.1, 0.0])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_on_a_gpu(shape: tuple[int, int, int], p: float, dtype: torch.dtype) -> None:
    case = Case(shape, dtype, "cuda")
    found = case.run(fused, p, BOTH)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert worst([it.flatten(0, -2)[:64] if it.dim() > 1 else it for it in found], case.expected(p, BOTH)) < limit
    again = case.run(fused, p, BOTH)
    assert all(bits(a.cpu()) == bits(b.cpu()) for a, b in zip(found, again, strict=True))
