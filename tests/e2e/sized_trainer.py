"""The stub trainer in several sizes: it tells its recipes, and its loss follows a law of size and tokens.

PRECISION: that of s5. WARM_UP: of all sizes, as they tell it. HALTED: the size that does not start. BROKEN: the size
whose loss is a nat too high.
"""

import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.e2e import stub_trainer

SIZES = {"s1": 125_000_000, "s2": 350_000_000, "s3": 1_300_000_000, "s4": 2_700_000_000, "s5": 6_700_000_000}
STEPS = 100  # as the stub trains if nothing says how many


def value_of(option: str) -> str:
    return sys.argv[sys.argv.index(option) + 1]


def loss(parameters: int, step: int) -> float:
    noise = 0.002 * random.Random(f"{parameters} {step}").gauss(0, 1)
    return (1.7 + 400 / parameters**0.34 + 1.5 / (step * 1024) ** 0.1) * (1 + noise)


def main() -> int:
    recipe = value_of("--recipe")
    if recipe not in SIZES:
        print(f"error: no recipe is called {recipe}", file=sys.stderr)
        return 78
    parameters = SIZES[recipe]
    if "--recipes" in sys.argv:
        precision = os.environ.get("PRECISION", "bf16") if recipe == "s5" else "bf16"
        settings = {"steps": STEPS, "model.hidden_size": parameters, "precision": precision}
        settings["optim.warmup_steps"] = int(os.environ.get("WARM_UP", "2"))
        about = {"recipe": recipe, "parameters": parameters, "steps": STEPS, "tokens": STEPS * 1024}
        print(json.dumps({**about, "settings": settings}))
        return 0
    if "--check" in sys.argv:
        return 0
    if os.environ.get("HALTED") == recipe:
        return 78
    broken = 1.0 if os.environ.get("BROKEN") == recipe else 0.0
    stub_trainer.trained = lambda number, batch, lr: (loss(parameters, batch) + broken, number)
    stub_trainer.SCHEDULES["linear"] = {**stub_trainer.SCHEDULE, "warmup_steps": 2}
    return stub_trainer.main()


if __name__ == "__main__":
    sys.exit(main())
