"""Every event as a sentence: a rule for each kind, both tenses, no spelling of programs whatever the fields hold."""

import dataclasses
import re
import typing
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.events import KINDS, Event
from opt_ops.core.failures.causes import Cause, Suspicion
from opt_ops.core.failures.classes import AlertSignal, FailureClass
from opt_ops.core.health import explain
from opt_ops.core.told import Tense, foreseen, told, words
from opt_ops.core.values import (
    Action,
    AllocationStatus,
    Checkpoint,
    Driver,
    Fault,
    LrFactor,
    Optimizer,
    Outcome,
    Parent,
    PlannedChange,
    RankExit,
    Schedule,
    Severity,
    Shape,
    StackGroup,
    Status,
    Tier,
    Verdict,
)
from tests.core.story import Story

CODES = [*FailureClass, *AlertSignal, *Cause, *Action, "xid_79", "gpu_lost", "nvml_absent", "burn_in_slow"]
UNDERSCORED = [str(code) for code in CODES if "_" in code]
NASTY = [
    *UNDERSCORED,
    "None of {'a': [1, 2]}",
    "True, False or Decimal('1')",
    "\x1b[2J\x9b1m\r\nline 2\u202e",
    "“quoted” " * 20,
    "x" * 400,
    "n2: xid_79",
]

TEXT = st.sampled_from(NASTY) | st.text(max_size=300)
VALUE = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(VALUE, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))
READ = st.fixed_dictionaries({}, optional={"lr": VALUE, "step": VALUE})
EVIDENCE = st.dictionaries(TEXT, JSON, max_size=2) | st.fixed_dictionaries(
    {},
    optional={
        "loss": VALUE,
        "limit": VALUE,
        "mismatch": JSON,
        "readbacks": st.lists(READ | JSON, max_size=2),
        "torch": JSON,
        "factor": VALUE,
        "updates": VALUE,
        "rank": VALUE,
        "node": VALUE,
        "in_step": VALUE,
    },
)


