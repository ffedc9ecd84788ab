"""What supervision costs a training step: an example alone, and the same example under the contract, in turn.

    python -m benchmarks.adapter_cost
    python -m benchmarks.adapter_cost --ranks 2 --steps 300 --repeats 5 -o json

Hugging Face's Trainer writes its own measure, ``train_runtime``, with and without supervision. Alone it logs and saves
nothing. Under supervision every update has its reduction, its readback and its line of telemetry, and
``logging_steps=1`` makes the Trainer itself log each update. Saves are left out of both but for the last one.

The model is tiny, so the figure is the cost of an update in milliseconds, whatever the model; a share of it says
nothing.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from opt_ops.contract.environment import Place, of_rank

EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_trainer.py"
_RUNTIME = re.compile(r"'train_runtime': '?([0-9.e+-]+)")


def seconds_per_update(ranks: int, steps: int, *, supervised: bool) -> float:
    """One run. Its training time by the Trainer's own measure, divided by its updates."""
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        alone = ["--max_steps", str(steps), "--save_strategy", "no", "--logging_strategy", "no"]
        under = ["--recipe", "tiny", "--run-dir", f"{scratch}/a0", "--checkpoint-dir", f"{scratch}/checkpoints"]
        under += ["--set", f"steps={steps}", "--set", f"checkpoint_every={steps}"]
        command = [sys.executable, str(EXAMPLE), "--output_dir", f"{scratch}/out", *(under if supervised else alone)]
        processes = [
            subprocess.Popen(
                command,
                env=_environment(rank, ranks, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        said = [process.communicate()[0] for process in processes]
        found = _RUNTIME.search(said[0])
        if any(process.returncode for process in processes) or not found:
            sys.exit(f"{' '.join(command)} failed:\n{said[0][-2000:]}")
        return float(found[1]) / steps


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    place = of_rank(Place(rank, ranks, rank), local_world=ranks, address="127.0.0.1", port=port, node="here")
    return {**os.environ, "OMP_NUM_THREADS": "1", **(place if ranks > 1 else {})}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", choices=["text", "json"], default="text")
    options = parser.parse_args()
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for supervised in (False, True):
            found[supervised].append(seconds_per_update(options.ranks, options.steps, supervised=supervised))
    alone, under = (1000 * statistics.median(found[each]) for each in (False, True))
    result = {
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "ranks": options.ranks,
        "alone_ms": round(alone, 2),
        "supervised_ms": round(under, 2),
        "cost_ms": round(under - alone, 2),
        "runs_ms": {str(each): [round(1000 * value, 2) for value in found[each]] for each in found},
    }
    if options.output == "json":
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<14} {value}")


if __name__ == "__main__":
    main()
