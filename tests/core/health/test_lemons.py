"""The node ledger is a fold of journals: parts keep their history wherever they go, and a lemon stands out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.health.lemons import PRIOR_HOURS, Part, Record, merged, parts, poisson_tail, records
from opt_ops.core.values import GpuPart, Outcome, Verdict

HOUR = 3600.0


class Log:
    """A journal, told by what matters here."""

    def __init__(self) -> None:
        self.entries: list[e.Entry] = []
        self.now = 0.0
        self.attempts = 0

    def write(self, event: e.Event) -> None:
        self.entries.append(e.Entry(seq=len(self.entries) + 1, epoch=1, ts=self.now, event=event))

    def judge(self, node: str, *uuids: str) -> None:
        gpus = tuple(GpuPart(uuid=uuid, serial=f"s-{uuid}", name="H100") for uuid in uuids)
        said = {"verdict": Verdict.HEALTHY, "reason": "ok", "source": "test", "at": self.now}
        self.write(e.NodeJudged(node=node, host=node, gpus=gpus, **said))

    def train(self, hours: float, *nodes: str, end: bool = True) -> None:
        name = f"12.00-a{self.attempts}"
        self.attempts += 1
        self.write(
            e.AttemptIntended(attempt=name, run="12.00", nodes=nodes, ranks_per_node=1, checkpoint=None, incident=None)
        )
        self.write(e.AttemptStarted(attempt=name, at=self.now))
        self.now += hours * HOUR
        if end:
            last = {"last_step": 1, "last_step_at": self.now, "exits": ()}
            self.write(e.AttemptEnded(attempt=name, outcome=Outcome.FAILED, **last))

    def fail(self, node: str, uuid: str | None = None, kind: str = "bad_gpu", drill: str | None = None) -> None:
        about = {"cause": f"{node}: xid_79", "detector": "test", "attempt": None, "step_failed": None}
        evidence = {} if uuid is None else {"uuid": uuid, "serial": f"s-{uuid}"}
        self.write(
            e.IncidentOpened(
                incident=f"12-i{len(self.entries)}",
                failure=kind,
                nodes=(node,),
                onset_step=None,
                at=self.now,
                evidence=evidence,
                drill=drill,
                **about,
            )
        )

    def records(self, now: float | None = None) -> dict[str, Record]:
        return {each.part.key: each for each in records(parts(self.entries), self.now if now is None else now)}


def test_a_gpu_keeps_its_history_in_another_node():
    log = Log()
    log.judge("n1", "G1", "G2")
    log.judge("n2", "G3")
    log.train(10, "n1", "n2")
    log.fail("n1", "G1")
    log.judge("n1", "G2")
    log.judge("n2", "G3", "G1")
    log.train(5, "n2")
    found = log.records()
    assert {key: each.hours for key, each in found.items()} == {"n1": 10, "n2": 15, "G1": 15, "G2": 10, "G3": 15}
    assert {key: len(each.failures) for key, each in found.items()} == {"n1": 1, "n2": 0, "G1": 1, "G2": 0, "G3": 0}
    assert (found["G1"].part.node, found["G1"].part.serial) == ("n2", "s-G1")
    assert found["G1"].failures[0].node == "n1", "where it failed"


def test_what_counts_is_named_by_the_incident_and_no_drill():
    log = Log()
    log.judge("n1", "G1")
    log.fail("n1", "G1", drill="d000")
    log.fail("n1", kind="process_death")
    log.fail("n1", kind="silent_node")
    found = log.records()
    assert [len(found[key].failures) for key in ("n1", "G1")] == [1, 0]


def test_an_attempt_that_still_runs_counts_until_the_last_entry():
    log = Log()
    log.judge("n1", "G1")
    log.train(3, "n1", end=False)
    log.judge("n2")
    assert log.records()["G1"].hours == 3


def test_four_weeks_count():
    log = Log()
    log.judge("n1", "G1")
    log.train(24, "n1")
    log.fail("n1", "G1")
    log.train(24, "n1")
    later = log.records(now=log.now + 27 * 86400.0)["G1"]
    assert (later.hours, len(later.failures)) == (24.0, 1)
    much_later = log.records(now=log.now + 29 * 86400.0)["G1"]
    assert (much_later.hours, len(much_later.failures), much_later.score) == (0.0, 0, 0.0)


def fleet(failures: dict[str, int], nodes: int = 50, hours: float = 300) -> Log:
    log = Log()
    names = [f"n{i}" for i in range(nodes)]
    for name in names:
        log.judge(name, *(f"G-{name}-{i}" for i in range(8)))
    log.train(hours, *names)
    for name, count in failures.items():
        for _ in range(count):
            log.fail(name, f"G-{name}-0")
    return log


def test_a_repeat_offender_stands_out_and_an_unlucky_node_does_not():
    found = fleet({"n3": 3, "n7": 1, "n9": 1}).records()
    assert {key for key, each in found.items() if each.lemon} == {"n3", "G-n3-0"}
    assert next(iter(found)) == "G-n3-0", "the most surprising first"
    everywhere = fleet({f"n{i}": 3 for i in range(50)}).records()
    assert not any(each.lemon for key, each in everywhere.items() if each.part.kind == "node"), "then it is the fleet"


def test_one_failure_is_never_a_lemon_however_soon_it_comes():
    log = Log()
    log.judge("n1", "G1")
    log.fail("n1", "G1")
    found = log.records()["G1"]
    assert not found.lemon
    assert found.expected == pytest.approx(1 / PRIOR_HOURS["gpu"])
    assert found.score == pytest.approx(-math.log10(1 / PRIOR_HOURS["gpu"]), rel=1e-3)


@given(count=st.integers(0, 30), mean=st.floats(1e-6, 20.0))
def test_the_tail_of_poisson_agrees_with_its_complement(count: int, mean: float):
    below = sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count))
    assert poisson_tail(count, mean) == pytest.approx(1 - below, abs=1e-9)


OCCURRENCES = st.lists(
    st.tuples(
        st.sampled_from(["train", "fail", "judge"]), st.sampled_from(["n1", "n2"]), st.sampled_from(["G1", "G2"])
    ),
    max_size=12,
)


def journal(told: list[tuple[str, str, str]]) -> Log:
    log = Log()
    for what, node, gpu in told:
        log.now += 1.0
        match what:
            case "train":
                log.train(1.0, node)
            case "fail":
                log.fail(node, gpu)
            case _:
                log.judge(node, gpu)
    return log


@given(OCCURRENCES, OCCURRENCES)
def test_the_ledger_of_two_lineages_is_the_sum_of_theirs(one: list, other: list):
    both = [parts(journal(told).entries) for told in (one, other)]

    def sums(known: dict[str, Part], key: str) -> tuple[float, int]:
        part = known.get(key, Part(key=key, kind="gpu", node=""))
        return sum(to - at for at, to in part.uses), len(part.failures)

    together = merged(both)
    for key in ("n1", "n2", "G1", "G2"):
        expected = [sum(values) for values in zip(*(sums(known, key) for known in both), strict=True)]
        assert list(sums(together, key)) == pytest.approx(expected)
    assert merged(reversed(both)).keys() == together.keys()