def _built(cls: type) -> st.SearchStrategy[typing.Any]:
    """Any event of a kind: texts that hurt, mappings of anything, the rest by its type."""
    hints = typing.get_type_hints(cls)
    given_by_hand: dict[str, st.SearchStrategy[typing.Any]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if typing.get_origin(hint) is not tuple and "Mapping" in str(hint):
            counts = st.dictionaries(TEXT, st.integers(0, 9), max_size=2)
            given_by_hand[field.name] = counts if "int" in str(hint) else EVIDENCE
        elif hint is str:
            given_by_hand[field.name] = TEXT
        elif hint == tuple[str, ...]:
            given_by_hand[field.name] = st.lists(TEXT, max_size=6).map(tuple)
        elif hint == (str | None):
            given_by_hand[field.name] = st.none() | TEXT
    return st.builds(cls, **given_by_hand)


def test_every_kind_has_a_rule():
    from opt_ops.core.told import RULES

    assert set(RULES) == set(KINDS.values())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_sentence_is_one_whatever_the_fields_hold(kind: str):
    story = Story().training(460)

    @given(_built(KINDS[kind]), st.sampled_from(list(Tense)), st.booleans())
    def is_one(event: Event, tense: Tense, known: bool) -> None:
        said = told(event, story.state if known else None, tense)
        assert 0 < len(said) <= 160
        assert said.isprintable()
        assert not re.search(r"[{}\[\]]|None|True|False|Decimal\(", said)
        assert not [code for code in UNDERSCORED if re.search(rf"(?<![\w.:/]){code}(?![\w./])", said)], said
        assert said.count("“") == said.count("”"), said
        assert tense is Tense.PAST or said.startswith("would ")
        assert foreseen(event)[0] in told(event, None, Tense.WOULD)

    is_one()


POINT = Checkpoint(run="1.00", step=100, path="/runs/1/1.00/checkpoints/step-00000100")
SHAPE = Shape(nodes=2, spares=1, ranks_per_node=1)


@pytest.mark.parametrize(
    ("event", "past", "would"),
    [
        (
            e.DaemonStarted(host="vm", pid=4711, version="1", policy="p", blind_seconds=2.6),
            "the daemon watches from vm, pid 4711, after 2.6 s without one",
            "would see that the daemon watches from vm, pid 4711, after 2.6 s without one",
        ),
        (
            e.LineageStarted(
                request="r",
                author="ann",
                lineage="1",
                recipe="opt-tiny",
                settings=("steps=400",),
                shape=SHAPE,
            ),
            "ann asked for opt-tiny with steps=400 on 2 nodes and 1 spare",
            "would train opt-tiny with steps=400 on 2 nodes and 1 spare",
        ),
        (
            e.LineageStarted(
                request="r",
                author="ann",
                lineage="2",
                recipe="opt-tiny",
                settings=(),
                shape=SHAPE,
                parent=Parent(lineage="1", run="1.00", step=60_000, checkpoint="/x"),
                reason="lower rate",
            ),
            "ann asked for a fork of 1.00 at step 60,000: opt-tiny on 2 nodes and 1 spare: “lower rate”",
            "would train a fork of 1.00 at step 60,000: opt-tiny on 2 nodes and 1 spare",
        ),
        (
            e.StopRequested(request="r", author="ann", reason="wrong tokenizer"),
            "ann asked to stop for good: “wrong tokenizer”",
            "would stop for good",
        ),
        (
            e.PauseRequested(request="r", author="ann", reason="power work"),
            "ann asked to pause, and give back the nodes: “power work”",
            "would pause and give back the nodes",
        ),
        (
            e.ResumeRequested(request="r", author="ann", reason="the shard is mended"),
            "ann asked to go on: “the shard is mended”",
            "would go on from the newest good checkpoint",
        ),
        (
            e.ChangeRequested(
                request="r", author="ann", reason="see", to_step=59000, lr_factor=0.75, skip_batches=60
            ),
            "ann asked to go back to 59,000 with the learning rate × 0.75, leaving out 60 batches: “see”",
            "would go back to 59,000 with the learning rate × 0.75, leaving out 60 batches",
        ),
        (
            e.ChangesDeclared(
                request="r", author="ann", reason="mix", planned=(PlannedChange(step=48000, what="stage b"),)
            ),
            "ann plans a change at step 48,000 (“stage b”): “mix”",
            "would expect a change at step 48,000 (“stage b”); the loss detectors learn again there",
        ),
        (
            e.DriverChanged(request="r", author="ann", driver=Driver.OPERATOR, reason="trying a new NCCL"),
            "ann drives: “trying a new NCCL”",
            "would act on requests only, until you hand back",
        ),
        (
            e.NodeAllowed(request="r", author="ann", node="n031", reason="GPU 3 was exchanged"),
            "ann lets n031 run again: “GPU 3 was exchanged”",
            "would let n031 run again",
        ),
        (
            e.NoteAdded(request="r", author="ann", target="1-i003", text="it was the switch", correction=True),
            "ann on 1-i003: “it was the switch” (correction)",
            "would write into the logbook, on 1-i003: “it was the switch”",
        ),
        (
            e.DrillRequested(
                request="r",
                author="ann",
                drill="d003",
                fault=Fault.LR,
                attempt="1.00-a0",
                arguments={"factor": 50.0, "updates": 30, "from_step": 324},
            ),
            "DRILL d003: learning rate × 50 for 30 updates from step 324",
            "would inject a fault in 1.00-a0: learning rate × 50 for 30 updates from step 324",
        ),
        (e.DrillDone(drill="d003"), "DRILL d003 is in", "would see that DRILL d003 is in"),
        (
            e.RequestRefused(request="r", author="ann", verb="pause", why="the lineage is over"),
            "refused what ann asked (pause): the lineage is over",
            "would refuse what ann asked (pause): the lineage is over",
        ),
        (
            e.RunPlanned(
                run="1.01",
                parent="1.00",
                cause="x",
                incident="1-i003",
                checkpoint=POINT,
                lr_factors=(LrFactor(step=100, factor=0.75),),
            ),
            "next run 1.01 from step 100 (1-i003)",
            "would begin 1.01 from step 100",
        ),
        (
            e.AllocationIntended(allocation="1-n0", nodes=3, exclude=("n7",)),
            "asks for 3 nodes, without n7",
            "would ask for 3 nodes, without n7",
        ),
        (
            e.AllocationSubmitted(allocation="1-n0", job="1138", adopted=False),
            "job 1138 asked for (1-n0)",
            "would ask for job 1138 (1-n0)",
        ),
        (
            e.AllocationFailed(allocation="1-n0", why="Invalid account"),
            "no nodes: “Invalid account”",
            "would get no nodes: “Invalid account”",
        ),
        (
            e.AllocationChanged(
                allocation="1-n0",
                status=AllocationStatus.RUNNING,
                nodes=("n1", "n2", "n3"),
                reason="",
                ends_at=1795357200.0,
            ),
            "the job of 1-n0 runs on n1, n2, n3 until 22 Nov, 14:20",
            "would see that the job of 1-n0 runs on n1, n2, n3 until 22 Nov, 14:20",
        ),
        (
            e.StrayFound(job="1139", allocation="1-n0"),
            "job 1139 bears our name and belongs to nothing: cancelling it",
            "would cancel job 1139, which bears our name and belongs to nothing",
        ),
        (e.StrayCancelled(job="1139"), "job 1139 is cancelled", "would see that job 1139 is cancelled"),
        (e.SizeDecided(nodes=108, why=""), "goes on with 108 nodes", "would go on with 108 nodes"),
        (
            e.LineagePaused(why="ann: power work"),
            "rests as asked: “ann: power work”",
            "would rest as asked: “ann: power work”",
        ),
        (
            e.ReleaseIntended(allocation="1-n0", why=""),
            "gives back the nodes of 1-n0",
            "would give back the nodes of 1-n0",
        ),
        (
            e.AttemptIntended(
                attempt="1.00-a2",
                run="1.00",
                nodes=("n1", "n3"),
                ranks_per_node=1,
                checkpoint=POINT,
                incident=None,
            ),
            "starts 1.00-a2 on n1, n3 from step 100",
            "would start 1.00-a2 on n1, n3 from step 100",
        ),
        (e.AttemptStarted(attempt="1.00-a2", at=1.0), "the ranks of 1.00-a2 run", "would see that the ranks"),
        (
            e.AttemptConfigured(
                attempt="1.00-a2",
                steps=400,
                schedule=Schedule(peak_lr=1e-3),
                optimizer=Optimizer(betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0),
                versions={"torch": "2.13.0"},
                layout={},
            ),
            "1.00-a2 trains to step 400 at peak 0.001, betas 0.9 and 0.95, clip 1; torch 2.13.0",
            "would see that 1.00-a2 trains",
        ),
        (
            e.AttemptProgressed(
                attempt="1.00-a2", first_step=1, first_step_at=1.0, step=262, at=2.0, step_seconds=0.14
            ),
            "1.00-a2 is at step 262, 0.1 s a step",
            "would see that 1.00-a2 is at step 262",
        ),
        (
            e.EnergyMetered(since=0.0, until=600.0, joules=3.1 * 3.6e6, gpus=16),
            "16 GPUs used 3.1 kWh in 10 min 0 s",
            "would see that 16 GPUs used",
        ),
        (
            e.LeaveIntended(attempt="2.00-a0", why="paused by ann", incident=None),
            "saves, then ends 2.00-a0: paused by ann",
            "would save, then end 2.00-a0",
        ),
        (
            e.StopIntended(attempt="2.00-a0", why="x", incident="2-i001"),
            "ends 2.00-a0 (2-i001)",
            "would end 2.00-a0",
        ),
        (
            e.StacksIntended(attempt="1.00-a0", incident="1-i001"),
            "asks every rank of 1.00-a0 where it is",
            "would ask every rank of 1.00-a0 where it is",
        ),
        (
            e.StacksTaken(
                attempt="1.00-a0",
                incident="1-i001",
                groups=(
                    StackGroup(ranks=tuple(range(991)), frames=("nccl.py:all_reduce",)),
                    StackGroup(ranks=(5,), frames=("data.py:load_batch",)),
                ),
                odd=(5,),
                silent=(),
                nodes=("n001",),
            ),
            "rank 5 (n001) is in data.py:load_batch, 991 others in nccl.py:all_reduce",
            "would see that rank 5 (n001)",
        ),
        (
            e.AttemptEnded(
                attempt="1.00-a0",
                outcome=Outcome.FAILED,
                last_step=73,
                last_step_at=1.0,
                exits=(RankExit(rank=1, node="n2", code=None, signal=9, at=1.0),),
                ended={"SIGKILL": 1, "code 1": 1},
            ),
            "1.00-a0 is over at step 73: rank 1 on n2 was killed (SIGKILL), 1 other ended after it",
            "would see that 1.00-a0 is over",
        ),
        (e.CheckpointSeen(checkpoint=POINT), "step 100 is saved", "would see that step 100 is saved"),
        (
            e.CheckpointVerified(checkpoint=POINT, healthy=True, why=""),
            "step 100 is read back: sound and healthy",
            "would see that step 100 is read back",
        ),
        (
            e.CheckpointRefused(checkpoint=POINT, why="layer 3 does not match"),
            "step 100 is damaged: layer 3 does not match",
            "would see that step 100 is damaged",
        ),
        (
            e.CheckpointsGone(run="1.00", paths=("/c/step-00000025", "/c/step-00000050")),
            "steps 25 and 50 are gone",
            "would see that steps 25 and 50 are gone",
        ),
        (
            e.SignalRaised(
                signal="loss_spike",
                tier=Tier.ALERT,
                attempt="1.00-a0",
                step=320,
                onset_step=318,
                at=1.0,
                rule="above",
                evidence={"loss": 6.53, "limit": 6.25},
            ),
            "loss spike since step 318: 6.53, usually below 6.25; watching",
            "would see loss spike since step 318",
        ),
        (
            e.NodeJudged(
                node="n2", host="h", verdict=Verdict.BAD, reason="xid_79", source="s", at=1.0, drill="d002"
            ),
            "n2 is bad: a GPU has fallen off the bus (Xid 79) (DRILL d002)",
            "would see that n2 is bad",
        ),
        (
            e.IncidentOpened(
                incident="1-i003",
                failure="loss_spike",
                cause="loss 6.53 at step 318",
                detector="d",
                attempt=None,
                nodes=(),
                step_failed=None,
                onset_step=None,
                at=1.0,
                drill="d003",
            ),
            "1-i003, loss spike: loss 6.53 at step 318 (DRILL d003)",
            "would open 1-i003, loss spike: loss 6.53 at step 318",
        ),
        (
            e.RecoveryDecided(
                incident="1-i003",
                playbook="loss_spike",
                version=2,
                rung=0,
                action=Action.ROLLBACK,
                why="w",
                checkpoint=POINT,
                lr_factor=0.75,
            ),
            "1-i003: back to step 100, learning rate × 0.75 (loss spike, rung 1)",
            "would decide 1-i003: back to step 100, learning rate × 0.75 (loss spike, rung 1)",
        ),
        (
            e.AfterthoughtAdded(incident="1-i003", topic="t", text="it healed by itself"),
            "1-i003, later: it healed by itself",
            "would add to 1-i003: it healed by itself",
        ),
        (
            e.NodeExcluded(node="n2", incident="1-i001", reason="bad_gpu: xid_79"),
            "n2 is excluded: a GPU has fallen off the bus (Xid 79), 1-i001",
            "would exclude n2: a GPU has fallen off the bus (Xid 79), 1-i001",
        ),
        (
            e.DrainIntended(node="n2", incident="1-i001", reason="r"),
            "asks Slurm to drain n2",
            "would ask Slurm to drain n2",
        ),
        (
            e.NodeDrained(node="n2", done=False, why="no permission"),
            "n2 could not be drained: no permission; it stays excluded all the same",
            "would see that n2 could not be drained",
        ),
        (
            e.IncidentClosed(
                incident="1-i003",
                proven=True,
                proof={"readbacks": [{"step": 101, "lr": 0.000668603}]},
                step_resumed=100,
                steps_lost=221,
                seconds_down=7.6,
            ),
            "1-i003 proven: 0.000668603 in force at step 101; 221 steps and 7.6 s lost",
            "would close 1-i003 proven",
        ),
        (e.LineageCompleted(step=400), "all 400 steps are trained", "would complete the lineage: all 400 steps"),
        (
            e.LineageHalted(why="1-i003 loss_spike; 5 of 5 actions spent", incident="1-i003"),
            "stopped, a person is needed: 1-i003 loss spike; 5 of 5 actions spent",
            "would stop and page a person: 1-i003",
        ),
        (
            e.LineageCancelled(request="r", why="ann: wrong tokenizer"),
            "stopped for good: “ann: wrong tokenizer”",
            "would stop for good: “ann: wrong tokenizer”",
        ),
        (
            e.AlertIntended(alert="1-i003/opened", severity=Severity.PAGE, title="opt-ops 1: n2: xid_79", body="b"),
            "tells people (page): “opt-ops 1: n2: a GPU has fallen off the bus (Xid 79)”",
            "would tell people (page): “opt-ops 1: n2: a GPU has fallen off the bus (Xid 79)”",
        ),
        (
            e.AlertSettled(alert="1-i003/opened", delivered=False, why="no route to host"),
            "people could NOT be told: no route to host",
            "would see that people could NOT be told: no route to host",
        ),
        (
            e.ProbesJudged(
                incident="1-i003",
                causes=(Suspicion(cause=Cause.LR_TOO_HIGH, confidence=0.7),),
                why="w",
            ),
            "1-i003: the wait for probes is over: likely the learning rate is too high (70%)",
            "would end the wait for probes of 1-i003",
        ),
        (
            e.WatcherFailed(watcher="nodes", why="KeyError: {'a': None}"),
            "a part of the watch fails: nodes: KeyError: ('a': none)",
            "would see that a part of the watch fails",
        ),
        (e.WatcherRecovered(watcher="nodes"), "a part of the watch works again: nodes", "would see that a part"),
    ],
    ids=lambda given: e.kind_of(given) if isinstance(given, Event) else "",
)  # fmt: skip
def test_the_sentences(event: Event, past: str, would: str):
    assert told(event) == past
    assert told(event, None, Tense.WOULD).startswith(would)


def test_the_state_before_the_event_says_more():
    story = Story().training(460)
    state = story.state
    attempt = state.attempt
    assert attempt is not None
    assert told(e.AttemptStarted(attempt=attempt.name, at=1.0), state) == "the 2 ranks of 12.00-a0 run"
    assert told(e.StopIntended(attempt=attempt.name, why="", incident=None), state) == "ends 12.00-a0 on n1, n2"
    assert told(e.ReleaseIntended(allocation="12-n0", why=""), state) == "gives back n1, n2, n3"
    assert told(e.LineagePaused(why="ann: x"), state) == "rests since step 460"
    assert told(e.SizeDecided(nodes=1, why=""), state) == "goes on with 1 of 2 nodes"
    planned = e.RunPlanned(
        run="12.01",
        parent="12.00",
        cause="c",
        incident="12-i000",
        checkpoint=POINT,
        lr_factors=(LrFactor(step=100, factor=0.75),),
    )
    assert told(planned, state) == "next run 12.01 from step 100, learning rate × 0.75 (12-i000)"
    gone = e.AllocationChanged(allocation="12-n0", status=AllocationStatus.ENDED, nodes=(), reason="NODE_FAIL")
    assert told(gone, state) == "job 77 is over: NODE_FAIL"
    daemon = e.DaemonStarted(host="vm", pid=4711, version="0.1.0", policy="p", blind_seconds=0.5)
    assert told(daemon, state) == "the daemon watches from vm, pid 4711, after 0.5 s without one"
    ended = dataclasses.replace(state, status=Status.COMPLETED)
    assert told(daemon, ended) == "the daemon on vm, pid 4711, takes up the ended lineage"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("xid_79", "a GPU has fallen off the bus (Xid 79)"),
        ("xid_48", "double-bit ECC error (Xid 48)"),
        ("xid_999", "Xid 999"),
        ("sxid_12028", "an NVSwitch error (SXid 12028)"),
        ("gpu_lost", "the driver no longer finds a GPU"),
        ("nvml_absent", "no NVML on this machine"),
        ("nvml_driver_not_loaded", "NVML fails: driver not loaded"),
        ("slurm_drained: bad fan", "Slurm says: drained: bad fan"),
        ("burn_in_all_reduce", "in a burn-in: all reduce"),
    ],
)
def test_reasons_have_words(code: str, said: str):
    assert words.reason(code) == said


