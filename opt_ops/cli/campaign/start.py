"""What `opt-ops campaign start` makes sure of: the sizes differ in nothing but what the size decides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opt_ops.cli.run.start_checks import require_possible, shape
from opt_ops.cli.shared.extras import require_trainer
from opt_ops.cli.trainer import questions as trainer_questions
from opt_ops.config import Config
from opt_ops.core.campaign.equal import differing
from opt_ops.errors import Unavailable, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def tokens_of(text: str) -> int:
    """The value of `--tokens`: 180B, 1.5T, 500M or a whole number.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"--tokens {text}: not a number of tokens", "for example --tokens 180B")
    return round(float(found[1]) * _UNITS[found[2]])


def nodes_by_size(path: Path) -> dict[str, int]:
    """The file of `--nodes-by-size`: a recipe and a number of nodes in each line; `#` begins a remark.

    Raises:
        UsageError: it cannot be read, or a line is not of that form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--nodes-by-size {path} cannot be read: {error}", "its lines are: opt-1.3b 4") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(r"[1-9]\d{0,5}", words[1]) or words[0] in found:
            raise UsageError(
                f"{path}, line {number}: {line.strip()!r} is no recipe with its number of nodes, or it comes twice",
                "a line is such as: opt-1.3b 4",
            )
        found[words[0]] = int(words[1])
    return found


def sizes(
    recipes: Sequence[str],
    common: Mapping[str, Any],
    tokens: int | None,
    nodes: Mapping[str, int | None],
    spares: int | None,
    ranks: int | None,
    config: Config,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The sizes of a request `start`, as the trainer describes them, the smallest first; and remarks for people.

    Args:
        recipes: Their names.
        common: What all have: `settings`, `data`, `valid`, `tokenizer`.
        tokens: That each one sees. None: as its recipe says.
        nodes: By recipe; None: as the site has it.
        spares: Of each.
        ranks: On each node.
        config: Of the site.

    Raises:
        UsageError: the trainer refuses one, or two differ in what must be equal.
        Unavailable: the trainer does not tell its recipes.
    """
    require_trainer(config.trainer)
    found: list[tuple[dict[str, Any], Mapping[str, Any]]] = []
    for recipe in recipes:
        settings = list(common["settings"])
        about = _about(config, recipe, settings)
        if tokens is not None:
            steps = math.ceil(tokens * about["steps"] / about["tokens"])
            own = about.get("settings", {})
            settings += [f"steps={steps}", *([f"optim.total_steps={steps}"] if "optim.total_steps" in own else [])]
            about = _about(config, recipe, settings)
        found.append(
            (
                {
                    "recipe": recipe,
                    "parameters": about["parameters"],
                    "tokens": about["tokens"],
                    "settings": settings,
                    "shape": shape(config.shape, nodes.get(recipe), spares, ranks),
                },
                about.get("settings", {}),
            )
        )
    found.sort(key=lambda pair: pair[0]["parameters"])
    (first, settings_of_first), *others = found
    for size, own in others:
        if differ := differing(settings_of_first, own):
            named = "; ".join(f"{key} is {a} and {b}" for key, a, b in differ)
            raise UsageError(
                f"{first['recipe']} and {size['recipe']} differ in more than the size decides: {named}",
                f"make them equal, for example with --set {differ[0][0]}={_text(differ[0][1])}",
            )
    return [size for size, _ in found], list(_without_forecast(found))


def _without_forecast(found: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Iterator[str]:
    """Which sizes have too little training behind their warm-up."""
    from chronicles.campaign.sizes import LEAST_KNOTS, SHARES, WARM_UPS, first_share

    for size, own in found:
        warm_up, steps = own.get("optim.warmup_steps"), own.get("steps")
        if first_share({"steps": steps, "schedule": {"warmup_steps": warm_up}}) > SHARES[-LEAST_KNOTS]:
            yield (
                f"{size['recipe']}: losses count from {WARM_UPS} warm-ups of {warm_up:,} steps on, and it has "
                f"{steps:,} steps: it counts for no forecast. Give more --tokens, or --set optim.warmup_steps=N"
            )


def require_all_possible(
    sizes: Sequence[Mapping[str, Any]], common: Mapping[str, Any], config: Config
) -> Iterator[str]:
    """Ask trainer and scheduler about each size. Yields what could not be checked.

    Raises:
        UsageError: one of them would be refused.
    """
    for size in sizes:
        try:
            yield from require_possible({**common, **size}, config)
        except UsageError as error:
            raise UsageError(f"{size['recipe']}: {error}", error.hint) from error


def _about(config: Config, recipe: str, settings: Sequence[str]) -> dict[str, Any]:
    about = next(iter(trainer_questions.recipes(config.trainer, recipe, settings)), {})
    numbers = [about.get(name) for name in ("parameters", "steps", "tokens")]
    if not all(isinstance(each, int) and each > 0 for each in numbers):
        raise Unavailable(
            f"the trainer does not say how many parameters, steps and tokens {recipe} has",
            "its `--recipes` must print `parameters`, `steps` and `tokens` of each recipe",
        )
    return about


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
