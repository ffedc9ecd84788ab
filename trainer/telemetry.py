"""What the run folder says of an attempt: its effective configuration, and one line of measurements per update."""

import hashlib
import json
import math
import platform
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from opt_ops.contract import manifest
from trainer.console import LineFile
from trainer.model.cost import flops_per_token
from trainer.optim import readback
from trainer.parallel.mesh import Layout
from trainer.plan.hardware import peak_tflops
from trainer.recipes import Recipe
from trainer.step.checksums import Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the lineage is: updates applied, index of the sample after the last one trained on, tokens trained on."""

    step: int = 0
    data_position: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What all ranks together measured of one forward and backward pass, and what they heard from outside.

    ``loss_scale`` is that of fp16; the norms are without it. ``block_gnorms`` and ``block_pnorms`` are the norms of the
    gradients and of the parameters by block of the model; the latter are empty in most steps. ``busy_seconds`` is by
    rank, and empty where it is not known; ``checksums`` too, and empty in most steps. ``flip`` is the rank that a drill
    wants a bit flipped on.
    """

    loss: float
    activation_norm: float
    gnorm: float
    loss_scale: float | None = None
    block_gnorms: Mapping[str, float] = field(default_factory=dict)
    block_pnorms: Mapping[str, float] = field(default_factory=dict)
    drill_factor: float = 1.0
    save_requested: bool = False
    snapshot_due: bool = False
    superseded: bool = False
    flip: int | None = None
    busy_seconds: Sequence[float] = ()
    checksums: Sequence[Sequence[float]] = ()

    @property
    def finite(self) -> bool:
        """Whether training can go on: in fp16, gradients that overflow are answered by a lower loss scale."""
        return math.isfinite(self.loss) and (math.isfinite(self.gnorm) or self.loss_scale is not None)

    @property
    def overflow(self) -> bool:
        """Whether fp16's gradients were too large for their format."""
        return self.loss_scale is not None and not math.isfinite(self.gnorm)


@dataclass(slots=True)
class Spent:
    """Seconds that a step gave to something else than training."""

    saving: float = 0.0
    evaluation: float = 0.0
    logging: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of one step.

    Attributes:
        measured: by all ranks.
        progress: after it.
        skipped: updates skipped so far.
        skip: why this one was.
        bad_module: where numbers first ceased to be finite.
        verdict: what a comparison of checksums gave.
        fault: what ends training, with the update not applied.
    """

    measured: Measured
    progress: Progress
    skipped: int = 0
    skip: str | None = None
    bad_module: str | None = None
    verdict: Verdict | None = None
    fault: Exception | None = None


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``: ``config`` and where, when and with which versions it runs."""
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    versions["code"] = code_digest()
    whole = {"v": 1} | dict(config) | {"host": socket.gethostname(), "ts": time.time(), "versions": versions}
    manifest.write_durably(run_dir / "config.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")


def code_digest() -> str:
    """Of this package's sources, twelve hex digits: equal for equal code, wherever it was installed from."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Phases:
    """Writes ``phases.jsonl``: what the attempt is busy with, so that a watcher can tell a slow save from a hang.

    Args:
        path: the file; lines are appended. Without one, nothing is written: all ranks but rank 0.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = LineFile(path) if path else None
        self._current: str | None = None

    def enter(
        self,
        phase: Literal["start", "tokens", "training", "evaluation", "saving", "ending"],
        step: int | None,
        *,
        again: bool = False,
    ) -> None:
        """Say that ``phase`` begins, unless it was said already; ``again``: and that it gets on.

        ``step`` is the last update, None while unknown.
        """
        if self._file and (again or phase != self._current):
            told = self._file.write({"ts": round(time.time(), 6), "phase": phase, "step": step})
            self._current = phase if told else None


class Telemetry:
    """Writes ``telemetry.jsonl`` of one attempt. For rank 0 alone.

    Args:
        path: the file; lines are appended.
        recipe: for the sizes of batch and model.
        layout: for the number of ranks and the device.
        process_start: ``time.monotonic()`` when the process began.
    """

    def __init__(self, path: Path, recipe: Recipe, layout: Layout, process_start: float) -> None:
        self._file = LineFile(path)
        self._sequences = recipe.data.global_batch
        self._tokens = recipe.data.global_batch * recipe.data.seq_len
        self._step_tflop = flops_per_token(recipe) * self._tokens / layout.world / 1e12
        self._peak_tflops = _peak_tflops(layout.device)
        self._cuda = layout.device.type == "cuda"
        self._process_start = process_start
        self._train_start = self._step_start = time.monotonic()

    def record(
        self,
        step: int,
        outcome: Outcome,
        optimizer: torch.optim.Optimizer,
        spent: Spent,
        save_error: str | None,
        valid: Mapping[str, float],
    ) -> dict[str, Any]:
        """Append the line of update ``step`` and return it. Its time runs from the line before, or from the start."""
        now = time.monotonic()
        measured, progress = outcome.measured, outcome.progress
        seconds, self._step_start = now - self._step_start - spent.evaluation, now
        live = readback(optimizer)
        tflops = self._step_tflop / seconds
        line = {
            "ts": round(time.time(), 6),
            "num_updates": step,
            "loss": _finite(measured.loss),
            "ppl": _finite(_exp(measured.loss)),
            "gnorm": _finite(measured.gnorm),
            "clip": 100 if measured.gnorm > live["clip_norm"] else 0,
            "actv_norm": _finite(measured.activation_norm),
            **live,
            "loss_scale": measured.loss_scale,
            "finite": measured.finite,
            "skipped": outcome.skipped,
            "skip": outcome.skip,
            "bad_module": outcome.bad_module,
            "pnorm": math.hypot(*measured.block_pnorms.values()) if measured.block_pnorms else None,
            "blocks": _blocks(measured),
            "bsz": self._sequences,
            "wpb": self._tokens,
            "wps": self._tokens / seconds,
            "ups": 1 / seconds,
            "step_seconds": seconds,
            "busy_seconds": _spread(measured.busy_seconds),
            "save_seconds": spent.saving,
            "eval_seconds": spent.evaluation,
            "log_seconds": spent.logging,
            "save_error": save_error,
            "valid": {name: _finite(loss) for name, loss in valid.items()} or None,
            "checksums": asdict(outcome.verdict) if outcome.verdict else None,
            "train_wall": now - self._train_start,
            "wall": now - self._process_start,
            "tokens": progress.tokens,
            "data_position": progress.data_position,
            "tflops": tflops,
            "mfu": tflops / self._peak_tflops if self._peak_tflops else None,
            "cuda_gb_allocated": self._peak_memory(),
        }
        self._file.write(line)
        return line

    def _peak_memory(self) -> float | None:
        if not self._cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


def _peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def _blocks(measured: Measured) -> dict[str, dict[str, float | None]] | None:
    """The norms by block, in steps that measured both."""
    if not measured.block_pnorms:
        return None
    both = (("gnorm", measured.block_gnorms), ("pnorm", measured.block_pnorms))
    return {name: {block: _finite(norm) for block, norm in norms.items()} for name, norms in both}


def _spread(by_rank: Sequence[float]) -> dict[str, float] | None:
    if not by_rank:
        return None
    most = max(by_rank)
    return {"median": statistics.median(by_rank), "max": most, "rank": by_rank.index(most)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
