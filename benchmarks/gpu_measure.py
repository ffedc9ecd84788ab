"""Measurements of ``benchmarks/gpu_all.sh`` that share a process with the model: first steps, busy times, a profile."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from benchmarks.train_step import CUDA, DEVICE, Bytes, recipe_of, take_weights
from opt_ops.contract.environment import Place
from trainer import optim
from trainer.evaluation import _evaluating
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.recipes import Recipe, changed
from trainer.step.busy_time import LayerTimes
from trainer.step.measured import Progress
from trainer.step.rank_inputs import StepInputs
from trainer.step.step import advanced, forward_backward, measure

_ATTENTION = ("cudnn", "flash", "fmha", "attention", "sdpa")  # parts of the names of attention's kernels


class _Training:
    """The trainer's steps on this device, in a process group of one rank."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.progress = recipe, Progress()
        self.engine: Engine = build(recipe, mesh.start(Place(0, 1, 0), 1, 1))
        self.samples = Bytes(recipe.data.seq_len)

    def step(self) -> float:
        step = self.progress.step + 1
        shares = forward_backward(self.engine, self.samples, self.recipe, self.progress)
        found = measure(self.engine, shares, StepInputs())
        self.engine.update(found.gnorm, optim.learning_rate(step, self.recipe.optim), shares.divisor)
        self.progress = advanced(self.progress, self.recipe)
        return found.loss

    def evaluated(self) -> float:
        """The mean loss of the first batch, without dropout."""
        inputs, targets = self.samples.batch(0, self.recipe.data.global_batch)
        with _evaluating(self.engine), self.engine.micro_step(last=True):
            loss, _ = self.engine.loss(inputs.to(DEVICE), targets.to(DEVICE))
        return loss.item() / targets.numel()

    def close(self) -> None:
        del self.engine
        dist.destroy_process_group()


def eager_and_compiled(*, rehearse: bool) -> dict[str, Any]:
    """Losses of 20 steps of 125M in bf16, eager and compiled, and of the first batch beside Hugging Face's model.

    On CPUs, in a rehearsal, both are eager and in fp32.
    """
    recipe = recipe_of("tiny", 2, 32) if rehearse else recipe_of("125m", 8, 2048)
    found: dict[str, Any] = {}
    for name in ("eager", "compiled"):
        compiled = "true" if CUDA and name == "compiled" else "false"
        training = _Training(changed(recipe, f"compile={compiled}"))
        if name == "eager":
            found["evaluated"] = training.evaluated()
        found[name] = [training.step() for _ in range(3 if rehearse else 20)]
        if name == "eager":
            names = {event.key for event in _profiled(training.step).key_averages()}
            found["attention"] = sorted({n[:60] for n in names if any(word in n.lower() for word in _ATTENTION)})
        training.close()
    found["hugging_face"] = _hugging_face_loss(recipe)
    return found


@torch.no_grad()
def _hugging_face_loss(recipe: Recipe) -> float | str:
    try:
        from transformers import OPTForCausalLM
    except ImportError as error:
        return f"not installed ({error})"
    from benchmarks.train_step import hugging_face_config

    with torch.device("meta"):
        theirs = OPTForCausalLM(hugging_face_config(recipe.model))
    decoder: Any = theirs.model.decoder
    take_weights(decoder, recipe, torch.bfloat16 if CUDA else torch.float32)
    theirs.lm_head.weight = decoder.embed_tokens.weight
    theirs.eval()
    inputs, targets = (ids.to(DEVICE) for ids in Bytes(recipe.data.seq_len).batch(0, recipe.data.global_batch))
    model: Any = theirs
    return model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss.item()


def attention_rates(*, rehearse: bool, left: Callable[[], float]) -> dict[str, str]:
    """TFLOP/s of causal attention, forward and backward together, by head size and kernel. Random data, bf16."""
    if rehearse and not CUDA:
        return {"64, the CPU's": f"{_rate(64, 2, 64, 0.0):.4f}"}
    found = {}
    for head_dim in (64, 80, 128):
        for p in (0.0, 0.1):
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                name = f"{head_dim}, {backend.name.split('_')[0].lower()}, dropout {p:g}"
                if left() < 2:
                    found[name] = "not measured"
                    continue
                try:
                    with sdpa_kernel(backend):
                        found[name] = f"{_rate(head_dim, 2 if rehearse else 32, 256 if rehearse else 2048, p):.0f}"
                except RuntimeError as error:
                    found[name] = f"cannot: {str(error).splitlines()[0][:60]}"
    return found


