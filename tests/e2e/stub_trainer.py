"""Another trainer: a thousand lines shorter, same files. It trains nothing, and misbehaves where `--set` says so.

--set misbehave=WHAT@STEP:ATTEMPT    WHAT: nan, spike, hang, exit-N, die, deaf
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from trainer.manifest import MANIFEST, committed, verify, write_durably

SCHEDULE = {"peak_lr": 1e-3, "warmup_steps": 10, "total_steps": 0, "final_fraction": 0.1}
OPTIMIZER = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


def lr_at(step: int, schedule: dict, factors: list[tuple[int, float]]) -> float:
    warmup, total = schedule["warmup_steps"], schedule["total_steps"]
    lr = schedule["peak_lr"] * min(step / warmup, 1 - 0.9 * max(0, step - warmup) / (total - warmup))
    return lr * math.prod(factor for start, factor in factors if start < step)


def save(folder: Path, step: int, attempt: str, line: dict) -> None:
    path = folder / f"step-{step:08d}"
    if (path / "COMMITTED").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    content = f"weights of step {step}".encode() * 100
    (path / "__0_0.distcp").write_bytes(content)
    files = {"__0_0.distcp": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {
        "v": 1,
        "step": step,
        "attempt": attempt,
        "ts": time.time(),
        "layout": {"world": 1, "dp": 1, "tp": 1},
        "data_position": step,
        "tokens": step,
        "settings_digest": "sha256:0",
        "telemetry": line,
        "files": files,
    }
    write_durably(path / MANIFEST, json.dumps(manifest))
    digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    write_durably(path / "COMMITTED", digest + "\n")


def telemetry(step: int, lr: float, loss: float | None, seconds: float) -> dict:
    return {
        "ts": time.time(),
        "num_updates": step,
        "loss": loss,
        "gnorm": 0.3,
        "lr": lr,
        "betas": OPTIMIZER["betas"],
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "finite": loss is not None,
        "skipped": 0,
        "step_seconds": seconds,
        "tokens": step * 1024,
        "wps": 1024 / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--recipe", "--run-dir", "--checkpoint-dir", "--resume", "--attempt", "--tokenizer"):
        parser.add_argument(name)
    for name in ("--set", "--lr-factor", "--data"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--from-scratch", action="store_true")
    options = parser.parse_args()
    values = dict(pair.split("=", 1) for pair in options.set)
    steps, pause = int(values.get("steps", 100)), float(values.get("pause", 0.02))
    faults = [fault.replace("@", ":").split(":") for fault in values.get("misbehave", "").split(",") if fault]
    factors = [(int(step), float(factor)) for step, _, factor in (each.partition(":") for each in options.lr_factor)]
    run_dir, checkpoints = Path(options.run_dir), Path(options.checkpoint_dir)
    rank = int(os.environ["RANK"])
    first = 1
    if options.resume:
        first = verify(Path(options.resume)).step + 1
    elif committed(checkpoints) and not options.from_scratch:
        return 65
    schedule = {**SCHEDULE, "total_steps": steps}
    print(f"rank {rank} starts at step {first}", flush=True)
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        config = {
            "v": 1,
            "steps": steps,
            "schedule": schedule,
            "optimizer": OPTIMIZER,
            "versions": {"stub": "1"},
            "layout": {},
        }
        write_durably(run_dir / "config.json", json.dumps(config))
    for step in range(first, steps + 1):
        time.sleep(pause)
        loss: float | None = 3.0 + 3.0 / step
        for what, at, attempt in faults:
            if attempt != options.attempt or step < int(at):
                continue
            if what == "spike":
                loss = 9.0
            elif what == "nan":
                loss = None
            elif what == "hang":
                time.sleep(600)
            elif what == "deaf":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            elif rank != 1:
                time.sleep(600)  # in a collective that the lost rank never joins
            elif what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                return int(what.removeprefix("exit-"))
        if rank != 0:
            continue
        line = telemetry(step, lr_at(step, schedule, factors), loss, pause)
        with (run_dir / "telemetry.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
        if loss is None:
            return 82
        if step % 10 == 0 or step == steps:
            save(checkpoints, step, options.attempt, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
