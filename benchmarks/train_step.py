"""Seconds of one update: this trainer beside Hugging Face's OPT and a plain compiled one.

    python -m benchmarks.train_step --size 1.3b --batch 8                  (one GPU)
    python -m benchmarks.train_step --size small --batch 4                 (CPU)
    python -m benchmarks.train_step --rehearse                             (does it run at all? a minute, on a CPU)

| contender | what it is |
| --- | --- |
| ours | the trainer's own steps: FSDP2 on one rank, guard, checks and measurements included; kernels=off |
| ours+kernels | the same with kernels=on |
| P1 | Hugging Face's OPT as its Trainer runs it with bf16=True: fp32 weights under autocast, SDPA, AdamW, eager |
| P2 | the same model, careful: bf16 weights with fp32 masters, each layer compiled, fused AdamW |
| P3 | a plain OPT (tests/trainer/plain_opt.py), compiled whole, padded vocabulary, the rest as P2 |

All begin with the same weights and see the same batches; dropout is OPT's, with masks of their own. All have the same
attention: on Hopper cuDNN's comes first for every contender, elsewhere torch's order holds. Master weights and moments
are fp32; backward pass, clipping to norm 1 and AdamW are inside the timed step. On CPUs all is fp32. Each contender has
a process of its own, one after the other; the median of the steps after a warm-up is shown, with quartiles and the CPU
seconds of the process, because a shared machine is not quiet. A rehearsal compiles nothing.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer import recipes
from trainer.model import cost
from trainer.model.opt import OPT
from trainer.optim import learning_rate
from trainer.plan.hardware import peak_tflops
from trainer.recipes import ModelConfig, OptimConfig, Recipe

CONTENDERS = ("ours", "ours+kernels", "P1", "P2", "P3")
REHEARSAL = {"size": "tiny", "batch": 1, "seq_len": 16, "warmup": 1, "steps": 2}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TINY = ("model.num_layers=2", "model.hidden_size=64", "model.num_heads=2", "model.vocab_size=512")
SMALL = ("model.num_layers=4", "model.hidden_size=256", "model.num_heads=4", "model.vocab_size=8000")

Step = Callable[[int], float]  # number of the update, from 1 → its loss


def recipe_of(size: str, batch: int, seq_len: int, *, kernels: bool = False) -> Recipe:
    """A published size, or a small one for CPUs; a short warm-up, so that the curves have something to show."""
    shape = {"tiny": TINY, "small": SMALL}.get(size, ())
    name = "opt-125m" if shape else f"opt-{size}"
    settings = [
        *shape,
        f"data.seq_len={seq_len}",
        f"data.global_batch={batch}",
        f"data.micro_batch={batch}",
        "optim.warmup_steps=20",
        f"precision={'bf16' if CUDA else 'fp32'}",
        "parallel.tp=1",
        f"compile={str(CUDA).lower()}",
        f"kernels={'on' if kernels else 'off'}",
    ]
    return recipes.build(name, settings)


class Bytes:
    """Python's manual as bytes, one token each, in windows one after the other: the same for all."""

    def __init__(self, seq_len: int) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        ids = np.frombuffer(text, np.uint8).astype(np.int64) + 4
        self.rows = torch.from_numpy(ids[: len(ids) // (seq_len + 1) * (seq_len + 1)].reshape(-1, seq_len + 1).copy())

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, [count, seq_len] each."""
        rows = self.rows[[(first + i) % len(self.rows) for i in range(count)]]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class MasterAdamW:
    """AdamW on fp32 masters of bf16 weights, or on the weights themselves where they are fp32; clipping included."""

    def __init__(self, model: nn.Module, config: OptimConfig, *, fused: bool) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().float() for p in self.weights] if CUDA and fused else self.weights
        self.config = config
        decay = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.adamw = torch.optim.AdamW(self.masters, fused=fused or None, **decay)

    def step(self, update: int) -> None:
        """Apply the gradients of the weights."""
        nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm)
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
                weight.grad = None
        self.adamw.param_groups[0]["lr"] = learning_rate(update, self.config)
        self.adamw.step()
        self.adamw.zero_grad()
        if self.masters is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.weights), list[Tensor](self.masters))


def ours(recipe: Recipe, folder: Path) -> Step:
    """The steps of ``python -m trainer``."""
    from opt_ops.contract.environment import Place
    from opt_ops.contract.options import Options
    from opt_ops.contract.outside import Outside
    from trainer.checkpoint.schedule import SaveSchedules
    from trainer.parallel import mesh
    from trainer.parallel.build import build
    from trainer.step.checksums import Checksums
    from trainer.step.guard import Guard
    from trainer.step.measured import Progress
    from trainer.step.rank_inputs import RankInputs
    from trainer.step.step import Steps

    layout = mesh.start(Place(0, 1, 0), 1, 1)
    spread = build(recipe, layout)  # draws what first_weights draws, on the same device
    saves = SaveSchedules(recipe, snapshots=False)
    inputs = RankInputs(Outside(Options(run_dir=folder), layout.rank), layout, saves)
    checksums = Checksums(spread.model, spread.optimizer, layout, recipe.checksum_every)
    steps = Steps(recipe, (), (), spread, Bytes(recipe.data.seq_len), Guard(recipe), inputs, checksums)
    progress = Progress()

    def step(_update: int) -> float:
        nonlocal progress
        outcome = steps.take(progress)
        progress = outcome.progress
        return outcome.measured.loss

    return step


def peer(recipe: Recipe, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], *, careful: bool) -> Step:
    """Forward, backward, clip and update of somebody else's ``model``."""
    data, batch = Bytes(recipe.data.seq_len), recipe.data.global_batch
    optimizer = MasterAdamW(model, recipe.optim, fused=careful)
    torch.manual_seed(recipe.seed)

    @contextmanager
    def settings() -> Iterator[None]:
        autocast = torch.autocast("cuda", torch.bfloat16) if CUDA and not careful else nullcontext()
        with autocast:
            yield

    def step(update: int) -> float:
        inputs, targets = (ids.to(DEVICE) for ids in data.batch((update - 1) * batch, batch))
        with settings():
            value = loss(inputs, targets)
            value.backward()
        optimizer.step(update)
        return value.item()

    return step


def hugging_face_config(config: ModelConfig) -> Any:
    """The same model as Hugging Face describes it."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        ffn_dim=4 * config.hidden_size,
        max_position_embeddings=config.max_positions,
        num_attention_heads=config.num_heads,
        word_embed_proj_dim=config.embedding_width,
        do_layer_norm_before=config.norm == "pre",
        dropout=config.dropout,
        attention_dropout=0.0,
    )


def hugging_face(recipe: Recipe, *, careful: bool) -> Step:
    """``OPTForCausalLM`` with our weights."""
    from transformers import OPTForCausalLM

    with torch.device("meta"):  # their initial values are not needed
        theirs = OPTForCausalLM(hugging_face_config(recipe.model))
    decoder: Any = theirs.model.decoder
    take_weights(decoder, recipe, torch.bfloat16 if CUDA and careful else torch.float32)
    theirs.lm_head.weight = decoder.embed_tokens.weight
    theirs.train()
    if careful:
        for layer in decoder.layers:
            layer.compile()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return theirs(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    return peer(recipe, theirs, loss, careful=careful)


def plain(recipe: Recipe) -> Step:
    """The plain OPT of the tests, compiled as a whole."""
    from tests.trainer.plain_opt import PlainOPT

    with torch.device("meta"):
        model = PlainOPT(recipe.model)
    take_weights(model, recipe, torch.bfloat16 if CUDA else torch.float32)
    return peer(recipe, model, torch.compile(model), careful=True)


@torch.no_grad()
def take_weights(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> None:
    """Let ``model``, on the meta device, begin with what all begin with. Part by part: all of it in fp32 is large."""
    with torch.device("meta"):
        ours = OPT(recipe.model, recipe.seed)
    theirs = dict(model.named_parameters())
    for prefix, part in ours.named_children():
        for name, child in part.named_children() if prefix == "layers" else [("", part)]:
            if prefix == "lm_head":
                continue
            ours.draw(child, DEVICE)
            for key, value in child.named_parameters():
                full = ".".join(filter(None, (prefix, name, key)))
                rows = len(theirs[full])  # Hugging Face's embeddings have no padding
                owner, _, leaf = full.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value[:rows].detach().to(dtype, copy=True)))
            child.to("meta")


def attention() -> AbstractContextManager[Any]:
    """The order of attention kernels, for every contender alike."""
    if not CUDA or torch.cuda.get_device_capability()[0] != 9:
        return nullcontext()
    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True)


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Warm up and time one contender, in this process."""
    kernels = options.contender == "ours+kernels"
    recipe = recipe_of(options.size, options.batch, options.seq_len, kernels=kernels)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder, attention():
        contenders: dict[str, Callable[[], Step]] = {
            "ours": lambda: ours(recipe, Path(folder)),
            "ours+kernels": lambda: ours(recipe, Path(folder)),
            "P1": lambda: hugging_face(recipe, careful=False),
            "P2": lambda: hugging_face(recipe, careful=True),
            "P3": lambda: plain(recipe),
        }
        step = contenders[options.contender]()
        losses: list[float] = []
        seconds: list[float] = []
        cpu_seconds: list[float] = []
        for update in range(1, options.warmup + options.steps + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            losses.append(step(update))
            if CUDA:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "contender": options.contender,
        "losses": losses,
        "seconds": seconds[options.warmup :],
        "cpu_seconds": cpu_seconds[options.warmup :],
        "peak_bytes": peak,
    }


def row(result: dict[str, Any], recipe: Recipe) -> str:
    """One line of the table."""
    seconds = result["seconds"]
    low, median, high = statistics.quantiles(seconds, n=4)
    tokens = recipe.data.global_batch * recipe.data.seq_len
    cpu = statistics.median(result["cpu_seconds"])
    flops = cost.flops_per_token(recipe) * tokens / median
    full = flops + 6 * recipe.model.num_layers * recipe.model.hidden_size * recipe.data.seq_len * tokens / median
    peak = peak_flops()
    shares = f"{flops / peak:.1%} | {full / peak:.1%}" if peak else "none | none"
    return (
        f"| {result['contender']} | {median:.4g} | {low:.4g}–{high:.4g} | "
        f"{cpu:.4g} | {median / tokens * 1e6:.4g} | {flops / 1e12:.3g} | {shares} | "
        f"{result['peak_bytes'] / 2**30:.2f} | {result['losses'][-1]:.4f} |"
    )


def peak_flops() -> float | None:
    """Dense bf16 peak of the GPU that is here."""
    tera = peak_tflops(torch.cuda.get_device_name()) if CUDA else None
    return tera * 1e12 if tera else None


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """The loss curves, one over the other."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for result in results:
        axes.plot(range(1, len(result["losses"]) + 1), result["losses"], label=result["contender"], linewidth=1)
    axes.set(xlabel="update", ylabel="loss, nats")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def versions() -> str:
    """What ran."""
    from importlib.metadata import version

    device = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} CPU cores, 1 thread"
    found = [name for name in ("torch", "triton", "transformers") if find_spec(name)]
    names = ", ".join(f"{name} {version(name)}" for name in found)
    return f"{device}; Python {platform.python_version()}, {names}"


def main() -> None:
    """Run the contenders, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", help="small, 125m, 1.3b, 6.7b, …")
    parser.add_argument("--batch", type=int, default=4, help="sequences in an update")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (default: 2048, small: 256)")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--plot", type=Path, help="SVG of the loss curves")
    parser.add_argument("--json", type=Path, help="all that was measured")
    parser.add_argument("--limit", type=float, help="seconds for each contender")
    parser.add_argument("--rehearse", action="store_true", help="a few steps of a small model: does it run?")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        vars(options).update(REHEARSAL)
    options.seq_len = options.seq_len or (256 if options.size == "small" else 2048)
    if options.contender:
        print(json.dumps(run_one(options)))
        return
    recipe = recipe_of(options.size, options.batch, options.seq_len)
    results: list[dict[str, Any]] = []
    print(f"{versions()}\n")
    print("| | s, median | quartiles | CPU s, median | µs/token | TFLOP/s | MFU causal | full | peak GiB | last loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for contender in options.only:
        command = [sys.executable, "-m", "benchmarks.train_step", "--contender", contender, "--size", options.size]
        for name in ("batch", "seq_len", "warmup", "steps"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        found = one_of(command, options.limit, rehearse=options.rehearse)
        if isinstance(found, str):
            print(f"| {contender} | {found} |||||||||", flush=True)
            continue
        results.append(found)
        print(row(found, recipe), flush=True)
        if options.json:  # at once: what comes later may not end
            save(options.json, results)
    if options.plot and results:
        plot(results, options.plot)


def one_of(command: list[str], limit: float | None, *, rehearse: bool) -> dict[str, Any] | str:
    """What a contender measured, or why it has measured nothing."""
    instead = {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"} if rehearse and not CUDA else {}
    environment = os.environ | instead
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return f"not measured: more than {limit:g} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}"
    return json.loads(done.stdout.splitlines()[-1])


def save(path: Path, results: list[dict[str, Any]]) -> None:
    """All that was measured so far."""
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(json.dumps({"versions": versions(), "results": results}, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
