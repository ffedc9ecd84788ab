"""The report as plain JSON values: the only place where a time becomes ISO 8601 and a field becomes a key.

A field's metadata may name its key in JSON (`key`, empty for none), or say that the fields of its value stand beside
its own (`flat`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any

from chronicles.record import Moment
from chronicles.report.model import IncidentReport, LineageReport
from opt_ops.core.text import to_iso

SCHEMA = "opt-ops/report/1"

_ROW = ("incident", "kind", "drill", "cause", "action", "in_place", "steps_lost", "seconds_down", "proven")
_ROW += ("opened", "closed")
_IN_PLACE = ("generation", "ranks_replaced", "pids_kept", "steps_repeated", "fell_back")
_FINDING = ("detector", "evidence", "attempt", "nodes", "step_failed", "onset_step", "playbook", "rung", "why")


def lineage(report: LineageReport) -> dict[str, Any]:
    """The object of `report.json`."""
    return {"schema": SCHEMA, **encode(report)}


def incident_row(incident: IncidentReport) -> dict[str, Any]:
    """An incident as `opt-ops run show` lists it: some keys of `report.json`."""
    return _some(encode(incident), *_ROW)


def explanation(incident: IncidentReport) -> dict[str, Any]:
    """An incident as `opt-ops run explain` shows it: some keys of `report.json`, and the journal's entries."""
    known = encode(incident)
    return {
        **_some(known, *_ROW),
        "opened_entry": incident.opened_entry,
        "decided_entry": incident.decided_entry,
        **_some(known, *_FINDING),
        "checkpoint": incident.decided_checkpoint_step,
        "lr_factor": incident.lr_factor,
        "exclude": known["excluded"],
        **_some(known, *_IN_PLACE, "settings", "skip_batches", "advice"),
        "stacks": _some(known["stacks"], "groups", "odd", "silent") if incident.stacks else None,
        **_some(known, "next_attempt", "proof", "causes", "probes", "for_cause", "remedy", "afterthoughts"),
    }


def _some(known: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: known[key] for key in keys}


def encode(item: Any) -> Any:
    """Any value of a report as plain JSON values."""
    if isinstance(item, Moment):
        return to_iso(item)
    if isinstance(item, StrEnum):
        return item.value
    if item is None or isinstance(item, (str, int, float)):
        return item
    if isinstance(item, Mapping):
        return {str(key): encode(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [encode(each) for each in item]
    return dict(_encoded(item))


def _encoded(item: Any) -> Iterator[tuple[str, Any]]:
    for name, key, flat in _keys(type(item)):
        value = getattr(item, name)
        if flat:
            yield from _encoded(value)
        else:
            yield key, encode(value)


@cache
def _keys(kind: type) -> tuple[tuple[str, str, bool], ...]:
    """Name, key and whether its value is flat, of every field that has a key."""
    assert is_dataclass(kind), f"{kind} is no part of a report"
    found = [(each.name, each.metadata.get("key", each.name), "flat" in each.metadata) for each in fields(kind)]
    return tuple(each for each in found if each[1])
