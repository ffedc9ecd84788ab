"""What a reader of the journal would refuse is never written, whatever an event holds."""

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.codec import DEEPEST
from opt_ops.core.values import Checkpoint, Tier, Verdict
from opt_ops.runfolder.journal import Journal, NotJournalable, read


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1.0, 1.5, -0.0, math.nan, math.inf, -math.inf, 10**25, -(10**400), 2**63,
    "", "x", "\ud800", "a\udcffb", "\x00\u202e\x1b[2J", ["\udfff"], {"\ud800": 1}, [], {}, [1], {"a": 1},
    {"a": math.nan}, {1: 2}, {None: 1}, nested(DEEPEST), nested(DEEPEST + 60), nested(5000), {"a": 10**5000},
    b"bytes", {1, 2}, object(), (1, 2), 1j,
]  # fmt: skip
"""Any JSON value, values that JSON cannot hold, and values that not every reader takes."""


def events_with(value: Any) -> typing.Iterator[e.Event]:
    """Each kind of event with the value in each of its fields, and one level deeper."""
    for cls in e.KINDS.values():
        hints = typing.get_type_hints(cls)
        good = {field.name: _good(hints[field.name]) for field in dataclasses.fields(cls)}
        for name, usual in good.items():
            yield cls(**good | {name: value})
            if isinstance(usual, tuple):
                yield cls(**good | {name: (value,)})
            if isinstance(usual, dict):
                yield cls(**good | {name: {"key": value}})
            if dataclasses.is_dataclass(usual) and not isinstance(usual, type):
                for inner in dataclasses.fields(usual):
                    yield cls(**good | {name: dataclasses.replace(usual, **{inner.name: value})})


def _good(hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return ()
    if origin is not None and "Mapping" in str(hint):
        return {}
    if args:
        return _good(args[0])
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{field.name: _good(hints[field.name]) for field in dataclasses.fields(hint)})
    return {str: "x", int: 1, float: 1.0, bool: True}.get(hint) or next(iter(hint))


@pytest.mark.parametrize("value", ODD, ids=[f"{number}" for number in range(len(ODD))])
def test_what_is_written_is_read_again_as_it_was_folded(tmp_path: Path, value: Any):
    journal, written, refused = Journal(tmp_path / "journal"), [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opt_ops.runfolder.journal.os.fdatasync", lambda _: None)
        for event in events_with(value):
            try:
                entry = journal.stamp(event, 1_795_000_000.5)
            except NotJournalable:
                refused += 1
                continue
            journal.append(entry)
            written.append(entry)
    assert read(tmp_path / "journal") == (written, [])
    assert written or refused


@given(st.text(alphabet=st.characters(exclude_categories=())))
@example("a half of a pair: \ud800")
def test_any_text_is_written_and_read(tmp_path_factory: pytest.TempPathFactory, text: str):
    folder = tmp_path_factory.mktemp("lineage") / "journal"
    journal = Journal(folder)
    journal.append(journal.stamp(e.NoteAdded(request="r", author="ann", target="12", text=text), 0.0))
    journal.close()
    assert read(folder)[0][0].event.text == re.sub("[\ud800-\udfff]", "?", text), "which no encoding has"


def test_a_signal_whose_evidence_overflowed_is_written(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    evidence = {"loss": math.inf, "limits": [math.nan, 2.0]}
    raised = e.SignalRaised(
        signal="loss_spike", tier=Tier.ACT, attempt="1.00-a0", step=7, onset_step=7, at=1.0, rule="x", evidence=evidence
    )
    assert journal.stamp(raised, 0.0).event.evidence == {"loss": None, "limits": [None, 2.0]}
    with pytest.raises(NotJournalable):
        journal.stamp(dataclasses.replace(raised, at=math.nan), 0.0)


def test_wrong_types_are_refused_and_the_next_event_is_written(tmp_path: Path):
    journal = Journal(tmp_path / "journal")
    seen = Checkpoint(run="12.01", step="40", path="/x")
    with pytest.raises(NotJournalable, match=r"checkpoint_seen was left out: .*step is '40', not int"):
        journal.stamp(e.CheckpointSeen(checkpoint=seen), 0.0)
    entry = journal.stamp(e.CheckpointSeen(checkpoint=dataclasses.replace(seen, step=40.0)), 0.0)
    assert entry.event.checkpoint.step == 40
    assert isinstance(entry.event.checkpoint.step, int)
    journal.append(entry)
    assert read(tmp_path / "journal")[0] == [entry]


def test_a_line_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opt_ops.runfolder.journal.LONGEST_LINE", 1000)
    journal = Journal(tmp_path / "journal")
    judged = e.NodeJudged(
        node="n1", host="h", verdict=Verdict.BAD, reason="r", source="s", at=1.0, evidence={"line": "x" * 1000}
    )
    with pytest.raises(NotJournalable, match="at most 1000"):
        journal.stamp(judged, 0.0)
