"""What a trainer writes into the folder of an attempt: its configuration, its phases, one line per update."""

import json
import math
import platform
import socket
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from opt_ops.contract.fence import Fence
from opt_ops.contract.files import write_durably
from opt_ops.contract.telemetry import BusyFields, ChecksumFields, LineFile, TelemetryLine, cut_torn_line
from trainer.kernels import jit
from trainer.model.cost import flops_per_token
from trainer.optim import readback
from trainer.parallel.mesh import Layout
from trainer.plan.hardware import peak_tflops
from trainer.recipes import Recipe
from trainer.sources import running_code
from trainer.step.checksums import ChecksumVerdict
from trainer.step.measured import StepMeasurements, StepOutcome


@dataclass(slots=True)
class StepOverheads:
    """Seconds of a step that were not spent on training."""

    saving: float = 0.0
    evaluation: float = 0.0
    logging: float = 0.0


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json``: ``config``, and where, when and with which versions the attempt runs.

    Raises:
        OSError: the file cannot be written.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "numpy", "tokenizers", "safetensors")}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    if jit.triton:
        versions["triton"] = jit.triton.__version__
    versions["code"] = running_code()
    whole = {"v": 1} | dict(config) | {"host": socket.gethostname(), "ts": time.time(), "versions": versions}
    write_durably(run_dir / "config.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")


