"""What a run is trained on, and how its data changes.

Corpora are texts as `run start --data` takes them: `[NAME=]PATH[:WEIGHT]`. The disk is not looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from opt_ops.contract.data_since import CAPABILITY
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import State
from opt_ops.core.values import DataSince

_CORPUS = re.compile(r"(?:([\w.-]+)=)?(.+?)(?::(\d+|\d*\.\d+))?", re.DOTALL)

BUILT_IN = "stdlib"
"""The name that the trainer gives to the corpus of a lineage without `--data`."""

UNNAMED = "data"
"""The name that the trainer gives to the one corpus that paths without weights are."""


def data_of(state: State, run: Run) -> tuple[DataSince, ...]:
    """What a run is trained on, by step: first from step 0 on, then after each step at which it changes."""
    first = DataSince(step=0, data=state.intent.data)
    return tuple([each for each in run.data if each.step == 0][-1:] or [first]) + tuple(
        each for each in run.data if each.step > 0
    )


def data_words(state: State, run: Run) -> list[str]:
    """The options of a trainer's command line for the data of a run."""
    first, *later = data_of(state, run)
    words = [word for corpus in first.data for word in ("--data", corpus)]
    return words + [
        word for each in later for corpus in each.data for word in ("--data-since", f"{each.step}:{corpus}")
    ]


def data_at(state: State, run: Run, step: int) -> tuple[str, ...]:
    """What the update after `step` is trained on."""
    return [each for each in data_of(state, run) if each.step <= step][-1].data


def data_now(state: State, run: Run) -> tuple[str, ...]:
    """What the newest run is trained on, as far as it is known how far it has come."""
    return data_at(state, run, _newest_step(state, run))


def later_changes(state: State, run: Run) -> list[int]:
    """The steps still to come after which the data changes: planned from the start, or kept by a rollback."""
    return [each.step for each in data_of(state, run) if each.step > _newest_step(state, run)]


def _newest_step(state: State, run: Run) -> int:
    attempt, checkpoint = state.attempt, run.checkpoint
    if attempt is not None and attempt.run == run.name:
        if attempt.last_step is not None:
            return attempt.last_step
        checkpoint = attempt.checkpoint
    return checkpoint.step if checkpoint is not None else 0


def why_data_stays(state: State) -> str:
    """Why the data of a lineage cannot be changed while it goes on; empty if it can."""
    told = [attempt for attempt in state.attempts.values() if attempt.schedule is not None]
    if not told:
        return "the data cannot be changed yet: no attempt has reported what its trainer can do"
    if CAPABILITY not in told[-1].capabilities:
        return (
            f"the trainer cannot change its data while a lineage goes on: config.json of {told[-1].name} does not name "
            f"the capability {CAPABILITY}; docs/contract.md says what that needs"
        )
    return ""


def parts_of(corpus: str) -> tuple[str | None, str, float | None]:
    """The name, the path and the weight in `[NAME=]PATH[:WEIGHT]`; None for what it does not say."""
    found = _CORPUS.fullmatch(corpus)
    if found is None:
        return None, corpus, None
    return found[1], found[2], float(found[3]) if found[3] else None


def shares(data: Sequence[str]) -> Mapping[str, float]:
    """The share of each corpus by the name that the trainer gives it, at most 1 together."""
    parts = [parts_of(each) for each in data]
    if not parts:
        return {BUILT_IN: 1.0}
    if len(parts) == 1 and parts[0][0] is not None:
        return {parts[0][0]: 1.0}  # a name alone needs no weight
    weights = {name or _stem(path): weight or 0.0 for name, path, weight in parts}
    whole = sum(weights.values())
    return {name: weight / whole for name, weight in weights.items()} if whole else {UNNAMED: 1.0}


def in_words(shares: Mapping[str, float]) -> str:
    """Shares by corpus: `wiki 50 %, code 50 %`."""
    return ", ".join(f"{name} {_percent(share)}" for name, share in shares.items())


def change_of(before: Sequence[str], after: Sequence[str]) -> str:
    """What of the data changes: `+ code 10 %, wiki 50 % → 40 %, − books`."""
    old, new = shares(before), shares(after)
    found = [f"+ {name} {_percent(share)}" for name, share in new.items() if name not in old]
    found += [
        f"{name} {_percent(old[name])} → {_percent(share)}"
        for name, share in new.items()
        if name in old and _percent(old[name]) != _percent(share)
    ]
    found += [f"− {name}" for name in old if name not in new]
    return ", ".join(found) or "the same shares of other files"


def renamed(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    """Corpora whose text stays under another name, (old, new): the trainer takes the new one for another corpus."""
    names = dict(map(_named, before))
    if before and set(shares(before)) == {UNNAMED}:
        names = dict.fromkeys(names, UNNAMED)
    pairs = [(names.get(path), name) for path, name in map(_named, after)]
    return [(old, new) for old, new in pairs if old is not None and old != new]


def _named(corpus: str) -> tuple[str, str]:
    name, path, _ = parts_of(corpus)
    return path, name or _stem(path)


def changes_of(state: State, run: Run) -> list[tuple[int, str]]:
    """The steps after which the data of a run changes, each with what changes."""
    return [(each.step, change_of(before.data, each.data)) for before, each in pairwise(data_of(state, run))]


def _stem(path: str) -> str:
    last = path.rstrip("/").rpartition("/")[2]
    return last.rpartition(".")[0] or last


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
