"""The settings before and after an incident."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chronicles import wording
from chronicles.logbook.entries.entry import Change
from chronicles.record import LineageRecord
from chronicles.report.model import IncidentReport
from chronicles.wording import names, rate, whole
from opt_ops.core.state import in_place
from opt_ops.core.state.attempts import Attempt
from opt_ops.core.state.data import changes_of, data_at, in_words, shares


def changes(record: LineageRecord, row: IncidentReport) -> list[Change]:
    """Settings before and after, of those that changed."""
    hit = record.state.attempts.get(row.attempt or "")
    following = record.state.attempts.get(row.next_attempt or "")
    found: list[Change] = []
    if hit and following:
        resumed = following.checkpoint.step if following.checkpoint else 0
        found.append(Change("run", hit.run, following.run))
        found.append(Change("attempt", hit.name, following.name))
        found.append(Change("nodes", *_nodes(hit.nodes, following.nodes)))
        found.append(Change("step", whole(row.last_step), whole(resumed)))
        found.append(Change("learning-rate factors", _factors(record, hit.run), _factors(record, following.run)))
        found += _settings(record, hit, following)
        found.append(Change("skipped batches", _skips(record, hit.run), _skips(record, following.run)))
        found.append(Change("data", _data(record, hit.run, resumed), _data(record, following.run, resumed)))
    members = in_place.joined(record.state, record.state.incidents[row.incident])
    if hit and members:
        before = in_place.replacements(record.state, record.state.incidents[row.incident])[0]
        found.append(Change("nodes", *_nodes(before.before, members.nodes)))
        found.append(Change("generation", whole(before.generation - 1), whole(members.generation)))
    if row.lr_before is not None and row.telling is not None:
        step = row.telling.step
        found.append(Change(f"learning rate at {whole(step)}", rate(row.lr_before), rate(row.lr_after)))
    if row.excluded:
        found.append(Change("excluded nodes", "", names(row.excluded)))
    return [change for change in found if change.before != change.after]


def _nodes(hit: Sequence[str], following: Sequence[str]) -> tuple[str, str]:
    before, after = wording.nodes(hit), wording.nodes(following)
    if after == names(following) and before == names(hit):
        return before, after
    gone = [node for node in hit if node not in following]
    new = [node for node in following if node not in hit]
    after += f", without {wording.nodes(gone)}" if gone else ""
    return before, after + (f", with {wording.nodes(new)}" if new else "")


def _settings(record: LineageRecord, hit: Attempt, following: Attempt) -> Iterator[Change]:
    """The `key=value` settings that differ. Where none was set before, the value that the live attempt reported."""
    requested = record.state.lineage.settings if record.state.lineage else ()
    before, after = (_given((*requested, *record.state.runs[run].settings)) for run in (hit.run, following.run))
    for key in dict.fromkeys((*before, *after)):
        if before.get(key) != after.get(key):
            yield Change(key, before.get(key) or _used(hit, key), after.get(key) or _used(following, key))


def _given(settings: Sequence[str]) -> dict[str, str]:
    pairs = (setting.partition("=") for setting in settings)
    return {key: text for key, _, text in pairs}


def _used(attempt: Attempt, key: str) -> str:
    name = key.removeprefix("optim.")
    for stated in (attempt.optimizer, attempt.schedule):
        if stated is not None and key != name and hasattr(stated, name):
            number = getattr(stated, name)
            return ",".join(f"{each:g}" for each in number) if isinstance(number, tuple) else f"{number:g}"
    return "the recipe's"


def _data(record: LineageRecord, run: str, step: int) -> str:
    """What a run is trained on after a step, and what it changes to later."""
    state = record.state
    now = in_words(shares(data_at(state, state.runs[run], step)))
    later = [f"{what} after {whole(since)}" for since, what in changes_of(state, state.runs[run]) if since > step]
    return "; ".join([now, *later])


def _skips(record: LineageRecord, run: str) -> str:
    return ", ".join(f"{whole(s.first)} to {whole(s.last)}" for s in record.state.runs[run].skips) or "none"


def _factors(record: LineageRecord, run: str) -> str:
    factors = record.state.runs[run].lr_factors
    return ", ".join(f"× {factor.factor:g} after {whole(factor.step)}" for factor in factors) or "none"
