"""The parts of ``benchmarks/gpu_all.sh``: each is a process, answers one question, and writes one row.

    python -m benchmarks.gpu_parts attention --folder gpu-results [--rehearse]

A part whose package is missing says so in its row, and the next part runs. Most parts start processes of their own, so
this module imports the trainer only where it runs in this process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Self

import torch

HEAD = "| # | question | answer | seconds |\n| ---: | --- | --- | ---: |\n"
QUESTIONS = {
    "start": "does the trainer start, and agree with Hugging Face?",
    "tests": "do the GPU tests of kernels and trainer pass?",
    "ops": "each op beside its reference, compiled and eager, and Liger's kernel",
    "race-1.3b": "an update of 1.3B",
    "race-6.7b": "an update of 6.7B",
    "race-125m": "an update of 125M",
    "saves": "stall of a save, strangers on the GPU, a resume to the last bit",
    "attention": "attention by kernel and head size, forward and backward",
    "fp16": "loss scale over 50 updates in fp16",
    "busy": "are the busy times of a rank plausible?",
    "profile": "where a step of 1.3B spends its time",
    "fairscale": "does fairscale's FSDP run, and what does NVML tell?",
}


FAIRSCALE = "tests/trainer/test_engine_fairscale_gpu.py"


class Part:
    """What a part gets, and where it writes its numbers.

    Attributes:
        rehearse: whether sizes are tiny.
        ends: by ``time.monotonic``, when the part must have answered.
        details: all numbers; they go to details.jsonl.
        folder: of the results.
    """

    def __init__(self, *, rehearse: bool, limit: float, folder: Path) -> None:
        self.rehearse, self.folder = rehearse, folder
        self.ends = time.monotonic() + limit - 3
        self.details: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.ends - time.monotonic())


def start(part: Part) -> str:
    """Twenty bf16 steps of 125M, eager and compiled; the first loss beside Hugging Face's; which attention ran."""
    from benchmarks.gpu_measure import eager_and_compiled

    found = part.details
    found |= eager_and_compiled(rehearse=part.rehearse)
    losses = "; ".join(f"{name} {found[name][0]:.4f} → {found[name][-1]:.4f}" for name in ("eager", "compiled"))
    theirs = found["hugging_face"]
    theirs = f"{theirs:.4f}" if isinstance(theirs, float) else theirs
    kernels = ", ".join(found["attention"][:3]) or "none found"
    return f"loss {losses}; before training {found['evaluated']:.4f}, Hugging Face {theirs}; attention: {kernels}"


def tests(part: Part) -> str:
    """``pytest -m gpu tests/kernels tests/trainer``. The last part has the test of fairscale's FSDP."""
    return _pytest(part, "tests/kernels", "tests/trainer", f"--ignore={FAIRSCALE}")


def ops(part: Part) -> str:
    """Worst error, times and GB/s of each op, with the file for ``python -m trainer.kernels record``."""
    from benchmarks.gpu_ops import compare_ops

    part.details["ops"] = rows = []
    records: list[dict[str, Any]] = []
    for row in compare_ops(rehearse=part.rehearse, left=part.left):
        rows.append(row)
        if not part.rehearse and row["ratio"]:  # at once: the next op may not end
            records.append({key: value for key, value in row.items() if key not in ("text", "microseconds")})
            _write(part.folder / "records.json", json.dumps(records, indent=1) + "\n")
    return "; ".join(row["text"] for row in rows)


def race(part: Part, size: str, batch: int) -> str:
    """``benchmarks.train_step``: one contender after the other, as far as the time goes."""
    texts, contenders = [], ("ours", "ours+kernels", "P3", "P2", "P1")
    for contender in contenders if not part.rehearse or size == "1.3b" else contenders[:1]:
        if part.left() < 5:
            texts.append(f"{contender}: not measured, no time left")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            command = ["-m", "benchmarks.train_step", "--only", contender, "--json", str(path)]
            command += ["--size", size, "--batch", str(batch), "--warmup", "3", "--steps", "10"]
            command += ["--rehearse"] if part.rehearse else []
            output = _python([*command, "--limit", f"{part.left():.0f}"], part.left() + 2)
            last = (output.strip().splitlines() or ["no output"])[-1][-200:]
            row = next((line for line in output.splitlines() if line.startswith(f"| {contender} |")), last)
            cells = [cell.strip() for cell in row.strip("| ").split("|")]
            if path.exists():
                part.details[contender] = json.loads(path.read_text())["results"]
                texts.append(f"{contender} {cells[4]} µs/token, MFU {cells[6]} / {cells[7]}, {cells[8]} GiB")
            else:
                texts.append(f"{contender}: {cells[-1]}")
    return "; ".join(texts)


