"""A stub trainer: it keeps the promises of a trainer, trains one number, and misbehaves as `--set` says.

--set misbehave=WHAT@STEP:ATTEMPT    WHAT: see `misbehave`; the attempt may be `*`
--set evaluate=N                     an evaluation every N steps, which says in which phase it is, and nothing else
--set schedule=WHAT                  linear, cosine, or greedy: of a kind that opt-ops does not compute
--set shard=FIRST:LAST           the loss of these batches is 9; --skip-batches leaves batches out
--set odd=N                          every N-th line of telemetry is not what docs/formats.md says, each in another way

A file `fault` in the attempt's folder with a WHAT in it does the same from the next step on, for all ranks the same.
While there is a file `hold` in the lineage's folder, nobody resumes; while there is a file `slow`, a step takes half a
second.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opt_ops.contract.drills import DrillFile
from opt_ops.contract.fence import Fence, SupersededError
from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import MANIFEST, CheckpointError, committed, verify
from opt_ops.contract.schedule import lr_of
from opt_ops.contract.skip_windows import batch_of

SCHEDULE = {"peak_lr": 1e-3, "warmup_steps": 10, "total_steps": 10_000, "final_fraction": 0.1}
SCHEDULES = {"linear": SCHEDULE, "cosine": {**SCHEDULE, "kind": "cosine", "delay": 1}, "greedy": {"kind": "greedy"}}
OPTIMIZER = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


def lr_at(step: int, schedule: dict, factors: list[tuple[int, float]]) -> dict[str, float]:
    """The learning rate of an update; of `greedy`, which nobody can compute, also what it gave by itself."""
    lr = lr_of(schedule, factors, step)
    if lr is not None:
        return {"lr": lr}
    base = 1e-3 / math.sqrt(step)
    return {"lr": base * math.prod(factor for start, factor in factors if start < step), "base_lr": base}


KEYS = {"steps", "checkpoint_every", "every", "pause", "misbehave", "evaluate", "shard", "odd", "schedule"}
NO_FENCE = Fence(None, "")


def trained(number: float, batch: int, lr: float) -> tuple[float, float]:
    """The loss of a batch, and the number after its update. Both differ from 3 and 0 too little for any detector."""
    return 3.0 + 1e-9 * (math.sin(batch) + number), 0.9 * number + 1000.0 * lr * (1.0 + 0.5 * math.sin(batch))


def number_in(path: Path) -> float:
    """The number that a checkpoint holds."""
    return float((path / "__0_0.distcp").read_text().splitlines()[0].partition(": ")[2])


def save(
    folder: Path, step: int, attempt: str, line: dict, faults: list[str], number: float = 0.0, fence: Fence = NO_FENCE
) -> None:
    """A checkpoint; `torn`: the process dies in it; `rot`: the disk returns another byte than was written."""
    path = folder / f"step-{step:08d}"
    if (path / "COMMITTED").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    content = f"weights of step {step}: {number!r}\n".encode() * 100
    (path / "__0_0.distcp").write_bytes(content[:-1] + b"!" if "rot" in faults else content)
    if "torn" in faults:
        os.kill(os.getpid(), signal.SIGKILL)
    files = {"__0_0.distcp": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {
        "v": 1,
        "step": step,
        "attempt": attempt,
        "ts": time.time(),
        "layout": {"world": 1, "dp": 1, "tp": 1},
        "data_position": line.get("data_position", step),
        "tokens": step,
        "settings_digest": "sha256:0",
        "telemetry": line,
        "files": files,
    }
    write_durably(path / MANIFEST, json.dumps(manifest))
    fence.check()
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
        "bsz": 8,
        "wpb": 1024,
        "tokens": step * 1024,
        "wps": 1024 / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    paths = ("--run-dir", "--checkpoint-dir", "--resume", "--tokenizer", "--fence", "--init-from")
    for name in ("--recipe", "--attempt", *paths):
        parser.add_argument(name)
    for name in ("--set", "--lr-factor", "--data", "--valid", "--skip-batches"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--from-scratch", action="store_true")
    options = parser.parse_args()
    values = dict(pair.split("=", 1) for pair in options.set)
    if options.run_dir is None or any(key not in KEYS and not key.startswith("optim.") for key in values):
        return 78
    steps, pause = int(values.get("steps", 100)), float(values.get("pause", 0.02))
    every = int(values.get("checkpoint_every", values.get("every", 10)))
    faults = [fault.replace("@", ":").split(":") for fault in values.get("misbehave", "").split(",") if fault]
    factors = [(int(step), float(factor)) for step, _, factor in (each.partition(":") for each in options.lr_factor)]
    shard = tuple(int(each) for each in values.get("shard", "1:0").split(":"))
    skips = sorted(tuple(int(each) for each in window.split(":")) for window in options.skip_batches)
    run_dir, checkpoints = Path(options.run_dir), Path(options.checkpoint_dir)
    rank = int(os.environ["RANK"])
    first, number = 1, 0.0
    if options.resume:
        while (checkpoints.parents[1] / "hold").exists():
            time.sleep(0.05)
        try:
            first = verify(Path(options.resume)).step + 1
            number = number_in(Path(options.resume))
        except CheckpointError as error:
            print(error, flush=True)
            return 65
    elif committed(checkpoints) and not options.from_scratch:
        return 65
    schedule = SCHEDULES[values.get("schedule", "linear")]
    print(f"rank {rank} starts at step {first}", flush=True)
    optimizer = {**OPTIMIZER, "clip_norm": float(values.get("optim.clip_norm", 1.0))}
    run_dir.mkdir(parents=True, exist_ok=True)
    listen(run_dir, rank)
    evaluate = int(values.get("evaluate", 0))
    phases, fault = Phases(run_dir, rank), Fault(run_dir)
    fence = Fence(Path(options.fence), options.attempt) if options.fence and rank == 0 else NO_FENCE
    drills = DrillFile(run_dir / "drill.json")
    phases.enter("start", None)
    if rank == 0:
        versions = {"stub": "1"}
        config = {
            "v": 1,
            "steps": steps,
            "schedule": schedule,
            "optimizer": optimizer,
            "versions": versions,
            "layout": {},
        }
        write_durably(run_dir / "config.json", json.dumps(config))
    for step in range(first, steps + 1):
        phases.enter("training", step)
        time.sleep(0.5 if (checkpoints.parents[1] / "slow").exists() else pause)
        if rank == 0:
            fault.announce(step)
        heard = {"save": asked_to_save.pop("USR1", False), "superseded": fence.superseded, "nan": drills.at(step).nan}
        agreed = wait_in_a_collective(run_dir, rank, step, [word for word, is_so in heard.items() if is_so])
        if "superseded" in agreed:
            return 83
        report, rates = StepReport(), lr_at(step, schedule, factors)
        batch = batch_of(step, skips)
        report.loss, number = trained(number, batch, rates["lr"])
        if "nan" in agreed:
            report.loss = None
        report.fields["data_position"] = batch * 8
        if shard[0] <= batch <= shard[1]:
            report.loss, report.fields["gnorm"] = 9.0, 2.4
        now = [what for what, at, attempt in faults if attempt in (options.attempt, "*") and step >= int(at)]
        if what := fault.at(step):
            now.append(what)
        for what in now:
            misbehave(what, step, rank, phases, report)
        if rank != 0:
            if "nan" in agreed:
                return 82
            continue
        if evaluate and step % evaluate == 0:
            phases.enter("evaluation", step)
        line = telemetry(step, rates["lr"], report.loss, pause) | rates | report.fields
        line["clip_norm"] = optimizer["clip_norm"]
        with (run_dir / "telemetry.jsonl").open("ab", buffering=0) as file:
            odd = values.get("odd") and step % int(values["odd"]) == 0
            file.write(odd_line(line, step) if odd else json.dumps(line).encode() + b"\n")
        if report.loss is None:
            return 82
        if report.fields.get("checksums", {}).get("ranks"):
            return 87
        if step % every == 0 or step == steps or "save" in agreed:
            phases.enter("saving", step)
            save(checkpoints, step, options.attempt, line, now, number, fence)
    phases.enter("ending", steps)
    return 0


ODD = ("x", None, True, [], {"a": [1]}, 10**400, -1, 1e999, "\ud800", {"rank": 10**6, "median": 1, "max": 9})


def odd_line(line: dict, step: int) -> bytes:
    """A line in which one field has a value of another kind; or bytes that are no line at all."""
    if step % 5 == 0:
        return (b"{" * 5000, b"\xff\xfe{}", b"null", b"[" * 100_000)[step % 4] + b"\n"
    name = [*line, "busy_seconds", "checksums", "valid", "skip"][step % (len(line) + 4)]
    return (
        json.dumps(line | {name: ODD[step % len(ODD)] if name not in ("loss", "gnorm", "finite") else []}).encode()
        + b"\n"
    )


asked_to_save: dict[str, bool] = {}


def listen(run_dir: Path, rank: int) -> None:
    """Handle SIGUSR1 (save) and SIGUSR2 (write the stack)."""
    signal.signal(signal.SIGUSR1, lambda *_: asked_to_save.update(USR1=True))
    (run_dir / "stacks").mkdir(exist_ok=True)
    stacks = (run_dir / "stacks" / f"rank-{rank:04d}.txt").open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True, chain=False)


class Phases:
    """The phases file of rank 0."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir = run_dir
        self._path = run_dir / "phases.jsonl" if rank == 0 else None
        self._now = ""

    def enter(self, phase: str, step: int | None) -> None:
        if phase == self._now or self._path is None:
            return
        self._now = phase
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps({"ts": time.time(), "phase": phase, "step": step}).encode() + b"\n")


