"""The journal's vocabulary: growing it is a visible change, and every event survives the way through JSON."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.codec import DecodeError, decode, encode
from opt_ops.core.events import KINDS, Event, kind_of
from opt_ops.core.text import from_iso, to_iso

# Old journals hold these for ever. Adding one is fine; taking one away or renaming it is not.
FROZEN = [
    "afterthought_added",
    "alert_intended",
    "alert_settled",
    "allocation_changed",
    "allocation_failed",
    "allocation_intended",
    "allocation_submitted",
    "attempt_configured",
    "attempt_ended",
    "attempt_intended",
    "attempt_progressed",
    "attempt_started",
    "change_requested",
    "changes_declared",
    "checkpoint_evaluated",
    "checkpoint_refused",
    "checkpoint_sampled",
    "checkpoint_seen",
    "checkpoint_verified",
    "checkpoints_gone",
    "daemon_started",
    "drain_intended",
    "drill_done",
    "drill_requested",
    "driver_changed",
    "energy_metered",
    "evaluation_ended",
    "evaluation_intended",
    "incident_closed",
    "incident_opened",
    "input_left_out",
    "leave_intended",
    "lineage_cancelled",
    "lineage_completed",
    "lineage_halted",
    "lineage_paused",
    "lineage_started",
    "members_failed",
    "members_intended",
    "members_joined",
    "node_allowed",
    "node_drained",
    "node_excluded",
    "node_judged",
    "note_added",
    "pause_requested",
    "probe_ended",
    "probes_intended",
    "probes_judged",
    "proposal_answered",
    "proposal_made",
    "recovery_decided",
    "release_intended",
    "request_refused",
    "resume_requested",
    "run_planned",
    "signal_raised",
    "size_decided",
    "stacks_intended",
    "stacks_taken",
    "standby_seen",
    "stop_intended",
    "stop_requested",
    "stray_cancelled",
    "stray_found",
    "watcher_failed",
    "watcher_recovered",
]

ENVELOPE = {"v", "seq", "epoch", "ts", "kind", "crc"}

_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


def _events(kind: str) -> st.SearchStrategy[Event]:
    cls = KINDS[kind]
    hints = typing.get_type_hints(cls)
    free = {
        field.name: st.dictionaries(st.text(), _json, max_size=3)
        for field in dataclasses.fields(cls)
        if typing.get_origin(hints[field.name]) is not tuple and "Mapping" in str(hints[field.name])
    }
    return st.builds(cls, **free)


def test_the_kinds_are_known_and_only_grow():
    assert sorted(KINDS) == sorted(FROZEN)


@pytest.mark.parametrize("kind", FROZEN)
def test_no_field_hides_one_of_the_journals_envelope(kind: str):
    assert not ENVELOPE & {field.name for field in dataclasses.fields(KINDS[kind])}


@pytest.mark.parametrize("kind", FROZEN)
def test_every_kind_survives_json(kind: str):
    @given(_events(kind))
    def survives(event: Event) -> None:
        assert decode(json.loads(json.dumps(encode(event)))) == event

    survives()


@pytest.mark.parametrize("kind", FROZEN)
def test_every_kind_says_what_it_is(kind: str):
    first = (KINDS[kind].__doc__ or "").split(" ")[0].rstrip(":")
    assert first in ("Observation", "Decision", "Intent", "Outcome")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "levitated"}, "unknown event kind 'levitated'"),
        ({}, "unknown event kind None"),
        ({"kind": "drill_done"}, "drill"),
        ({"kind": "drill_done", "drill": 3}, "drill is 3, not str"),
        ({"kind": "attempt_ended", "attempt": "a", "outcome": "vanished"}, "vanished"),
        ({"kind": "run_planned", "run": "1", "lr_factors": 3}, "lr_factors is not a list"),
    ],
)
def test_what_is_not_an_event_is_refused_with_the_reason(fields: dict, said: str):
    with pytest.raises(DecodeError, match=said):
        decode(fields)


def test_a_field_of_a_newer_version_is_ignored():
    event = decode({"kind": "drill_done", "drill": "d000", "mood": "good"})
    assert kind_of(event) == "drill_done"


@given(st.integers(0, 4_000_000_000_000))
def test_journal_times_keep_their_milliseconds(milliseconds: int):
    text = to_iso(from_iso(to_iso(milliseconds / 1000)))
    assert text == to_iso(milliseconds / 1000)
    assert from_iso(text) == pytest.approx(milliseconds / 1000, abs=0.0011)