def test_every_reason_of_the_health_table_has_words_of_its_own():
    shown: Mapping[str, str] = {row.reason: words.reason(row.reason) for row in explain.rows()}
    assert [code for code, said in shown.items() if said == code and "…" not in code] == []


def test_every_failure_class_cause_and_action_has_words():
    assert words.failure("bad_gpu") == "bad GPU"
    said = [words.failure(kind) for kind in [*FailureClass, *AlertSignal]]
    said += [words.cause(each) for each in Cause] + [words.action(each) for each in Action]
    assert not [each for each in said if "_" in each or not each]


def test_codes_within_a_sentence_become_words_and_names_of_functions_stay():
    assert words.without_codes("n2: xid_79") == "n2: a GPU has fallen off the bus (Xid 79)"
    assert words.without_codes("loss_spike/v2 ends here") == "loss_spike/v2 ends here"
    assert words.without_codes("rank 5 in data.py:load_batch, all_reduce") == "rank 5 in data.py:load_batch, all_reduce"


def test_untrusted_text_is_one_line_of_80_characters():
    said = told(e.NoteAdded(request="r", author="ann", target="1", text="a\n\x1b[31m" + "b" * 400))
    quoted = said.partition("“")[2].partition("”")[0]
    assert len(quoted) <= 80
    assert said.isprintable()


def test_an_unusual_name_is_quoted():
    said = told(e.StandbySeen(node="n1; rm -rf", ready=1))
    assert said == "“n1; rm -rf”: standby 1 ready"
