"""Forms in which people have their curves: the real command must understand each of them."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.signals_curves import Look, Row, Rows, healthy
from benchmarks.signals_judge import Figure, Run
from benchmarks.signals_rules import OURS

Items = list[dict[str, Any]]


def replay(path: Path, *options: str) -> Items | None:
    """What `opt-ops signals replay FILE -o json` says; None if it refuses."""
    done = subprocess.run(
        [sys.executable, "-m", "opt_ops", "signals", "replay", str(path), "-o", "json", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode != 0:
        return None
    said = json.loads(done.stdout)
    return said["items"] if isinstance(said, dict) else said


def _write(path: Path, names: list[str], lines: list[list[Any]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *([("" if cell is None else cell) for cell in line] for line in lines)])
    return path


def _plain(folder: Path, rows: Rows) -> Path:
    return _write(
        folder / "plain.csv",
        ["step", "loss", "grad_norm", "lr", "loss_scale"],
        [[r.step, r.loss, r.gnorm, r.lr, r.scale] for r in rows],
    )


def _brief(items: Items | None) -> list[tuple[Any, ...]] | None:
    keys = ("step", "onset_step", "signal", "tier", "action", "target_step")
    return None if items is None else [tuple(item.get(key) for key in keys) for item in items]


def _same(folder: Path, rows: Rows, path: Path, *options: str) -> bool:
    plain = _brief(replay(_plain(folder, rows)))
    return bool(plain) and _brief(replay(path, *options)) == plain


def _broken(rng: random.Random) -> Rows:
    """A curve with one divergence."""
    look = Look(noise="global batch", sd=0.02, start=5_000, every=rng.choice((1, 5)))
    rows = healthy(rng, look, 1400)
    for row in rows[900:]:
        row.loss += 0.8
        row.gnorm = (row.gnorm or 0.4) * 3
    return rows


def fp16(folder: Path, rng: random.Random) -> bool:
    """A healthy fp16 log: the norm of a skipped step is inf or nan, and the scale halves at the next line."""
    look = Look(noise="global batch", sd=0.02, start=5_000, scale=True)
    rows = healthy(rng, look, 6000)
    for row in rows:
        if row.skip:
            row.gnorm, row.skip = rng.choice((math.inf, math.nan)), None
    items = replay(_plain(folder, rows))
    return items is not None and not any(item.get("action") == "rollback" or item["tier"] == "act" for item in items)


def goes_back(folder: Path, rng: random.Random) -> bool:
    """A run that was resumed twice, without a column that says so, and one whose resume is bad."""
    rows = healthy(rng, Look(noise="global batch", sd=0.02, start=5_000), 2500)
    again = [row.copy() for row in rows]
    for row in again:
        row.loss += rng.gauss(0, 0.01)
    items = replay(_plain(folder, rows[:1000] + again[900:1800] + rows[1700:]))
    if items is None or any(item["tier"] == "act" for item in items):
        return False
    broken = [row.copy() for row in again[900:1200]]
    for row in broken:
        row.loss += 2.0
    items = replay(_plain(folder, rows[:1000] + broken)) or []
    return any(item["signal"] == "bad_restore" for item in items)


def wandb(folder: Path, rng: random.Random) -> bool:
    """W&B's history."""
    rows = _broken(rng)
    path = _write(
        folder / "history.csv",
        ["_step", "_runtime", "_timestamp", "train/loss", "train/grad_norm", "train/learning_rate"],
        [[r.step, 3 * n, 1.7e9 + 3 * n, r.loss, r.gnorm, r.lr] for n, r in enumerate(rows)],
    )
    return _same(folder, rows, path)


def tensorboard(folder: Path, rng: random.Random) -> bool:
    """TensorBoard's CSV of one scalar."""
    rows = _broken(rng)
    for row in rows:
        row.gnorm = row.lr = None
    path = _write(
        folder / "scalar.csv",
        ["Wall time", "Step", "Value"],
        [[1.7e9 + 3.5 * n, r.step, r.loss] for n, r in enumerate(rows)],
    )
    return _same(folder, rows, path)


def telemetry(folder: Path, rng: random.Random) -> bool:
    """The own telemetry."""
    rows = _broken(rng)
    path = folder / "telemetry.jsonl"
    with path.open("w") as file:
        for row in rows:
            line = {
                "step": row.step,
                "ts": float(row.step),
                "loss": row.loss,
                "gnorm": row.gnorm,
                "lr": row.lr,
                "betas": [0.9, 0.95],
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                "step_seconds": 1.0,
                "tokens": row.step,
                "wps": 1.0,
                "finite": True,
            }
            file.write(json.dumps(line) + "\n")
    return _same(folder, rows, path)


def columns(folder: Path, rng: random.Random) -> bool:
    """Names that nobody guesses, given with --column."""
    rows = _broken(rng)
    path = _write(
        folder / "named.csv",
        ["update", "nll per token", "total norm"],
        [[r.step, r.loss, r.gnorm] for r in rows],
    )
    options = ("step=update", "loss=nll per token", "grad_norm=total norm")
    return _same(folder, [_without_lr(r) for r in rows], path, *(x for o in options for x in ("--column", o)))


def _without_lr(row: Row) -> Row:
    row = row.copy()
    row.lr = None
    return row


def dead_tail(folder: Path, rng: random.Random) -> bool:
    """Hundreds of lines without a finite loss: one finding, with their count and the last step."""
    rows = healthy(rng, Look(noise="global batch", sd=0.02, start=5_000), 1500)
    for row in rows[700:]:
        row.loss, row.gnorm = math.nan, None
    items = replay(_plain(folder, rows))
    dead = [item for item in items or [] if item["signal"] == "non_finite_loss"]
    return len(dead) == 1 and {800, rows[-1].step} <= set(dead[0]["evidence"].values())


def empty_norm(folder: Path, rng: random.Random) -> bool:
    """Cells without a norm among others of 0.2: as if the norm were never known."""
    look = replace(Look(noise="global batch", sd=0.02, start=5_000), lr=False)
    rows = healthy(rng, look, 1500)
    for n, row in enumerate(rows):
        row.gnorm = None if 800 <= n < 1200 else 0.2 * rng.lognormvariate(0, 0.1)
    items = replay(_plain(folder, rows))
    return items == []


FORMS: dict[str, Callable[[Path, random.Random], bool]] = {
    "fp16 log, norms of inf": fp16,
    "steps that go back": goes_back,
    "W&B's history": wandb,
    "TensorBoard's scalar": tensorboard,
    "telemetry.jsonl": telemetry,
    "--column": columns,
    "dead tail": dead_tail,
    "empty grad_norm": empty_norm,
}


def forms_section(run: Run) -> Iterator[Figure]:
    """Each form once."""
    figure = Figure("forms of input understood", f"≥ {len(FORMS)}", len(FORMS))
    for name, understood in FORMS.items():
        with TemporaryDirectory() as folder:
            if not understood(Path(folder), run.rng(name)):
                figure.misses.append(name)
    figure.counts[OURS] = len(FORMS) - len(figure.misses)
    figure.met = not figure.misses
    yield figure