class StepReport:
    """The values of this step's telemetry."""

    def __init__(self) -> None:
        self.loss: float | None = 3.0
        self.fields: dict = {}


class Fault:
    """The file `fault`, which comes at any time. Rank 0 says from which step on it counts for all ranks."""

    def __init__(self, run_dir: Path) -> None:
        self._injected, self._announced = run_dir / "fault", run_dir / "fault-from-step.json"

    def _read(self) -> list[tuple[int, str]]:
        return json.loads(self._announced.read_text()) if self._announced.exists() else []

    def announce(self, step: int) -> None:
        """Called by rank 0 before it lets the others go on to this step."""
        what = self._injected.read_text() if self._injected.exists() else ""
        before = self._read()
        if what != (before[-1][1] if before else ""):
            write_durably(self._announced, json.dumps([*before, (step, what)]))

    def at(self, step: int) -> str:
        """What this step does. One that is ahead may have announced what comes after it."""
        return next((what for first, what in reversed(self._read()) if first <= step), "")


said: dict[str, list[str]] = {}


def wait_in_a_collective(run_dir: Path, rank: int, step: int, words: Sequence[str] = ()) -> set[str]:
    """Wait for all other ranks, through files: slow, but without a network. Returns the words of all ranks."""
    mine = run_dir / "barrier" / str(rank)
    mine.parent.mkdir(exist_ok=True)
    said.update({str(step): list(words)})
    said.pop(str(step - 2), None)  # a rank that is one step behind may still read the step before
    mine.with_suffix(".new").write_text(json.dumps(said))
    mine.with_suffix(".new").replace(mine)
    others = [mine.with_name(str(other)) for other in range(int(os.environ["WORLD_SIZE"])) if other != rank]
    began = time.monotonic()

    def missing() -> bool:
        return not all(path.exists() and max(map(int, json.loads(path.read_text()))) >= step for path in others)

    while missing():
        time.sleep(0.005)
        if time.monotonic() - began > 1.0:  # whoever is asked where it is should be found waiting, not looking
            _look_in_another_thread(missing).wait()
    all_said = (json.loads(path.read_text()).get(str(step), []) for path in others)
    return {*words, *(word for each in all_said for word in each)}


