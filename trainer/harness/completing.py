"""Completes fixed prompts: the most probable text, and one that is drawn with a fixed seed."""

import json
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from opt_ops.contract.files import sha256, write_durably
from trainer.console import print_line
from trainer.harness.loading import Loaded


def write(loaded: Loaded, prompts: Path, target: Path, tokens: int, seed: int, about: Mapping[str, Any]) -> None:
    """Complete each line of `prompts` and write `target`.

    Args:
        loaded: The model.
        prompts: A file with one prompt a line. Blank lines are ignored.
        target: The result file.
        tokens: At most so many in a completion.
        seed: Of the drawn completions: each is drawn from the model's own distribution, at temperature 1.
        about: Where the model is from, as the file shall say it.

    Raises:
        OSError: a file cannot be read or written.
    """
    lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    completions: list[dict[str, str]] = []
    for number, prompt in enumerate(lines, start=1):
        print_line(f"prompt {number} of {len(lines)}", sys.stderr)
        drawn = _completed(loaded, prompt, tokens, seed)
        completions.append({"prompt": prompt, "greedy": _completed(loaded, prompt, tokens, None), "drawn": drawn})
    result = {
        "completions": completions,
        "opt_ops": {
            **about,
            "prompts": sha256(prompts),
            "tokens": tokens,
            "seed": seed,
            "transformers": transformers.__version__,
        },
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def _completed(loaded: Loaded, prompt: str, tokens: int, seed: int | None) -> str:
    """What the model writes after the prompt; greedy without a seed. A long prompt keeps its end."""
    tokens = min(tokens, loaded.positions // 2)
    ids: list[int] = loaded.tokenizer.encode(prompt)  # `</s>` is in front, as in training
    if len(ids) > (room := loaded.positions - tokens):
        ids = [ids[0], *ids[len(ids) - room + 1 :]]
    given = torch.tensor([ids], device=loaded.model.device)
    ways: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed + zlib.crc32(prompt.encode()))  # other prompts in the file change nothing
        ways = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        found = loaded.model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, **ways)
    return loaded.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
