"""Requests of operators: whatever their arguments are, the answer is an event that the journal takes."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.codec import decode, encode
from opt_ops.core.events import RequestRefused
from opt_ops.core.state.model import State
from opt_ops.ports import Request
from opt_ops.supervise.operator_requests import event_of
from tests.core.story import Story

SHAPE = {"nodes": 2, "spares": 1, "ranks_per_node": 8}
START = {"lineage": "12", "recipe": "tiny", "settings": [], "data": ["/d"], "tokenizer": None, "shape": SHAPE}
PARENT = {"lineage": "11", "run": "11.02", "step": 100, "checkpoint": "/runs/11/11.02/checkpoints/step-00000100"}
ORIGIN = {"parent": PARENT, "lr_factors": [{"step": 50, "factor": 0.5}], "skips": [{"first": 60, "last": 70}]}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("start", START),
    ("start", START | ORIGIN),
    ("stop", {"reason": "x"}),
    ("pause", {"reason": "x", "keep_nodes": True}),
    ("resume", {"reason": "x"}),
    ("change", {"reason": "x", "to_step": 10, "lr_factor": 0.5, "lr": 0.1, "settings": ["a=1"], "skip_batches": 3}),
    ("plan", {"reason": "x", "planned": ["48000:stage b", "7"]}),
    ("drive", {"driver": "person", "reason": "x"}),
    ("exclude", {"node": "n1", "reason": "x"}),
    ("allow", {"node": "n1", "reason": "x"}),
    ("note", {"target": "12", "text": "x", "correction": False}),
    ("drill", {"fault": "kill-rank", "rank": 0, "in_step": "backward"}),
    ("drill", {"fault": "kill-node", "node": "n1"}),
    ("drill", {"fault": "kill-pair", "rank": 0}),
    ("drill", {"fault": "slow-standby", "seconds": 90.0}),
    ("drill", {"fault": "lr", "from_step": 0, "updates": 3, "factor": 2.0}),
    ("drill", {"fault": "nan", "from_step": 7}),
    ("drill", {"fault": "xid", "node": "n1", "xid": 79}),
]
EDGES = [
    None,
    True,
    -1,
    0,
    1,
    1.5,
    3.0,
    10**9,
    2**64,
    10**400,
    -0.0,
    math.inf,
    math.nan,
    "",
    "x",
    "\0",
    "x" * 10**5,
    "../1",
]
VALUES = (
    st.sampled_from([*EDGES, [], {}, [[]], {"a": []}, ["\0"], ["x"] * 20_000]) | st.text() | st.integers() | st.floats()
)


def ask(state: State, verb: str, arguments: dict[str, Any]) -> Any:
    return event_of(state, Request(request="r1", author="ann", verb=verb, arguments=arguments))


@given(case=st.sampled_from(GOOD), value=VALUES, data=st.data(), running=st.booleans())
def test_any_argument_of_any_value_is_taken_or_refused_with_a_reason(
    case: tuple[str, dict[str, Any]], value: Any, data: st.DataObject, running: bool
):
    verb, arguments = case
    name = data.draw(st.sampled_from(sorted(arguments)))
    state = Story().training(450).state if running else State()
    changed = arguments | {name: value}
    if verb == "start" and data.draw(st.booleans()):
        changed = arguments | {"shape": SHAPE | {data.draw(st.sampled_from(sorted(SHAPE))): value}}
    event = ask(state, verb, changed)
    if isinstance(event, RequestRefused):
        assert event.why
    text = json.dumps(encode(event), allow_nan=False, ensure_ascii=False)
    assert len(text.encode("utf-8", "surrogatepass")) < 10**6
    assert decode(json.loads(text)) == event


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"nodes": 0}, "nodes is 0; it must be from 1 to 100000"),
        ({"nodes": -1}, "nodes is -1"),
        ({"ranks_per_node": 10**9}, "ranks_per_node is 1000000000"),
        ({"nodes": 10**5, "ranks_per_node": 1024}, "more than 1000000 ranks"),
        ({"nodes": True}, "nodes is not a whole number"),
        ({"nodes": "2"}, "nodes is not a whole number"),
        ({"min_nodes": 3}, "min_nodes is 3; it must be from 0 to 2"),
    ],
)
def test_a_start_on_nonsense_is_refused(shape: dict[str, Any], why: str):
    event = ask(State(), "start", START | {"shape": SHAPE | shape})
    assert isinstance(event, RequestRefused)
    assert why in event.why


def test_what_is_named_must_be_a_name():
    for lineage in ("../1", "1/..", "x", "", "٣", 5):
        assert "lineage" in ask(State(), "start", START | {"lineage": lineage}).why
    training = Story().training(450).state
    for node in ("n[1-3]", "n1,n2", "a b", "../x", "nö"):
        assert "is not the name of one node" in ask(training, "exclude", {"node": node, "reason": "x"}).why
    assert "characters" in ask(training, "note", {"target": "1", "text": "x" * 10**6}).why
    assert not isinstance(
        ask(State(), "start", START | {"shape": {k: float(v) for k, v in SHAPE.items()}}), RequestRefused
    )


def test_a_fork_is_taken_with_what_its_parents_checkpoint_was_trained_under():
    event = ask(State(), "start", START | ORIGIN)
    assert encode(event)["parent"] == PARENT
    assert (encode(event)["lr_factors"], encode(event)["skips"]) == (ORIGIN["lr_factors"], ORIGIN["skips"])
    for changed in ({"checkpoint": "../step"}, {"lineage": "../1"}, {"step": -1}):
        assert isinstance(ask(State(), "start", START | ORIGIN | {"parent": PARENT | changed}), RequestRefused)