def _rate(head_dim: int, heads: int, length: int, p: float, batch: int = 8) -> float:
    dtype = torch.bfloat16 if CUDA else torch.float32
    shape = (batch, heads, length, head_dim)
    sets = [[torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)] for _ in range(2)]
    upstream = torch.randn(shape, device=DEVICE, dtype=dtype)

    def run(tensors: list[Tensor]) -> None:
        F.scaled_dot_product_attention(*tensors, is_causal=True, dropout_p=p).backward(upstream)

    seconds = seconds_of([lambda tensors=tensors: run(tensors) for tensors in sets])
    flops = 3.5 * 4 * batch * heads * length * length * head_dim / 2  # backward is 2.5 of forward; causal is half
    return flops / seconds / 1e12


def seconds_of(calls: Sequence[Callable[[], object]], rounds: int = 10, warmup: int = 3) -> float:
    """Median seconds of a call. The calls take turns, so that the cache does not hold what one of them reads."""
    taken = []
    for index in range(warmup + rounds):
        call = calls[index % len(calls)]
        if CUDA:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[warmup:])


def profile_of_a_step(*, rehearse: bool) -> dict[str, Any]:
    """Shares of the time of one step of 1.3B by kernel, largest first, and the share in which no kernel ran."""
    training = _Training(recipe_of("tiny", 2, 32) if rehearse else recipe_of("1.3b", 8, 2048))
    for _ in range(3):
        training.step()
    events = _profiled(training.step)
    training.close()
    kind = "CUDA" if CUDA else "CPU"
    spans = sorted((e.time_range.start, e.time_range.end) for e in events.events() or [] if e.device_type.name == kind)
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    times = [(e.key, e.self_device_time_total if CUDA else e.self_cpu_time_total) for e in events.key_averages()]
    shares = sorted(((name, spent / total) for name, spent in times if spent), key=lambda item: -item[1])
    return {"shares": shares[:40], "idle": 1 - busy / total, "microseconds": total}


class _CpuMark:
    """What a CUDA event is on a GPU, for a rehearsal."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: Any) -> float:
        return (end_event.at - self.at) * 1000


def _mark() -> Any:
    return torch.cuda.Event(enable_timing=True) if CUDA else _CpuMark()


def _wait() -> None:
    """Two milliseconds of an idle GPU, as if the weights of a layer were still on their way. The host goes on."""
    if CUDA:
        torch.cuda._sleep(4_000_000)  # noqa: SLF001  cycles, at about 2 GHz; torch has no other name for it
    else:
        time.sleep(0.002)


def busy_times(*, rehearse: bool) -> dict[str, Any]:
    """Milliseconds of :class:`LayerTimes` beside those of whole forward passes and whole steps, on one rank.

    One GPU has no second rank to wait for, so an idle GPU before each layer stands for weights that are on their way.

    Returns:
        ``plain`` and, with such waits, ``waiting``: the medians of the layers, of the forward pass and of the step.
    """
    recipe = recipe_of("tiny", 2, 32) if rehearse else recipe_of("1.3b", 8, 2048)
    training = _Training(changed(recipe, "compile=false"))  # hooks would break up compiled layers
    engine: Any = training.engine
    loss, passes, waits = engine.loss, [], False
    for layer in engine.model.layers:
        layer.register_forward_pre_hook(lambda *_: _wait() if waits else None)
    times = LayerTimes(engine.model.layers, _mark)

    def timed_loss(*arguments: Tensor) -> Any:
        passes.append((_mark(), _mark()))
        passes[-1][0].record()
        found = loss(*arguments)
        passes[-1][1].record()
        return found

    engine.loss = timed_loss
    found: dict[str, Any] = {}
    for name, waits in (("warm", False), ("plain", False), ("waiting", True)):  # noqa: B007  the hooks read waits
        rows = []
        for _ in range(3):
            passes.clear()
            began = time.perf_counter()
            training.step()
            if CUDA:
                torch.cuda.synchronize()
            whole = time.perf_counter() - began
            times.seconds()  # of the step before
            rows.append((times.seconds() or 0.0, sum(b.elapsed_time(e) for b, e in passes) / 1000, whole))
        found[name] = [1000 * statistics.median(column) for column in zip(*rows, strict=True)]
    del engine
    training.close()
    return found


def _profiled(call: Callable[[], object]) -> profiler:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    with profiler(activities=activities) as found:
        call()
        if CUDA:
            torch.cuda.synchronize()
    return found
