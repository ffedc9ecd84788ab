"""The lines that tell how training goes: what is trained and where, then loss, speed and the time that is left."""

import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from trainer.console import print_line
from trainer.recipes import Recipe

_RECENT = 20  # steps whose median is the time of a step


class ProgressLog:
    """Prints the first update of this process, each ``log_every``-th and the last one. Used by rank 0 only.

    Args:
        recipe: for the number of steps and how often to print.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._steps, self._every = recipe.steps, recipe.log_every
        self._first = True
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def update(self, line: Mapping[str, Any]) -> None:
        """Print an update, if it is due.

        Args:
            line: its line of telemetry.
        """
        step, first = line["num_updates"], self._first
        if not first:  # the first update compiles and allocates: it tells nothing of the others
            self._seconds.append(line["step_seconds"])
        self._first = False
        if not first and step % self._every and step != self._steps:
            return
        gnorm = "overflow" if line["gnorm"] is None else f"{line['gnorm']:.3f}"
        left = self._steps - step
        rest = f"  {duration(left * statistics.median(self._seconds))} left" if self._seconds and left else ""
        print_line(
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {step}/{self._steps}  loss {line['loss']:.4f}  "
            f"lr {line['lr']:.3g}  gnorm {gnorm}  {line['wps']:,.0f} tokens/s{rest}"
        )


def print_start(config: Mapping[str, Any], step: int) -> None:
    """Print what is trained and where: size, layout, tokens per update, device and ops.

    Args:
        config: the content of config.json.
        step: the last update so far.
    """
    layout, settings, where = config["layout"], config["settings"], config["device"]
    tokens = settings["data"]["global_batch"] * settings["data"]["seq_len"]
    kernels = [op for op, ran in config["kernels"].items() if ran == "fused"]
    print_line(f"model: {config['recipe']}, {config['model']['parameters']:,} parameters, {settings['precision']}")
    ranks = f"{layout['world']} rank" + "s" * (layout["world"] > 1)
    print_line(f"layout: {ranks}, dp {layout['dp']} × tp {layout['tp']}, engine {settings['engine']}")
    print_line(f"batch: {tokens:,} tokens per update, updates {step + 1:,} to {config['steps']:,}")
    print_line(f"device: {where['name']}, attention {where['attention']}, own kernels: {', '.join(kernels) or 'none'}")


def duration(seconds: float) -> str:
    """A span of time in its two largest units, for example ``3 h 20 min``."""
    minutes, hours, days = round(seconds / 60), round(seconds / 60) // 60, round(seconds / 3600) // 24
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min"
    if days == 0:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {round(seconds / 3600) % 24} h"
