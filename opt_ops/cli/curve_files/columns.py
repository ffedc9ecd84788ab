"""Which column of a file is the step, the loss, …: by known names, or by what a person says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from opt_ops.cli.curve_files.files import SAMPLE_ROWS, Rows
from opt_ops.errors import UsageError

_KNOWN: Mapping[str, tuple[str, ...]] = {
    "step": (
        *(
            "global_step",
            "step",
            "num_updates",
            "iteration",
            "iter",
            "update",
            "updates",
            "train_step",
            "training_step",
        ),
        *("steps", "iterations", "opt_step", "optimizer_step", "_step", "it"),
    ),
    "loss": (
        *(
            "loss",
            "lm_loss",
            "train_loss",
            "training_loss",
            "loss_train",
            "loss/train",
            "loss/train/total",
            "loss_step",
        ),
        *(
            "train_loss_step",
            "cross_entropy_loss",
            "crossentropyloss",
            "ce_loss",
            "nll_loss",
            "total_loss",
            "loss_total",
        ),
    ),
    "grad_norm": (
        *("grad_norm", "gnorm", "gradient_norm", "gradnorm", "global_grad_norm", "total_grad_norm", "grad_norm/total"),
        *("grad_norm/global", "grad/norm", "norm/grad", "l2_norm/grad/global", "gradient/norm", "grad_2_norm"),
    ),
    "lr": (
        *(
            "lr",
            "learning_rate",
            "learning_rate_group0",
            "lr_group0",
            "lr/group0",
            "lr_adamw",
            "lr_adamw/pg1",
            "lr/pg1",
        ),
        *("lr_adam", "lr_adam/pg1", "lr_decoupledadamw/group0", "lr_schedule", "lr_0", "lr/0"),
    ),
    "loss_scale": ("loss_scale", "grad_scale", "scaler_scale", "grad_scaler_scale", "amp_scale", "amp_loss_scale"),
    "skip": ("skip", "skipped", "skipped_step", "overflow", "found_inf", "skipped_iterations", "is_skipped"),
    "attempt": ("attempt", "attempt_id"),
    "batch": ("batch", "bsz", "batch_size", "global_batch_size", "global_bsz"),
    "tokens": ("wpb", "tokens_per_step", "tokens_per_batch", "batch_tokens", "tokens_per_update", "tokens"),
    "stage": ("stage", "data_stage", "data_mix"),
    "run": ("run", "run_id", "run_name"),
    "finite": ("finite",),
}
"""By what we call a column: the names that other tools have for it, the surest first."""
_PREFIXES = ("", "train/", "training/", "trainer/", "train_inner/", "optim/", "optimizer/", "metrics/", "global/")
_SAID = {"bsz": "batch", "gnorm": "grad_norm", "wpb": "tokens"}
_OTHER_LOSS = re.compile(r"val|eval|test|dev|scale|aux|mtp|z_?loss|balanc|holdout")
_SHOWN = 24
_NAMES = tuple(name for name in _KNOWN if name not in ("run", "finite"))


def chosen(path: Path, rows: Rows, said: Sequence[str]) -> dict[str, str]:
    """The columns of a file, by what they are.

    Args:
        path: of the file, for the errors.
        rows: the file.
        said: what a person says: `loss=train/loss`. `lr=` says that there is none.

    Raises:
        UsageError: a name or a column is not known, step or loss are not found, or two columns may be one of them.
    """
    found = dict(_said(path, rows.columns, said))
    known = _recognised(rows.columns)
    for name in _KNOWN:
        if name not in found and name not in ("step", "loss"):
            found[name] = _only(path, name, known[name])
    if "loss" not in found:
        found["loss"] = _loss(path, rows, known["loss"])
    if "step" not in found:
        found["step"] = _step(rows, known["step"], found["loss"])
    if missing := [name for name in ("step", "loss") if not found[name]]:
        raise _missing(path, rows.columns, missing)
    by_hand = {_SAID.get(name, name) for name in (each.partition("=")[0].strip() for each in said)}
    for name in ("batch", "tokens"):  # a number that rises with every line counts them all until then
        if found[name] and name not in by_hand and _counts_up(rows, found[name]):
            found[name] = ""
    return {name: column for name, column in found.items() if column}


def _recognised(columns: Sequence[str]) -> dict[str, list[list[str]]]:
    """For each name the columns that may be it: a list for each degree of certainty, the surest first."""
    by_plain: dict[str, list[str]] = {}
    for column in columns:
        plain = _plain(column)
        if not plain.endswith(("__min", "__max")):
            by_plain.setdefault(plain, []).append(column)
    if {"wall_time", "step", "value"} <= set(by_plain):  # TensorBoard's scalars: one tag, and nothing names it
        by_plain["loss"] = by_plain["value"]
    return {
        name: [by_plain[prefix + alias] for alias in aliases for prefix in _PREFIXES if prefix + alias in by_plain]
        for name, aliases in _KNOWN.items()
    }


def _plain(column: str) -> str:
    """`my-run - train/Learning Rate` is `train/learning_rate`. W&B's own exports put the run's name before a metric."""
    metric = column.rsplit(" - ", 1)[-1].strip().lower()
    return re.sub(r"[\s\-]+", "_", metric).replace(".", "/").replace("::", "/")


def _only(path: Path, name: str, known: Sequence[Sequence[str]]) -> str:
    if known and len(known[0]) > 1:
        raise _ambiguous(path, name, known[0])
    return known[0][0] if known else ""


def _loss(path: Path, rows: Rows, known: list[list[str]]) -> str:
    """The surest column that holds anything. Without a known name, the only one that is called a loss of training."""
    if not known:
        plain = {column: _plain(column) for column in rows.columns}
        known = [
            [c for c, name in plain.items() if "loss" in name and not _OTHER_LOSS.search(name) and name[-5:-3] != "__"]
        ]
        return known[0][0] if len(known[0]) == 1 else ""
    certain = [_only(path, "loss", known), *(same[0] for same in known[1:] if len(same) == 1)]
    filled = (column for column in certain if any(_filled(cells[0]) for cells in _sample(rows, [column])))
    return next(filled, certain[0])


def _step(rows: Rows, known: Sequence[Sequence[str]], loss: str) -> str:
    """The surest column that is filled wherever there is a loss: W&B has a step of its own beside the trainer's."""
    candidates = [column for same in known for column in same if len(same) == 1]
    for column in candidates if loss else ():
        cells = [step for step, value in _sample(rows, [column, loss]) if _filled(value)]
        if cells and all(map(_filled, cells)):
            return column
    return candidates[0] if candidates else ""


