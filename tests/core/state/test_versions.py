"""Mappings that share their items behave like copies, whichever version is read; and long journals fold fast."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.state.fold import replay
from opt_ops.core.values import Checkpoint, Severity
from opt_ops.core.versions import VersionedSet, Versions


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcde"), st.integers(), st.integers(0, 30))))
def test_every_version_is_as_it_was(changes: list[tuple[int, str, int, int]]):
    versions: list[Versions[int]] = [Versions({"z": 0})]
    copies: list[dict[str, int]] = [{"z": 0}]
    for number, key, value, looked_at in changes:
        base = number % len(versions)  # any version may have several that follow on it
        versions.append(versions[base].with_item(key, value))
        copies.append({**copies[base], key: value})
        at = looked_at % len(versions)
        assert list(versions[at].items()) == list(copies[at].items())
    for version, copy in zip(versions, copies, strict=True):
        assert version == copy
        assert copy == version
        assert list(version) == list(copy)
        assert list(reversed(version)) == list(reversed(copy))
        assert list(version.values()) == list(copy.values())
        assert version.newest() == list(copy.values())[-1]
        assert repr(version) == repr(copy)


def test_a_later_version_does_not_disturb_who_goes_through_an_earlier_one():
    version = Versions({"a": 1, "b": 2})
    seen = []
    for key, value in version.items():
        later = version.with_item(f"{key}+", value)
        seen.append((key, len(later)))
    assert seen == [("a", 3), ("b", 3)]
    assert [key for key in version if version.with_item(key * 2, 0)] == ["a", "b"]


def test_a_set_of_versions_is_a_set():
    first = VersionedSet(["a"])
    second = first.with_member("b")
    assert (first, second) == ({"a"}, {"a", "b"})
    assert second.with_member("b") is second
    assert "c" not in second
    assert list(second) == ["a", "b"]


def _notes(number: int) -> list[e.Event]:
    return [e.NoteAdded(request=f"r{number}", author="ann", target="12", text="x")]


def _alerts(number: int) -> list[e.Event]:
    intended = e.AlertIntended(alert=f"a{number}", severity=Severity.INFO, title="", body="")
    return [intended, e.AlertSettled(alert=f"a{number}", delivered=True, why="")]


def _checkpoints(number: int) -> list[e.Event]:
    checkpoint = Checkpoint(run="12.01", step=number, path=f"/{number}")
    return [e.CheckpointSeen(checkpoint=checkpoint), e.CheckpointRefused(checkpoint=checkpoint, why="torn")]


@pytest.mark.parametrize("kind", [_notes, _alerts, _checkpoints])
def test_a_hundred_thousand_events_fold_in_seconds(kind: Callable[[int], list[e.Event]]):
    events = [event for number in range(60_000) for event in kind(number)][:60_000]
    entries = [e.Entry(seq=seq, epoch=1, ts=0.0, event=event) for seq, event in enumerate(events, 1)]
    began = time.process_time()
    state = replay(entries)
    # About a second of processor time. With one copy for each event it would be more than a minute.
    assert time.process_time() - began < 15
    assert state.seq == 60_000