def saves(part: Part) -> str:
    """Save while training, look for strangers on the GPU meanwhile, resume, and compare the last steps bit by bit."""
    with tempfile.TemporaryDirectory() as name, _Strangers() as strangers:
        folder = Path(name)
        common = ("steps=6", "checkpoint_every=3", "deterministic=true")
        whole = _train(part, folder, "a1", *common)
        again = _train(part, folder, "a2", *common, resume=folder / "checkpoints" / "step-00000003")
    stalls = [line["save_seconds"] for line in whole if "save_seconds" in line]
    keys = ("num_updates", "loss", "gnorm")
    same = [[line[key] for key in keys] for line in whole[-3:]] == [[line[key] for key in keys] for line in again]
    part.details |= {"stalls": stalls, "processes": strangers.most, "whole": whole, "again": again}
    bits = "equal to the last bit" if same else "NOT equal"
    longest = f"{max(stalls):.3f}" if stalls else "not told"
    return f"longest stall {longest} s; processes on GPU 0: {strangers.most}; resumed steps {bits}"


def attention(part: Part) -> str:
    """TFLOP/s by head size and kernel."""
    from benchmarks.gpu_measure import attention_rates

    part.details["rates"] = rates = attention_rates(rehearse=part.rehearse, left=part.left)
    return "; ".join(f"{name}: {rate}" for name, rate in rates.items())


def fp16(part: Part) -> str:
    """The loss scale of 50 updates."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 4 if part.rehearse else 50
        precision = "fp32" if part.rehearse and not torch.cuda.is_available() else "fp16"
        lines = _train(part, Path(folder), "a1", f"steps={steps}", f"precision={precision}", "checkpoint_every=1000")
    scales = [line.get("loss_scale") for line in lines]
    part.details |= {"scales": scales, "losses": [line["loss"] for line in lines]}
    skipped = lines[-1].get("skipped", 0)
    return f"{len(lines)} updates, {skipped} skipped; scale {scales[0]} → {scales[-1]}; loss {lines[-1]['loss']:.3f}"


def busy(part: Part) -> str:
    """What the layers' marks tell of a step, with the GPU idle before each layer and without."""
    from benchmarks.gpu_measure import busy_times

    part.details |= (found := busy_times(rehearse=part.rehearse))
    texts = {
        name: f"{of_layers:.1f} ms of layers, {forward:.1f} of forward pass, {step:.1f} of step"
        for name, (of_layers, forward, step) in found.items()
    }
    nested = all(0 < of_layers <= forward <= step for of_layers, forward, step in found.values())
    verdict = "layers < forward pass < step" if nested else "NOT plausible: layers < forward pass < step must hold"
    counted, *_, more = (waiting - plain for plain, waiting in zip(found["plain"], found["waiting"], strict=True))
    waits = f"of {more:+.1f} ms the layers count {counted:+.1f}, and 0 is right"
    return f"{texts['plain']}; with the GPU idle before each layer {texts['waiting']}: {waits}; {verdict}"


def profile(part: Part) -> str:
    """Shares of the kernels of one step, and of the time in which none ran."""
    from benchmarks.gpu_measure import profile_of_a_step

    part.details |= profile_of_a_step(rehearse=part.rehearse)
    shares = ", ".join(f"{name[:40]} {share:.0%}" for name, share in part.details["shares"][:6])
    return f"{shares}; no kernel ran in {part.details['idle']:.0%}"


def fairscale(part: Part) -> str:
    """The GPU test of the second engine, and what NVML reports here."""
    missing = None if find_spec("fairscale") else "fairscale is not installed"
    engine = missing or _pytest(part, FAIRSCALE)
    if find_spec("pynvml") is None:
        return f"FSDP: {engine}; NVML: nvidia-ml-py is not installed"
    from opt_ops.node.nvml import GpuReader

    part.details["nvml"] = reading = GpuReader().read()
    gpus = reading.get("gpus") or []
    none = sorted(name for name, value in gpus[0].items() if value is None) if gpus else []
    told = f"{len(gpus[0]) - len(none)} fields, none for {', '.join(none) or 'no field'}" if gpus else str(reading)[:80]
    return f"FSDP: {engine}; NVML: {told}"


PARTS: dict[str, Callable[[Part], str]] = {
    "start": start,
    "tests": tests,
    "ops": ops,
    "race-1.3b": lambda part: race(part, "1.3b", 8),
    "race-6.7b": lambda part: race(part, "6.7b", 4),
    "race-125m": lambda part: race(part, "125m", 16),
    "saves": saves,
    "attention": attention,
    "fp16": fp16,
    "busy": busy,
    "profile": profile,
    "fairscale": fairscale,
}


