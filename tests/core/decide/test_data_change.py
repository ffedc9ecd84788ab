"""Other data from a step on: who is told what, what a rollback and a fork take over, and what the detectors expect."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.cli.shared import preview as dry_run
from opt_ops.config import Config
from opt_ops.contract.data_since import CAPABILITY
from opt_ops.core import events as e
from opt_ops.core.codec import decode, encode
from opt_ops.core.decide.next_run import begun_by
from opt_ops.core.state.data import (
    change_of,
    changes_of,
    data_at,
    data_now,
    data_words,
    later_changes,
    parts_of,
    renamed,
    shares,
)
from opt_ops.core.state.model import State
from opt_ops.core.state.planned import planned_changes
from opt_ops.core.told import told
from opt_ops.core.values import DataSince, Severity
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import POLICY, Story, only

OLD = ("wiki=/d/wiki:0.5", "books=/d/books:0.5")
NEW = ("wiki=/d/wiki:0.9", "code=/d/code:0.1")


def asked(story: Story, **arguments: object) -> e.Event:
    request = Request(
        request=f"r{len(story.entries)}", author="ann", verb="change", arguments={"reason": "because", **arguments}
    )
    return event_of(story.state, request)


def changed(story: Story, **arguments: object) -> e.ChangeRequested:
    event = asked(story, **arguments)
    assert isinstance(event, e.ChangeRequested), event
    story.see(event)
    attempt = story.state.attempt
    assert attempt is not None
    if attempt.leave_at is not None and attempt.stop_at is None:
        story.checkpoint(attempt.last_step or 0)
    story.ends()
    return event


def lineage(
    step: int = 195, checkpoints: tuple[int, ...] = (50, 100, 190), planned: tuple[DataSince, ...] = ()
) -> Story:
    story = Story(dataclasses.replace(POLICY, least_alert=Severity.INFO))
    story.capabilities = (CAPABILITY,)
    story.daemon()
    story.see(
        e.LineageStarted(
            request="r0",
            author="ann",
            lineage="12",
            recipe="opt-tiny",
            settings=(),
            data=OLD,
            shape=story.shape,
            data_since=planned,
        )
    )
    story.hold()
    story.train(step)
    for each in checkpoints:
        story.checkpoint(each)
    return story


def with_change() -> Story:
    """The data was changed at step 195, and training is at 240 with a checkpoint at 230."""
    story = lineage()
    changed(story, data=list(NEW))
    story.train(240)
    story.checkpoint(230)
    return story


def words(story: Story) -> list[str]:
    assert story.state.run is not None
    return data_words(story.state, story.state.run)


def test_the_next_run_goes_on_from_the_step_it_has_come_to_and_is_told_both() -> None:
    story = with_change()
    run = story.state.run
    assert run is not None
    assert (run.name, run.checkpoint and run.checkpoint.step) == ("12.01", 195)
    assert run.data == (DataSince(step=195, data=NEW),)
    assert words(story) == [
        *("--data", OLD[0], "--data", OLD[1]),
        *("--data-since", f"195:{NEW[0]}", "--data-since", f"195:{NEW[1]}"),
    ]
    assert changes_of(story.state, run) == [(195, "+ code 10 %, wiki 50 % → 90 %, − books")]


def test_a_second_change_goes_on_top_and_one_at_the_same_step_replaces_it() -> None:
    story = with_change()
    changed(story, data=list(OLD))
    assert [each.step for each in story.state.run.data] == [195, 240]
    changed(story, to_step=195, keep_later=True, data=["/d/wiki"])
    assert [(each.step, each.data) for each in story.state.run.data] == [(195, ("/d/wiki",))]


def test_an_operators_rollback_to_before_the_change_brings_the_old_data_back() -> None:
    story = with_change()
    changed(story, to_step=194)
    assert story.state.run.checkpoint.step == 190
    assert (story.state.run.data, words(story)) == ((), ["--data", OLD[0], "--data", OLD[1]])


@pytest.mark.parametrize("step", [195, 230])
def test_a_rollback_to_the_change_or_behind_it_keeps_the_new_data(step: int) -> None:
    story = with_change()
    changed(story, to_step=step)
    assert [each.step for each in story.state.run.data] == [195]


PLANNED = (DataSince(step=300, data=NEW),)


def test_a_request_to_start_may_have_the_whole_plan() -> None:
    arguments = {
        "lineage": "12",
        "recipe": "opt-tiny",
        "settings": [],
        "data": list(OLD),
        "tokenizer": None,
        "shape": {"nodes": 1, "spares": 0, "ranks_per_node": 1},
    }

    def start(*changes: object) -> e.Event:
        given = {**arguments, "data_since": list(changes)}
        return event_of(State(), Request(request="r0", author="ann", verb="start", arguments=given))

    planned = start({"step": 300, "data": list(NEW)}, {"step": 400, "data": ["/d/wiki"]})
    assert isinstance(planned, e.LineageStarted)
    assert planned.data_since == (*PLANNED, DataSince(step=400, data=("/d/wiki",)))
    for wrong in ({"step": 0, "data": ["/d"]}, {"step": 300, "data": []}, {"step": 500, "data": ["/d"]}, "300:/d"):
        assert isinstance(start(wrong, {"step": 400, "data": ["/d"]}), e.RequestRefused), wrong


def test_what_was_planned_from_the_start_stays_planned_when_a_rollback_goes_back() -> None:
    story = lineage(planned=PLANNED)
    assert words(story)[4:] == ["--data-since", f"300:{NEW[0]}", "--data-since", f"300:{NEW[1]}"]
    changed(story, to_step=100)
    assert story.state.run.data == PLANNED
    story.train(350)
    story.checkpoint(230)
    alert = only(story.spike(350, 345), e.AlertIntended)
    story.ends()
    assert isinstance(alert, e.AlertIntended)
    assert "is trained on again" not in alert.body
    assert (story.state.run.checkpoint.step, story.state.run.data) == (230, PLANNED)
    assert begun_by(story.state, story.state.run, 230).data == PLANNED, "a fork takes the plan over"


def test_what_an_operator_asks_for_replaces_the_plan_until_it_is_taken_back() -> None:
    story = lineage(planned=PLANNED)
    assert later_changes(story.state, story.state.run) == [300]
    assert data_now(story.state, story.state.run) == OLD
    changed(story, data=["/d/wiki"])
    assert story.state.run.data == (DataSince(step=195, data=("/d/wiki",)),)
    story.train(240)
    story.checkpoint(230)
    changed(story, to_step=230)
    assert [each.step for each in story.state.run.data] == [195]
    changed(story, to_step=100)
    assert story.state.run.data == PLANNED


def test_a_change_that_is_kept_for_later_is_not_the_data_of_now() -> None:
    story = with_change()
    changed(story, to_step=100, keep_later=True)
    assert (data_now(story.state, story.state.run), later_changes(story.state, story.state.run)) == (OLD, [195])
    assert told(asked(story, data=list(NEW)), story.state) == (
        "ann asked to go on with other data: + code 10 %, wiki 50 % → 90 %, − books: “because”"
    )


def test_later_data_is_kept_by_an_explicit_word() -> None:
    story = with_change()
    changed(story, to_step=100, keep_later=True)
    assert story.state.run.checkpoint.step == 100
    assert [each.step for each in story.state.run.data] == [195], "from step 196 on it is the new data again"


@pytest.mark.parametrize(("onset", "resumed", "kept"), [(200, 100, []), (345, 230, [195])])
def test_a_playbooks_rollback_does_the_same_and_on_call_hears_of_it(onset: int, resumed: int, kept: list[int]) -> None:
    story = with_change()
    story.train(350)
    decided = story.spike(350, onset)
    alert = only(decided, e.AlertIntended)
    assert isinstance(alert, e.AlertIntended)
    assert ("data: that of before step 195 is trained on again" in alert.body) is (not kept), alert.body
    story.ends()
    run = story.state.run
    assert (run.name, run.checkpoint.step, [each.step for each in run.data]) == ("12.02", resumed, kept)


def test_a_restart_from_an_older_checkpoint_stays_in_the_run_with_both() -> None:
    story = with_change()
    for path in [path for path, known in story.state.checkpoints.items() if known.checkpoint.step >= 195]:
        story.see(e.CheckpointRefused(checkpoint=story.state.checkpoints[path].checkpoint, why="torn"))
    story.rank_dies(240)
    story.ends()
    attempt = story.state.attempt
    assert (attempt.run, attempt.checkpoint.step) == ("12.01", 190)
    story.train(200)
    assert [(each.step, each.what) for each in planned_changes(story.state)] == [
        (196, "data: + code 10 %, wiki 50 % → 90 %, − books")
    ]


def test_the_detectors_expect_it_once_and_not_at_a_later_restart() -> None:
    story = with_change()
    expected = [(196, "data: + code 10 %, wiki 50 % → 90 %, − books")]
    assert [(each.step, each.what) for each in planned_changes(story.state)] == expected
    story.rank_dies(240)
    story.ends()
    story.train(250)
    assert [(each.step, each.what) for each in planned_changes(story.state)] == expected
    changed(story, to_step=100)
    story.train(120)
    assert planned_changes(story.state) == ()


def test_a_fork_takes_the_data_in_force_at_its_step() -> None:
    story = with_change()
    run = story.state.run
    assert begun_by(story.state, run, 190).data == ()
    assert begun_by(story.state, run, 230).data == run.data
    assert data_at(story.state, run, 194) == OLD
    assert data_at(story.state, run, 195) == NEW


@pytest.mark.parametrize(
    ("capabilities", "why"), [((), "does not name the capability data_since"), (("warm_start",), "12.00-a0")]
)
def test_a_trainer_that_cannot_is_not_stopped_for_it(capabilities: tuple[str, ...], why: str) -> None:
    story = Story()
    story.capabilities = capabilities
    refused = asked(story.training(195), data=list(NEW))
    assert isinstance(refused, e.RequestRefused)
    assert why in refused.why


def test_before_a_trainer_has_reported_it_is_not_known() -> None:
    story = Story()
    story.begin()
    story.hold()
    refused = asked(story, data=list(NEW))
    assert isinstance(refused, e.RequestRefused)
    assert "no attempt has reported" in refused.why


def test_sentences_name_what_changes() -> None:
    story = lineage()
    event = asked(story, data=list(NEW))
    assert told(event, story.state) == (
        "ann asked to go on with other data: + code 10 %, wiki 50 % → 90 %, − books: “because”"
    )
    before = story.state
    changed(story, data=list(NEW))
    (planned,) = [each.event for each in story.entries if isinstance(each.event, e.RunPlanned)][1:]
    assert "other data after step 195" in told(planned, before)
    before = story.state
    changed(story, to_step=100)
    (planned,) = [each.event for each in story.entries if isinstance(each.event, e.RunPlanned)][2:]
    assert "the data of before step 195" in told(planned, before)
    assert told(planned, None) == "next run 12.02 from step 100 (12-i001)"


def test_a_dry_run_names_what_changes_and_what_a_rollback_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "site_policy", lambda _: POLICY)

    def said(story: Story, **arguments: object) -> str:
        coming = dry_run.preview(story.state, asked(story, **arguments), story.now, Config())
        return "; ".join(f"{verb} {rest}" for each in coming for verb, rest in each.lines)

    words = said(lineage(), data=list(NEW))
    assert "begin the next run there, with other data: + code 10 %, wiki 50 % → 90 %, − books" in words
    saved = lineage()
    saved.checkpoint(saved.state.attempt.last_step + 5 if saved.state.attempt and saved.state.attempt.last_step else 0)
    assert said(saved, data=list(NEW)).count("end 12.00-a0") == 1, (
        "the checkpoint is newer than the journal's last step"
    )
    assert "drop the data since step 195" in said(with_change(), to_step=100)


def test_events_without_data_read_as_before() -> None:
    planned = {
        "kind": "run_planned",
        "run": "12.00",
        "parent": None,
        "cause": "start",
        "incident": None,
        "checkpoint": None,
        "lr_factors": [],
    }
    old = decode(planned)
    assert isinstance(old, e.RunPlanned)
    assert old.data == ()
    event = dataclasses.replace(old, data=(DataSince(step=195, data=NEW),))
    assert decode({"kind": "run_planned", **encode(event)}) == event


@pytest.mark.parametrize(
    ("corpus", "parts"),
    [
        ("/d/wiki", (None, "/d/wiki", None)),
        ("wiki=/d/w:0.25", ("wiki", "/d/w", 0.25)),
        ("/d/a:b/c.jsonl:2", (None, "/d/a:b/c.jsonl", 2.0)),
        ("n=/d/x=y", ("n", "/d/x=y", None)),
    ],
)
def test_a_corpus_has_a_name_a_path_and_a_weight(corpus: str, parts: tuple[object, ...]) -> None:
    assert parts_of(corpus) == parts


def test_what_changes_in_words() -> None:
    assert change_of((), ("/d/wiki.jsonl:1",)) == "+ wiki 100 %, − stdlib"
    assert change_of(("/d/a",), ("/d/b",)) == "the same shares of other files"
    assert change_of(("/d/a:1", "/d/b:1"), ("/d/a:1", "/d/b:1", "/d/c:2")) == "+ c 50 %, a 50 % → 25 %, b 50 % → 25 %"
    assert renamed(("/d/a",), ("a=/d/a:0.5", "/d/b:0.5")) == [("data", "a")]
    assert renamed(("a=/d/a",), ("a=/d/a:0.5", "/d/b:0.5")) == []
    assert change_of(("a=/d/a",), ("a=/d/a:0.5", "/d/b:0.5")) == "+ b 50 %, a 100 % → 50 %"
    assert renamed(("/d/a:0.5", "/d/c:0.5"), ("x=/d/a:0.5", "/d/c:0.5")) == [("a", "x")]
    assert renamed(("/d/a",), ("data=/d/a:0.5", "/d/b:0.5")) == []


@given(st.lists(st.text(max_size=20), max_size=5))
def test_shares_of_any_texts_add_up(texts: list[str]) -> None:
    assert sum(shares(texts).values()) == pytest.approx(1.0)
