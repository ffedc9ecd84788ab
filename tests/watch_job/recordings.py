"""Logs as the trainers print them, written by what their print statements say, not by our parsers' patterns."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Update:
    """What a made-up training does in one update."""

    step: int
    loss: float
    gnorm: float
    lr: float
    at: float


def updates(
    last: int, *, first: int = 1, every: int = 1, diverges: int | None = None, nan: int | None = None, seed: int = 1
) -> Iterator[Update]:
    """A loss that falls from 10 to 3 with noise of 0.03, and after `diverges` rises by 0.02 a step."""
    noise = random.Random(seed)
    for step in range(first, last + 1, every):
        loss = 3 + 7 * math.exp(-step / 60) + noise.gauss(0, 0.03)
        if diverges is not None and step > diverges:
            loss += 0.02 * (step - diverges)
        if nan is not None and step >= nan:
            loss = math.nan
        gnorm = 0.8 + abs(noise.gauss(0, 0.05))
        yield Update(step, loss, gnorm, 6e-4 * min(1.0, step / 20), 1_788_059_000.0 + 0.8 * step)


def _clock(at: float, style: str) -> str:
    return datetime.fromtimestamp(at).strftime(style)  # noqa: DTZ006 - trainers print local time


def transformers5(u: Update) -> str:
    logs = {"loss": u.loss, "grad_norm": u.gnorm, "learning_rate": u.lr, "epoch": u.step / 800}
    return str({name: f"{value:.4g}" for name, value in logs.items()}) + "\n" + _hf_bar(u)


def transformers4(u: Update) -> str:
    logs = {"loss": round(u.loss, 4), "grad_norm": u.gnorm, "learning_rate": u.lr, "epoch": round(u.step / 800, 2)}
    return "\r" + " " * 46 + "\r" + str(logs) + "\n" + _hf_bar(u)


def _hf_bar(u: Update) -> str:
    full = 10 * u.step // 1000
    passed = int(0.25 * u.step)
    clock = f"{passed // 60:02d}:{passed % 60:02d}"
    return f"\r {u.step // 10:2d}%|{'█' * full}{' ' * (10 - full)}| {u.step}/1000 [{clock}<03:40,  4.00it/s]"


def megatron(u: Update, stamp: bool = True, seconds: bool = False, nan_hidden: bool = True) -> str:
    line = f" [{datetime.fromtimestamp(u.at)}]" if stamp else ""  # noqa: DTZ006
    line += f" iteration {u.step:8d}/{10000:8d} |"
    line += f" consumed samples: {u.step * 512:12d} |"
    line += " elapsed time per iteration (s): 0.81 |" if seconds else " elapsed time per iteration (ms): 812.4 |"
    line += "" if seconds else " throughput per GPU (TFLOP/s/GPU): 402.1 |"
    line += f" learning rate: {u.lr:.6E} |"
    line += f" global batch size: {512:5d} |"
    if not math.isnan(u.loss) or not nan_hidden:
        line += f" lm loss: {u.loss:.6E} |"
    line += f" loss scale: {1.0:.1f} |"
    line += f" grad norm: {u.gnorm:.3f} |"
    line += f" number of skipped iterations: {0:3d} |"
    line += f" number of nan iterations: {int(math.isnan(u.loss)):3d} |"
    return line + "\n"


def deepspeed(u: Update) -> str:
    return megatron(u, stamp=False, seconds=True)


def titan(u: Update) -> str:
    red, green, orange, turquoise, blue, cyan, reset = (
        f"\x1b[{code}m" for code in ("31", "32", "38;5;208", "36", "34", "36", "39")
    )
    return (
        f"[titan] {_clock(u.at, '%Y-%m-%d %H:%M:%S')},{int(1000 * (u.at % 1)):03d} - root - INFO - "
        f"{red}step: {u.step:2}  {green}loss: {u.loss:8.5f}  {orange}grad_norm: {u.gnorm:7.4f}  "
        f"{turquoise}memory: {40.11:5.2f}GiB({50.6:.2f}%)  {blue}tps: {4012:,}  {cyan}tflops: {240.12:,.2f}  "
        f"mfu: {24.28:.2f}%{reset}\n"
    )


def lightning(u: Update) -> str:
    epoch, n = divmod(u.step - 1, 200)
    n += 1
    bar = f"\rEpoch {epoch}: {n // 2:3d}%|{'█' * (n // 20):10}| {n}/200 [00:{n // 4:02d}<00:30,  4.00it/s, v_num=3"
    return f"{bar}, train_loss={u.loss + 0.01:.3g}]{bar}, train_loss={u.loss:#.4g}]"


def nanogpt(u: Update) -> str:
    line = f"iter {u.step}: loss {u.loss:.4f}, time {812.41:.2f}ms, mfu {25.62:.2f}%\n"
    if u.step % 250 == 0:
        line += f"step {u.step}: train loss {u.loss - 0.5:.4f}, val loss {u.loss + 9:.4f}\n"
    return line


def nanochat(u: Update) -> str:
    return (
        f"step {u.step:05d}/{5000:05d} ({u.step / 50:.2f}%) | loss: {u.loss:.6f} | lrm: {1.0:.2f} | "
        f"dt: {812.41:.2f}ms | tok/sec: {645331:,} | bf16_mfu: {41.2:.2f} | epoch: 1 pq: 3 rg: 8 | "
        f"total time: {u.step / 60:.2f}m | eta: 66.1m\n"
    )


def picotron(u: Update) -> str:
    return (
        f"[rank 0] Step: {u.step:<5d} | Loss: {u.loss:6.4f} | Global batch size:   1.05M | Tokens/s:  98.21K | "
        f"Tokens/s/GPU:  12.28K | Tokens: {u.step / 1000:.2f}M | MFU: 41.00% | Memory usage:  40.11GB\n"
    )


def nanotron(u: Update) -> str:
    loss = f"{float(f'{u.loss:.3g}'):g}"
    return (
        f"08/30/2026 {_clock(u.at, '%H:%M:%S')} [INFO|DP=0|PP=0|TP=0]: iteration: {u.step} / 10000 | "
        f"consumed_tokens: {u.step / 2:.3g}M | time_per_iteration_ms: 812 | tokens_per_sec: 645K | "
        f"global_batch_size: 512 | lm_loss: {loss} | lr: {u.lr:.3g} | "
        f"model_tflops_per_gpu: 240 | grad_norm: {u.gnorm:.3g}\n"
    )


def olmo(u: Update) -> str:
    return (
        f"{_clock(u.at, '%Y-%m-%d %H:%M:%S')}.000\tnode1:0\tolmo_core.train:210\tINFO\t"
        f"[step={u.step:,}/10,000,epoch=1,eta=1h02m]\n"
        f"    optim/LR (group 0)={u.lr:.3E}\n    optim/total grad norm={u.gnorm:.4f}\n"
        f"    throughput/device/TPS=4,012\n    train/CE loss={u.loss:.4g}\n    train/PPL=30.12\n"
    )


def metaseq(u: Update) -> str:
    record = {
        "epoch": 1, "actv_norm": "9.1", "loss": f"{u.loss / math.log(2):.3f}", "ppl": "30.1", "wps": "98211",
        "ups": "1.23", "wpb": "2.09715e+06", "bsz": "1024", "num_updates": str(u.step), "lr": f"{u.lr:.6g}",
        "gnorm": f"{u.gnorm:.3f}", "clip": "0", "loss_scale": "4", "train_wall": "1", "wall": str(u.step),
    }  # fmt: skip
    return f"{_clock(u.at, '%Y-%m-%d %H:%M:%S')} | INFO | train_inner | {json.dumps(record)}\n"


WRITERS: Mapping[str, tuple[str, Callable[[Update], str]]] = {
    "transformers 5": ("transformers", transformers5),
    "transformers 4": ("transformers", transformers4),
    "Megatron-LM": ("Megatron-LM", megatron),
    "Megatron-DeepSpeed": ("Megatron-LM", deepspeed),
    "torchtitan": ("torchtitan", titan),
    "Lightning": ("Lightning", lightning),
    "nanoGPT": ("nanoGPT", nanogpt),
    "nanochat": ("nanochat", nanochat),
    "picotron": ("picotron", picotron),
    "nanotron": ("nanotron", nanotron),
    "OLMo-core": ("OLMo-core", olmo),
    "metaseq": ("metaseq", metaseq),
}
"""Each trainer, with the format that its lines must be recognised as."""

PREAMBLE = (
    "Loading libcudnn.so.9\nNCCL INFO Bootstrap : Using eth0:10.0.0.1<0>\n"
    "Map:  12%|█▏        | 120/1000 [00:30<03:40,  4.00 examples/s]\r"
    "number of parameters: 123.59M\nstep size of the schedule: 3, loss function: cross entropy\n"
)


def recording(name: str, **shape: object) -> str:
    """The log of a training, with what programs print before it."""
    return PREAMBLE + "".join(map(WRITERS[name][1], updates(**shape)))  # type: ignore[arg-type]