class Telemetry:
    """Makes and writes the lines of ``telemetry.jsonl``. Used by rank 0 only.

    Where ranks can be replaced, a line waits until its step is confirmed: until then the step may be made again. The
    newest lines travel with the copy of rank 0, so that its replacement can write those that are missing.

    Args:
        path: the file. Lines are appended.
        recipe: for the sizes of batch and model.
        layout: for the number of ranks and the device.
        process_start: ``time.monotonic()`` when the process began.
        fence: where lines wait: it is read before a confirmed line is written.
    """

    def __init__(
        self, path: Path, recipe: Recipe, layout: Layout, process_start: float, fence: Fence | None = None
    ) -> None:
        self._fence = fence
        last = cut_torn_line(path) if fence else b""
        self._written = json.loads(last)["num_updates"] if last else 0  # the newest step in the file
        self._file = LineFile(path)
        self._lock = threading.Lock()  # another thread confirms
        self._waiting: list[TelemetryLine] = []
        self._newest: list[TelemetryLine] = []  # since the last copy, and between that and the one before
        self._before: list[TelemetryLine] = []
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
        outcome: StepOutcome,
        optimizer: torch.optim.Optimizer,
        overheads: StepOverheads,
        save_error: str | None,
        valid: Mapping[str, float],
    ) -> TelemetryLine:
        """Append the line of update ``step``, or let it wait. A step lasts from the line before it, or from the start.

        The settings are read back from ``optimizer``. ``save_error`` is why a save has failed since the line before.
        ``valid`` has the losses on validation data, by corpus.
        """
        now = time.monotonic()
        measured, progress = outcome.measured, outcome.progress
        seconds, self._step_start = now - self._step_start - overheads.evaluation, now
        live = readback(optimizer)
        tflops = self._step_tflop / seconds
        line: TelemetryLine = {
            "ts": round(time.time(), 6),
            "num_updates": step,
            "loss": _finite(measured.loss),
            "ppl": _finite(_exp(measured.loss)),
            "gnorm": _finite(measured.gnorm),
            "clip": 100 if measured.gnorm > live["clip_norm"] else 0,
            "actv_norm": _finite(measured.activation_norm),
            **live,
            "base_lr": None,
            "loss_scale": measured.loss_scale,
            "finite": measured.finite,
            "skipped": outcome.skipped,
            "skip": outcome.skip,
            "bad_module": outcome.bad_module,
            "pnorm": math.hypot(*measured.block_pnorms.values()) if measured.block_pnorms else None,
            "blocks": _blocks(measured),
            "attn_logit_max": _logits(measured.attention_logits),
            "stage": None,
            "bsz": self._sequences,
            "wpb": self._tokens,
            "wps": self._tokens / seconds,
            "ups": 1 / seconds,
            "step_seconds": seconds,
            "busy_seconds": _spread(measured.busy_seconds),
            "save_seconds": overheads.saving,
            "eval_seconds": overheads.evaluation,
            "log_seconds": overheads.logging,
            "save_error": save_error,
            "valid": {name: _finite(loss) for name, loss in valid.items()} or None,
            "checksums": _checksums(outcome.verdict) if outcome.verdict else None,
            "train_wall": now - self._train_start,
            "wall": now - self._process_start,
            "tokens": progress.tokens,
            "data_position": progress.data_position,
            "tflops": tflops,
            "mfu": tflops / self._peak_tflops if self._peak_tflops else None,
            "cuda_gb_allocated": self._peak_memory(),
        }
        if not self._fence:
            self._file.write(line)
            return line
        with self._lock:
            self._waiting.append(line)
            self._newest.append(line)
        return line

    def confirm(self, step: float) -> None:
        """Append the lines up to ``step``, which is confirmed. Any thread may call this.

        Raises:
            SupersededError, OutdatedError: a newer attempt, or a newer generation of this one, writes the file.
        """
        with self._lock:
            due = [line for line in self._waiting if line["num_updates"] <= step]
            if due and self._fence:  # without a fence no line waits
                self._fence.check()
                self._append(due)
                self._waiting = self._waiting[len(due) :]

    def append_waiting(self) -> None:
        """Append the lines that wait, because training ends with an error and nobody will make their steps again.

        Raises:
            SupersededError, OutdatedError: as :meth:`confirm`.
        """
        self.confirm(math.inf)

    def for_copy(self) -> list[TelemetryLine]:
        """The lines that go with the next copy: since the one before the last."""
        with self._lock:
            lines = self._before + self._newest
            self._before, self._newest = self._newest, []
        return lines

    def go_on(self, lines: Sequence[TelemetryLine], generation: int) -> None:
        """Go on after the last of ``lines``, which came with a copy that all ranks hold. Append those that are missing.

        Args:
            lines: the newest ones up to the common step.
            generation: of the members.
        """
        assert self._fence is not None
        with self._lock:
            self._fence.generation = generation
            self._waiting, self._newest, self._before = [], [], list(lines)
            self._append(lines)
        self._step_start = time.monotonic()  # no step lasts longer because ranks were replaced
        if lines:
            self._train_start = self._step_start - lines[-1].get("train_wall", 0.0) - (time.time() - lines[-1]["ts"])

    def _append(self, lines: Sequence[TelemetryLine]) -> None:
        for line in lines:
            if line["num_updates"] > self._written:
                self._file.write(line)
                self._written = line["num_updates"]

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


def _blocks(measured: StepMeasurements) -> dict[str, dict[str, float | None]] | None:
    """The norms by block, in steps that measured parameters, too. There is no ``unorm`` without an update before it."""
    if not measured.block_pnorms:
        return None
    kinds = {"gnorm": measured.block_gnorms, "pnorm": measured.block_pnorms, "unorm": measured.block_unorms}
    return {name: {block: _finite(norm) for block, norm in norms.items()} for name, norms in kinds.items() if norms}


def _logits(by_layer: Sequence[float]) -> Sequence[float] | None:
    return by_layer if by_layer and all(map(math.isfinite, by_layer)) else None


def _spread(by_rank: Sequence[float]) -> BusyFields | None:
    if not by_rank:
        return None
    most = max(by_rank)
    return {"median": statistics.median(by_rank), "max": most, "rank": by_rank.index(most)}


def _checksums(verdict: ChecksumVerdict) -> ChecksumFields:
    return {"ranks": verdict.ranks, "certain": verdict.certain, "what": verdict.what}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