def _look_in_another_thread(missing: Callable[[], bool]) -> threading.Event:
    over = threading.Event()

    def look() -> None:
        while missing():
            time.sleep(0.05)
        over.set()

    threading.Thread(target=look, daemon=True).start()
    return over


def wait_for_telemetry(run_dir: Path, word: str) -> None:
    """Wait until rank 0 has reported it, however slow the machine is."""
    path = run_dir / "telemetry.jsonl"
    while not path.exists() or word not in path.read_text():
        time.sleep(0.02)


def elsewhere() -> None:
    """Wait where a rank is that does not come to the collective."""
    time.sleep(600)


def misbehave(what: str, step: int, rank: int, phases: Phases, report: StepReport) -> None:
    """Do one fault, at its step and after it. If rank 1 ends or hangs, the others wait in the next collective."""
    if what == "spike":
        report.loss = 9.0
    elif what == "stage":
        report.loss = 4.5
    elif what == "batch":
        report.fields |= {"bsz": 16, "wpb": 2048}
    elif what == "nan":
        report.loss = None
    elif what == "floor":
        report.fields["loss_scale"] = 0.03125
    elif what == "slow":
        report.fields["busy_seconds"] = {"median": 0.02, "max": 0.06, "rank": 1}
    elif what == "corrupt":
        report.fields["checksums"] = {"ranks": [1], "certain": True, "what": "its own shards changed"}
        if rank == 1:
            wait_for_telemetry(phases.run_dir, '"checksums"')
            os._exit(85)
    elif what == "nospace":
        report.fields["save_error"] = "OSError: [Errno 28] No space left on device"
    elif what in ("hang", "hang-evaluation", "hang-saving"):
        if phase := what.partition("-")[2]:
            phases.enter(phase, step)
        if rank == 1:
            elsewhere()
        wait_in_a_collective(phases.run_dir, rank, step + 1)
    elif rank != 1 or what in ("torn", "rot"):
        return
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "oom":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.", flush=True)
        os._exit(1)
    elif what == "full":
        print("OSError: [Errno 28] No space left on device: 'cache/batch.bin'", flush=True)
        os._exit(1)
    elif what == "nccl":
        print("ncclRemoteError: NCCL error: remote process exited or there was a network error", flush=True)
        os._exit(1)
    else:
        os._exit(int(what.removeprefix("exit-")))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its agent handles it
    try:
        sys.exit(main())
    except SupersededError:
        sys.exit(83)
    except KeyboardInterrupt:
        sys.exit(130)