def _counts_up(rows: Rows, column: str) -> bool:
    values: list[float] = []
    for (cell,) in _sample(rows, [column]):
        try:
            values.append(float(cell))
        except (TypeError, ValueError):
            continue
    return len(values) > 2 and all(now > before for before, now in pairwise(values))


def _sample(rows: Rows, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    return (cells for _, cells in islice(rows.read(columns), SAMPLE_ROWS))


def _filled(cell: Any) -> bool:
    return cell is not None and cell != ""


def _said(path: Path, columns: Sequence[str], said: Sequence[str]) -> Iterator[tuple[str, str]]:
    for each in said:
        name, equals, column = each.partition("=")
        name, column = name.strip(), column.strip()
        name = _SAID.get(name, name)
        if not equals or name not in _NAMES:
            raise UsageError(
                f"--column {each!r} names no column: {', '.join(_NAMES)} can be named",
                "give NAME=COLUMN, such as --column loss=train/loss",
            )
        if not column and name not in ("step", "loss"):
            yield name, ""
            continue
        same = [c for c in columns if c == column] or [
            c for c in columns if c.rsplit(" - ", 1)[-1].strip().lower() == column.lower()
        ]
        if len(same) != 1:
            close = get_close_matches(column, columns, 1, 0.5)
            raise UsageError(
                f"{path} has {'no' if not same else 'more than one'} column {column}; it has {listed(columns)}",
                f"--column {_quoted(name, (same or close or ['COLUMN'])[0])}",
            )
        yield name, same[0]


def _missing(path: Path, columns: Sequence[str], missing: Sequence[str]) -> UsageError:
    hints: list[str] = []
    for name in missing:
        close = [c for c in columns if name in c.lower() and not _OTHER_LOSS.search(c.lower())]
        hints.append(f"--column {_quoted(name, (close or ['COLUMN'])[0])}")
    return UsageError(
        f"{path}, line 1: no column {' or '.join(missing)} in {listed(columns) or 'an empty file'}",
        f"say which column it is: {' '.join(hints)}" if columns else "give a file with the columns step and loss",
    )


def _ambiguous(path: Path, name: str, columns: Sequence[str]) -> UsageError:
    return UsageError(
        f"{path}: more than one column may be {name}: {listed(columns)}",
        f"say which one it is: --column {_quoted(name, columns[0])}",
    )


def listed(columns: Sequence[str]) -> str:
    """The names of columns for an error. Of very many, those with a loss or a step come first."""
    if len(columns) <= _SHOWN:
        return ", ".join(columns)
    likely = [c for c in columns if re.search("loss|step|iter", c.lower()) and not re.search("__(MIN|MAX)$", c)]
    first = list(dict.fromkeys([*likely, *columns]))[:_SHOWN]
    return f"{', '.join(first)} and {len(columns) - _SHOWN} more"


def _quoted(name: str, column: str) -> str:
    return f"{name}={column}" if re.fullmatch(r"[\w/.\-]+", column) else f"'{name}={column}'"
