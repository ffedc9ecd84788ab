"""A small corpus from a seed, whose loss has little noise, as that of a large run.

Each symbol has successors of three kinds: by itself, and by itself with the one before in two ways. A tiny model learns
the first kind in some hundred updates and the others slowly. A thousand tokens have a loss with a noise of 0.04 nats.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

_SYMBOLS = string.ascii_letters + string.digits
_DOCUMENTS, _LENGTH = 6000, 250


def write(path: Path, seed: int) -> None:
    """Write the corpus of a seed as JSONL."""
    chance = random.Random(f"corpus {seed}")
    size = len(_SYMBOLS)
    alone = [chance.sample(range(size), 3) for _ in range(size)]
    by_three, by_four = ([[chance.sample(range(size), 3) for _ in range(size)] for _ in range(ways)] for ways in (3, 4))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(_DOCUMENTS):
            before, last = chance.randrange(size), chance.randrange(size)
            text: list[str] = []
            for _ in range(_LENGTH):
                kind = chance.random()
                choices = (
                    alone[last]
                    if kind < 0.5
                    else by_three[before % 3][last]
                    if kind < 0.75
                    else by_four[before % 4][last]
                )
                before, last = last, chance.choice(choices)
                text.append(_SYMBOLS[last])
            file.write(json.dumps({"text": "".join(text)}) + "\n")
