"""A trainer in plain Python that keeps every promise, and breaks some if it is told to: `--broken NAME` for each.

A regression with four weights and momentum. Every rank takes its share of a batch; a socket adds up what they found.
Learning rate, order of data and state show in each loss.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from plain_parts import (
    BATCH,
    SIZE,
    Peers,
    entry,
    lr_at,
    lr_factor,
    next_sample,
    next_sample_off_by_one,
    next_sample_wrong,
    share,
    write,
)

from opt_ops.contract.manifest import CheckpointError, committed, verify

SCHEDULE = {"peak_lr": 0.05, "warmup_steps": 5, "total_steps": 200, "final_fraction": 0.1}
OPTIMIZER = {"betas": [0.9, 0.95], "weight_decay": 0.0, "clip_norm": 1.0}
SETTINGS = {"steps": 100, "checkpoint_every": 10, "pause": 0.02}
BROKEN: set[str] = set()


def broken(*names: str) -> bool:
    return not BROKEN.isdisjoint(names)


def chosen(ways: dict, usual):
    """What `ways` has for the promise that is broken, else the usual."""
    return next((ways[name] for name in ways if name in BROKEN), usual)


class Leave(Exception):
    """Ends this rank with an exit code."""


class Run:
    """One rank of an attempt."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.values = dict(SETTINGS)
        for text in options.set:
            key, _, value = text.partition("=")
            if key not in SETTINGS and not broken("any_setting"):
                raise Leave(78)
            self.values[key] = float(value) if key == "pause" else int(value)
        if options.run_dir is None:
            raise Leave(2 if broken("run_dir_2") else 78)
        self.dir, self.checkpoints = Path(options.run_dir), Path(options.checkpoint_dir)
        self.factors = [(int(s), float(f)) for s, f in (each.split(":") for each in options.lr_factor)]
        self.windows = [(int(a), int(b)) for a, b in (each.split(":") for each in options.skip_batches)]
        self.weights, self.momentum = [0.0] * SIZE, [0.0] * SIZE
        self.step, self.position = 0, 0
        self.saved_factor: float | None = None
        self.wish = self.interrupted = False
        self.fence_read, self.superseded = 0.0, False
        self.drill = ""
        self.last_loss = 0.0

    # ------------------------------------------------------------ signals, fence, drills

    def listen(self) -> None:
        signal.signal(signal.SIGUSR1, self.on_save)
        if broken("save_ignored"):
            signal.signal(signal.SIGUSR1, lambda *_: None)
        if broken("sigterm_ends"):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        elif broken("sigterm_saves"):
            signal.signal(signal.SIGTERM, self.on_save)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if broken("sigint_waits"):
            signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        (self.dir / "stacks").mkdir(exist_ok=True)
        file = (self.dir / "stacks" / f"rank-{self.rank:04d}.txt").open("w")
        if broken("stacks_ignored"):
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        elif broken("stacks_empty") or (broken("stacks_of_rank_0") and self.rank):
            signal.signal(signal.SIGUSR2, lambda *_: None)
        elif broken("stacks_end"):
            faulthandler.register(signal.SIGUSR2, file, chain=True)
        else:
            faulthandler.register(signal.SIGUSR2, file, chain=False)

    def on_save(self, *_: object) -> None:
        self.wish = True

    def look_at_fence(self) -> None:
        self.fence_read = time.monotonic()
        with contextlib.suppress(OSError, ValueError, KeyError):
            named = json.loads(Path(self.options.fence).read_text())["attempt"]
            self.superseded = named != self.options.attempt and not broken("fence_ignored")

    def drill_of(self, step: int) -> dict:
        with contextlib.suppress(OSError, ValueError):
            for drill in json.loads((self.dir / "drill.json").read_text()):
                if drill["from_step"] <= step < drill["from_step"] + drill.get("updates", 1):
                    return drill
        return {}

    # ------------------------------------------------------------ what it tells

    def phase(self, name: str) -> None:
        if broken("no_saving") and name == "saving":
            return
        if broken("no_training_again") and name == "training" and self.step:
            return
        if broken("no_start") and name == "start":
            return
        if broken("odd_phase") and name == "saving":
            name = "storing"
        if self.rank == 0 and not broken("no_phases"):
            self.line("phases.jsonl", {"ts": time.time(), "phase": name, "step": self.step or None})

    def line(self, name: str, value: dict) -> None:
        if broken("buffered") and name == "telemetry.jsonl":
            self.buffer = getattr(self, "buffer", None) or (self.dir / name).open("a")
            self.buffer.write(json.dumps(value) + "\n")
            return
        with (self.dir / name).open("ab", buffering=0) as file:
            file.write(json.dumps(value).encode() + b"\n")

    def config(self) -> None:
        if self.rank:
            return
        schedule, optimizer = dict(SCHEDULE), dict(OPTIMIZER)
        if broken("config_text"):
            schedule["peak_lr"] = "0.05"
        if broken("config_no_betas"):
            del optimizer["betas"]
        steps = self.values["steps"] + broken("config_other_steps")
        write(
            self.dir / "config.json", json.dumps({"v": 1, "steps": steps, "schedule": schedule, "optimizer": optimizer})
        )

    def tell(self, told: dict) -> None:
        told = dict(told)
        step = told["num_updates"]
        if self.rank and not broken("both_write"):
            return
        if (broken("text") and step == 5) or broken("all_text"):
            told["gnorm"] = str(told["gnorm"])
        if broken("lr_text"):
            told["lr"] = str(told["lr"])
        if broken("nan") and step == 6:
            told["gnorm"] = math.nan
        if broken("text_skipped") and step == 10:
            told["skipped"] = "0"
        if broken("other_decay"):
            told["weight_decay"] = 0.1
        if broken("no_tokens"):
            del told["tokens"]
        if broken("hole") and step == 9:
            return
        if broken("twice") and step == 9:
            self.line("telemetry.jsonl", told)
        if broken("text_step"):
            told["num_updates"] = str(step)
        self.line("telemetry.jsonl", told)

    # ------------------------------------------------------------ checkpoints

    def load(self, path: Path) -> None:
        try:
            manifest = self.checked(path)
        except CheckpointError as error:
            if not path.exists() and broken("nothing_1"):
                raise Leave(1) from error
            print(error)
            raise Leave(65) from error
        if manifest["layout"]["world"] != self.world and broken("layout_1"):
            raise Leave(1)
        if manifest["layout"]["world"] != self.world and broken("layout_78"):
            raise Leave(78)
        self.weights = json.loads((path / "weights.distcp").read_text())["weights"]
        self.momentum = json.loads((path / "momentum.distcp").read_text())["momentum"]
        if broken("forgets_momentum") or (broken("layout_forgets") and manifest["layout"]["world"] != self.world):
            self.momentum = [0.0] * SIZE
        self.step, self.position = manifest["step"], manifest["data_position"]
        self.saved_factor = manifest["lr_factor"]
        if broken("data_by_step"):
            self.position = self.step * BATCH
        if broken("skips_one"):
            self.position += BATCH

    def checked(self, path: Path) -> dict:
        if broken("unmarked", "cut", "no_hash", "stale_accepted"):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
            except OSError as error:
                raise CheckpointError(path, "nothing there") from error
            if broken("unmarked") and not (path / "COMMITTED").exists():
                return manifest
            wrong = ""
            try:
                verify(path)
            except CheckpointError as error:
                wrong = error.why
            known = {"unmarked": "marker", "cut": "bytes", "no_hash": "content", "stale_accepted": "stale"}
            if wrong and not any(broken(name) and known[name] in wrong for name in known):
                raise CheckpointError(path, wrong)
            return manifest
        verify(path)
        return json.loads((path / "manifest.json").read_text())

    def save(self, told: dict, agreed: bool = False) -> None:
        if broken("last_not_saved") and self.step == self.values["steps"]:
            return
        if not broken("late_saving"):
            self.phase("saving")
        path = self.checkpoints / f"step-{self.step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights} | {"step": self.step}
        if broken("stale_save") and self.step > 10:
            state = json.loads((self.checkpoints / "step-00000006/weights.distcp").read_text())
        mine = {"weights.distcp": state} if self.rank == 0 else {}
        if self.rank == self.world - 1:
            mine["momentum.distcp"] = {"momentum": self.momentum, "step": self.step}
            if broken("asked_mixed") and agreed:
                mine["momentum.distcp"]["momentum"] = self.momentum_before
        texts = {name: json.dumps(value).ljust(300) for name, value in mine.items()}
        if not broken("marker_before_shards"):
            for name, text in texts.items():
                (path / name).write_text(text)
            write(path / f"rank-{self.rank:04d}.json", json.dumps({"files": {n: entry(path, n) for n in texts}}))
        if not broken("marker_without_wait"):
            self.peers.add([0.0])
        if self.rank == 0:
            self.commit(path, told, texts)
        if broken("marker_before_shards"):
            for name, text in texts.items():
                (path / name).write_text(text)
            write(path / f"rank-{self.rank:04d}.json", json.dumps({"files": {n: entry(path, n) for n in texts}}))
        if broken("late_saving"):
            self.phase("saving")
        self.phase("training")

    def commit(self, path: Path, told: dict, texts: dict[str, str]) -> None:
        files = {n: {"size": len(t), "sha256": hashlib.sha256(t.encode()).hexdigest()} for n, t in texts.items()}
        for report in path.glob("rank-*.json"):
            files |= json.loads(report.read_text())["files"]
        if broken("marker_without_wait", "marker_before_shards") and self.world > 1:
            text = json.dumps({"momentum": self.momentum, "step": self.step}).ljust(300)
            files["momentum.distcp"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        manifest = {
            "v": 1,
            "step": self.step,
            "attempt": self.options.attempt,
            "ts": time.time(),
            "layout": {"world": self.world},
            "data_position": self.position,
            "tokens": told["tokens"],
            "settings_digest": "sha256:0",
            "telemetry": told,
            "lr_factor": lr_factor(self.step, self.factors),
            "files": files,
        }
        text = json.dumps(manifest)
        self.look_at_fence()
        if self.superseded and not broken("fence_not_before_marker"):
            raise Leave(83)
        if broken("marker_first"):
            write(path / "COMMITTED", hashlib.sha256(text.encode()).hexdigest() + "\n")
            write(path / "manifest.json", text)
            return
        write(path / "manifest.json", text)
        write(path / "COMMITTED", hashlib.sha256(text.encode()).hexdigest() + "\n")

    # ------------------------------------------------------------ training

    def begin(self) -> None:
        options = self.options
        if options.resume:
            self.load(Path(options.resume))
        elif committed(self.checkpoints) and not options.from_scratch and not broken("starts_over"):
            raise Leave(65)
        self.listen()
        self.phase("start")
        if not broken("config_late"):
            self.config()
        self.peers = Peers(self.rank, self.world)

    def train(self) -> None:
        self.begin()
        if broken("last_again") and self.step == self.values["steps"]:
            self.values["steps"] += 1
        if broken("last_1") and self.step == self.values["steps"]:
            raise Leave(1)
        self.phase("training")
        resumed_at = self.step
        while self.step < self.values["steps"]:
            self.update(self.step + 1, resumed_at)
        self.phase("ending")

    def update(self, step: int, resumed_at: int) -> None:
        began = time.time()
        time.sleep(self.values["pause"])
        if self.interrupted:
            raise KeyboardInterrupt
        sums, agreed = self.reduced(step)
        loss, gradient = sums[0], sums[1:]
        shift = chosen({"factor_early": -1, "factor_late": 1}, 0)
        lr = lr_at(step - broken("schedule_lags")) * lr_factor(step, self.factors, shift)
        used = lr
        if broken("factor_told") or (broken("saved_lr_wins", "saved_lr_wins_honest") and resumed_at):
            used = lr_at(step) * (self.saved_factor or 1.0)
        if broken("saved_lr_wins_honest"):
            lr = used
        drill = self.drill_of(step)
        if drill.get("kind") == "lr":
            used = lr = lr * drill["factor"]
        gnorm = math.sqrt(sum(each * each for each in gradient))
        told = self.told(step, began, loss, gnorm, lr, resumed_at)
        if not math.isfinite(loss):
            self.not_finite(told)
        self.last_loss = loss if math.isfinite(loss) else self.last_loss
        self.momentum_before = list(self.momentum)
        scale = min(1.0, 1.0 / gnorm) if gnorm else 1.0
        for k in range(SIZE):
            self.momentum[k] = 0.9 * self.momentum[k] + scale * gradient[k]
            self.weights[k] -= used * self.momentum[k]
        self.step = step
        self.tell(told)
        if broken("config_late") and step == 1:
            self.config()
        if agreed:
            self.wish = broken("save_for_ever")
        if step % self.values["checkpoint_every"] == 0 or step == self.values["steps"] or agreed:
            if broken("save_ends") and agreed:
                raise Leave(0)
            self.save(told, agreed)

    def told(self, step: int, began: float, loss: float, gnorm: float, lr: float, resumed_at: int) -> dict:
        number = step - (broken("counts_from_saved") and bool(resumed_at))
        now = time.time()
        return {
            "ts": now,
            "num_updates": number,
            "loss": loss,
            "gnorm": gnorm,
            "lr": lr,
            **{name: OPTIMIZER[name] for name in ("betas", "weight_decay", "clip_norm")},
            "finite": True,
            "step_seconds": now - began,
            "tokens": step * BATCH,
            "wps": BATCH / (now - began),
            "data_position": self.told_position,
        }

    def reduced(self, step: int) -> tuple[list[float], bool]:
        """The sums over all ranks, and whether a save was asked for. The fence is looked at by rank 0 alone."""
        due = time.monotonic() - self.fence_read >= 1.0
        if due and (self.rank == 0 or broken("fence_of_each")):
            self.look_at_fence()
        if self.superseded and broken("fence_of_each", "fence_rank_0_alone"):
            raise Leave(83)
        windows = [] if broken("windows_told") else self.windows
        if broken("windows_forgotten") and self.options.resume:
            windows = []
        wrong = {
            "overlap_twice": next_sample_wrong,
            "overlap_told": next_sample_wrong,
            "window_end_told": next_sample_off_by_one,
        }
        first = chosen(wrong, next_sample)(self.position, windows)
        self.position = first + BATCH
        self.told_position = self.position
        if broken("windows_told", "overlap_told", "windows_forgotten", "window_end_told"):
            self.true_position = (
                next_sample(getattr(self, "true_position", self.position - BATCH), self.windows) + BATCH
            )
            self.told_position = self.true_position
        trained = first % (BATCH * 12) if broken("data_from_start") and self.options.resume else first
        if broken("window_replaced") and self.windows:  # other data in its place, and nothing moves
            trained = 0 if any(a <= step <= b for a, b in self.windows) else (step - 1) * BATCH
        numbers = share(self.weights, trained, self.rank, self.world)
        if self.drill_of(step).get("kind") == "nan" and not broken("drills_unknown", "nan_unknown"):
            numbers = [math.nan] * len(numbers)
        wish = self.wish and not broken("save_of_each")
        numbers = self.peers.add([*numbers, float(wish), float(self.superseded)])
        if numbers[-1] and not broken("fence_not_between", "fence_ignored"):
            raise Leave(1 if broken("fence_1") else 83)
        return numbers[:-2], bool(numbers[-2]) or (self.wish and broken("save_of_each"))

    def not_finite(self, told: dict) -> None:
        told |= {"loss": None, "gnorm": None, "finite": False}
        if broken("nan_hidden"):
            told |= {"loss": self.last_loss, "gnorm": 1.0, "finite": True}
            return
        if broken("nan_goes_on"):
            return
        if broken("nan_no_line"):
            raise Leave(82)
        if broken("nan_as_number"):
            told["loss"] = -1.0
        self.step = told["num_updates"]
        self.tell(told)
        if broken("nan_commits"):
            self.save(told)
        raise Leave(1 if broken("nan_1") or (broken("nan_rank_1") and self.rank) else 82)


def main() -> int:
    global BROKEN  # noqa: PLW0603
    parser = argparse.ArgumentParser()
    names = ("recipe", "run-dir", "checkpoint-dir", "resume", "attempt", "fence")
    for name in names:
        parser.add_argument(f"--{name}")
    for name in ("broken", "set", "lr-factor", "skip-batches"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--from-scratch", action="store_true")
    options = parser.parse_args()
    BROKEN = set(options.broken)
    try:
        Run(options).train()
    except Leave as leave:
        return leave.args[0]
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
