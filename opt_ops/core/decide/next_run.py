"""Under which settings the next run trains: what it keeps of the run before, and what is new.

An operator's rollback takes back what was changed after the step that it goes back to: learning-rate factors,
settings of the optimizer and skipped batches. A playbook's rollback multiplies the present learning rate, as
docs/playbooks.md says, and keeps the rest. Both bring back the data of the step that they go back to. The cure of a
cause takes back what was tried for the same trouble in vain: cuts of the learning rate, and settings. Batches that were
skipped stay skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opt_ops.core.decide.proof import baseline, with_settings
from opt_ops.core.events import ChangeRequested, RecoveryDecided
from opt_ops.core.schedule import PlannedLr, batch_of
from opt_ops.core.state.attempts import Run
from opt_ops.core.state.model import Incident, State
from opt_ops.core.values import Action, DataSince, LrFactor, Skip

_MOST_AT_ZERO = 8  # updates behind a checkpoint that are looked at for one with a learning rate above zero


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run trains under, on top of the lineage's settings."""

    lr_factors: tuple[LrFactor, ...]
    settings: tuple[str, ...]
    skips: tuple[Skip, ...]
    data: tuple[DataSince, ...] = ()


def settings_after(state: State, incident: Incident, decision: RecoveryDecided, step: int) -> RunSettings:
    """The settings of the run that a decision begins at checkpoint `step`, after the newest run."""
    assert state.run is not None
    run, change = state.run, state.changes.get(str(incident.evidence.get("request")))
    kept = RunSettings(lr_factors=run.lr_factors, settings=run.settings, skips=run.skips, data=run.data)
    if decision.takes_back and (before := _run_before(state, decision.takes_back[0])) is not None:
        kept = replace(kept, lr_factors=before.lr_factors, settings=before.settings)
    factor = decision.lr_factor
    if decision.action is Action.ROLLBACK and change is not None and not change.keep_later:
        kept = begun_by(state, run, step)
    elif decision.action is Action.ROLLBACK and change is None and factor is not None:
        # The present factor times the playbook's: else the rate would fall again, by itself, where the old one began.
        factor *= math.prod(each.factor for each in run.lr_factors if each.step > step)
        kept = replace(kept, lr_factors=tuple(each for each in run.lr_factors if each.step <= step))
    if decision.action is Action.ROLLBACK and not (change is not None and change.keep_later):
        kept = replace(kept, data=begun_data(state, run, step))
    if factor is None and change is not None and change.lr is not None:
        factor = _factor_to(state, change.lr, kept.lr_factors, (*kept.settings, *decision.settings), step)
    first = batch_of(step + 1, kept.skips)
    skipped = [Skip(first=first, last=first + decision.skip_batches - 1)] if decision.skip_batches else []
    return RunSettings(
        lr_factors=(*kept.lr_factors, *([] if factor is None else [LrFactor(step=step, factor=factor)])),
        settings=(*kept.settings, *decision.settings),
        skips=(*kept.skips, *skipped, *decision.skips),
        data=_with_data(kept.data, change, step),
    )


def _with_data(data: tuple[DataSince, ...], change: ChangeRequested | None, step: int) -> tuple[DataSince, ...]:
    """What an operator asked for replaces all that was to be trained on after `step`."""
    if change is None or not change.data:
        return data
    return (*(each for each in data if each.step < step), DataSince(step=step, data=change.data))


def begun_data(state: State, run: Run, step: int) -> tuple[DataSince, ...]:
    """The changes of a run's data up to a step, and those that were planned from the start.

    What an operator asked for up to that step has replaced all that was planned.
    """
    begun, planned = tuple(each for each in run.data if each.step <= step), state.intent.data_since
    if any(each not in planned for each in begun):
        return begun
    return (*begun, *(each for each in planned if each.step > step))


def _run_before(state: State, incident: str) -> Run | None:
    """The run that an incident hit, before anything was tried."""
    hit = state.attempts.get(state.incidents[incident].attempt or "")
    return state.runs.get(hit.run) if hit is not None else None


def _factor_to(
    state: State, lr: float, factors: tuple[LrFactor, ...], settings: tuple[str, ...], step: int
) -> float | None:
    """The factor that makes the learning rate of the update after `step` what an operator asked for."""
    if (known := baseline(state)) is None:
        return None
    planned = PlannedLr(schedule=with_settings(*known, settings)[0], factors=factors)
    return factor_to(lr, planned, step)


def factor_to(lr: float, planned: PlannedLr, step: int) -> float | None:
    """The factor that makes the learning rate `lr` in the update after `step`; None: no factor does.

    Where that update's rate is zero, as in the first of a warm-up, the next one that is not zero decides.
    """
    rates = (planned.at(each) for each in range(step + 1, step + 2 + _MOST_AT_ZERO))
    found = next((rate for rate in rates if rate), None)
    factor = lr / found if found else 0.0
    return factor if 0.0 < factor < math.inf else None


def begun_by(state: State, run: Run, step: int) -> RunSettings:
    """What of a run's settings was in force for the update after `step` already.

    What is not of the optimizer, as the number of steps, stays in any case.
    """
    trained = batch_of(step, run.skips) if step else 0
    return RunSettings(
        lr_factors=tuple(each for each in run.lr_factors if each.step <= step),
        settings=tuple(
            setting for since, setting in _settings_since(state, run) if since <= step or not _of_optimizer(setting)
        ),
        skips=tuple(each for each in run.skips if each.first <= trained + 1),
        data=begun_data(state, run, step),
    )


def _of_optimizer(setting: str) -> bool:
    return setting.startswith("optim.")


def _settings_since(state: State, run: Run) -> list[tuple[int, str]]:
    """The settings of a run, each with the step after which it holds."""
    incident = state.incidents.get(run.incident or "")
    new = incident.decision.settings if incident is not None and incident.decision is not None else ()
    parent = state.runs.get(run.parent or "")
    inherited = iter(_settings_since(state, parent) if parent is not None else ())
    kept = [
        next((known for known in inherited if known[1] == setting), (0, setting))
        for setting in run.settings[: len(run.settings) - len(new)]
    ]
    return [*kept, *((run.checkpoint.step if run.checkpoint else 0, setting) for setting in new)]
