"""Scores of the OPT models that Meta released, to stand beside those of a run of the same size.

Source of 125M to 66B: EleutherAI/pythia on GitHub, evals/opt. Source of 175B: BigScience's repository of evaluation
results. Both were made with lm-eval, zero-shot. Its version and the number format are not known here, so the last
digits may differ. The paper's own figures were made with internal prompts and cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PYTHIA = "EleutherAI/pythia, evals/opt"
_BIGSCIENCE = "BigScience's evaluation results"

_COLUMNS = (
    ("arc_easy", "acc"),
    ("arc_challenge", "acc"),
    ("arc_challenge", "acc_norm"),
    ("lambada_openai", "acc"),
    ("lambada_openai", "perplexity"),
    ("piqa", "acc"),
    ("winogrande", "acc"),
    ("sciq", "acc"),
)

# Accuracies in percent, perplexity as it is.
_ROWS: Mapping[str, Sequence[float]] = {
    "125m": (43.5, 18.9, 22.8, 37.9, 26.02, 63.0, 50.3, 75.1),
    "350m": (44.0, 20.7, 23.9, 45.2, 16.4, 64.4, 52.3, 74.8),
    "1.3b": (57.0, 23.1, 29.4, 57.9, 6.64, 71.7, 59.7, 84.5),
    "2.7b": (60.8, 26.8, 31.2, 63.6, 5.12, 73.9, 61.0, 85.8),
    "6.7b": (65.6, 30.5, 34.7, 67.7, 4.25, 76.3, 65.3, 90.1),
    "13b": (67.1, 32.9, 35.8, 68.6, 4.04, 76.0, 65.2, 90.8),
    "30b": (70.0, 34.6, 38.0, 71.5, 3.63, 77.6, 68.2, 91.1),
    "66b": (71.7, 37.2, 40.1, 73.9, 3.29, 78.8, 68.7, 92.6),
}
_175B: Mapping[tuple[str, str], float] = {
    ("arc_easy", "acc"): 75.1,
    ("arc_challenge", "acc"): 41.2,
    ("boolq", "acc"): 80.2,
    ("copa", "acc"): 84.0,
    ("hellaswag", "acc"): 59.2,
    ("hellaswag", "acc_norm"): 78.3,
    ("openbookqa", "acc"): 32.2,
    ("openbookqa", "acc_norm"): 43.8,
    ("piqa", "acc"): 79.1,
    ("winogrande", "acc"): 73.6,
    ("wic", "acc"): 50.6,
    ("wsc", "acc"): 36.5,
    ("rte", "acc"): 56.7,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """What the released model of the same size scores, zero-shot. Accuracies are shares of 1."""

    name: str  # `released OPT-125M, zero-shot`
    source: str
    values: Mapping[tuple[str, str], float]  # by task and metric


def golden(recipe: str | None, settings: Sequence[str]) -> Golden | None:
    """The scores for a recipe; None if it is none of OPT's, or if a setting makes another model of it."""
    size = (recipe or "").removeprefix("opt-")
    reshaped = any(each.startswith("model.") and "dropout" not in each for each in settings)
    if not (recipe or "").startswith("opt-") or reshaped:
        return None
    found = _175B if size == "175b" else dict(zip(_COLUMNS, _ROWS.get(size, ()), strict=False))
    if not found:
        return None
    return Golden(
        name=f"released OPT-{size.upper()}, zero-shot",
        source=_BIGSCIENCE if size == "175b" else _PYTHIA,
        values={key: value if key[1] == "perplexity" else round(value / 100, 6) for key, value in found.items()},
    )
