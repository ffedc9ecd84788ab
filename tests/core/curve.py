"""A healthy curve, drawn from a seed, into which tests put trouble."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opt_ops.core.detect.point import Point

BLOCKS = ("embed_tokens", "layers.0", "layers.1", "layers.2")


def curve(
    seed: int, steps: int, change: Callable[[int, Point], dict[str, Any]] = lambda step, point: {}
) -> list[Point]:
    """A healthy curve with batches of eight, norms by block every tenth step; `change` puts the trouble in."""
    draw = random.Random(seed)
    found = []
    for step in range(1, steps + 1):
        level = 3.0 + 2.0 * math.exp(-step / 400)
        norms = {name: 0.4 * math.exp(draw.gauss(0, 0.1)) for name in BLOCKS}
        logged = step % 10 == 0
        point = Point(
            step=step,
            ts=float(step),
            loss=level + draw.gauss(0, 0.03),
            gnorm=0.8 * math.exp(draw.gauss(0, 0.1)),
            lr=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            clip_norm=1.0,
            step_seconds=1.0,
            tokens=step * 512,
            wps=512.0,
            finite=True,
            batch=8,
            batch_tokens=512,
            data_position=step * 8,
            block_gnorms=norms if logged else None,
            block_pnorms=dict.fromkeys(BLOCKS, 20.0 + 0.001 * step) if logged else None,
            block_unorms={name: 0.02 * math.exp(draw.gauss(0, 0.05)) for name in BLOCKS} if logged else None,
        )
        found.append(replace(point, **change(step, point)))
    return found