def _python(arguments: Sequence[str], limit: float) -> str:
    """What ``python`` prints with these arguments, both streams; last, that the time was over if it was."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(1, limit)
        )
    except subprocess.TimeoutExpired as error:
        output = (error.output or b"").decode(errors="replace") + f"\nnot measured: more than {limit:.0f} s"
    else:
        output = done.stdout
    print(output)
    return output


def _pytest(part: Part, *arguments: str) -> str:
    """The last line that pytest prints: how many tests passed."""
    if find_spec("pytest") is None:
        return "pytest is not installed"
    without = ["-W", "default", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    output = _python(["-m", "pytest", "-q", "-m", "gpu", *without, *arguments], part.left())
    part.details["pytest"] = output[-4000:]
    *before, last = output.strip().splitlines() or ["no output"]
    so_far = f" (so far {before[-1][-60:]})" if before and last.startswith("not measured") else ""
    return last.strip("= ") + so_far


def _train(part: Part, folder: Path, name: str, *settings: str, resume: Path | None = None) -> list[dict[str, Any]]:
    """The updates in the telemetry of ``python -m trainer``, of 125M or, in a rehearsal, of opt-tiny."""
    data = folder / "topics.jsonl"
    data.write_text("".join(json.dumps({"text": topics[key]}) + "\n" for key in sorted(topics)))
    size = ("data.global_batch=4", "data.micro_batch=4", "log_every=1", "optim.warmup_steps=20")
    size += ("model.num_layers=2",) if part.rehearse else ("model.vocab_size=8192", "data.global_batch=16")
    arguments = ["-m", "trainer", "--recipe", "opt-tiny" if part.rehearse else "opt-125m", "--data", str(data)]
    arguments += ["--run-dir", str(folder / name), "--checkpoint-dir", str(folder / "checkpoints")]
    arguments += [word for pair in (*size, *settings) for word in ("--set", pair)]
    arguments += ["--resume", str(resume)] if resume else []
    output = _python(arguments, part.left())
    telemetry = folder / name / "telemetry.jsonl"
    if not telemetry.exists():
        raise RuntimeError((output.strip().splitlines() or ["the trainer printed nothing"])[-1])
    lines = map(json.loads, telemetry.read_text().splitlines())
    return [line for line in lines if "loss" in line]


class _Strangers:
    """Counts the processes on GPU 0 every half second: a trainer is one; more are strangers."""

    def __enter__(self) -> Self:
        self.most: int | str = 0 if torch.cuda.is_available() else "no GPU"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        query = ["nvidia-smi", "-i", "0", "--query-compute-apps=pid", "--format=csv,noheader"]
        while isinstance(self.most, int) and not self._end.wait(0.5):
            try:
                done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=5)
            except (OSError, subprocess.TimeoutExpired) as error:
                self.most = f"nvidia-smi: {error}"
                return
            self.most = max(self.most, len(done.stdout.split()))


def head(part: Part) -> None:
    """Begin the table, and say what ran."""
    from benchmarks.train_step import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True)
    missing = [
        name
        for name in ("triton", "transformers", "liger_kernel", "fairscale", "pytest", "pynvml")
        if find_spec(name) is None
    ]
    lines = [f"{time.strftime('%Y-%m-%d')}; {versions()}; commit {commit.stdout.strip() or 'unknown'}."]
    if missing:
        lines.append(f"Not installed here: {', '.join(missing)}.")
    if part.rehearse:
        lines.append("**A rehearsal with tiny models. The numbers mean nothing.**")
    _write(part.folder / "rows.md", "\n".join(lines) + "\n\n" + HEAD)
    print("\n".join(lines), flush=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.new")
    partial.write_text(text)
    partial.replace(path)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("head", *PARTS))
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--limit", type=float, default=100.0, help="seconds")
    parser.add_argument("--folder", type=Path, default=Path("gpu-results"))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, also without a GPU")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    part = Part(rehearse=options.rehearse, limit=options.limit, folder=options.folder)
    if options.part == "head":
        head(part)
        return
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU is here: only --rehearse works")
    began = time.monotonic()
    answer = PARTS[options.part](part).replace("|", "/").replace("\n", " ")
    seconds = time.monotonic() - began
    row = {"part": options.part, "seconds": seconds, "answer": answer, "details": part.details}
    _append(options.folder / "details.jsonl", json.dumps(row, default=str) + "\n")
    _append(
        options.folder / "rows.md", f"| {options.number} | {QUESTIONS[options.part]} | {answer} | {seconds:.0f} |\n"
    )


if __name__ == "__main__":
    main()
