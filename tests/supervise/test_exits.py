"""From reports on ranks to evidence: what training survived is no cause, and thousands of ranks are judged soon."""

import pytest

from opt_ops.core.failures import classify_exit
from opt_ops.core.failures.cause_lines import CauseLine
from opt_ops.core.failures.classify_exit import blame
from opt_ops.core.values import RankExit
from opt_ops.ports import NodeRanksReport
from opt_ops.supervise.exits import evidence_of, failed_ranks, places

LOST = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
TYPE = "TypeError: no"


def ended(rank: int, code: int | None = 1, signal: int | None = None, at: float = 1000.0) -> RankExit:
    return RankExit(rank=rank, node=f"n{rank // 8:04d}", code=code, signal=signal, at=at)


def report(*exits: RankExit, causes: dict | None = None, tails: dict | None = None) -> NodeRanksReport:
    return NodeRanksReport(
        node=exits[0].node, started_at=0.0, exits=exits, done=True, causes=causes or {}, tails=tails or {}
    )


def test_a_line_from_before_the_last_step_is_no_cause_of_a_kill():
    lines = (CauseLine("OSError: [Errno 5] Input/output error", at=500.0),)
    killed = report(ended(0, None, 9), causes={0: lines})
    assert blame(failed_ranks([killed], 999.0)).kind == "process_death"
    assert blame(failed_ranks([killed], 510.0)).kind == "storage", "clocks differ, and a step takes time"
    assert blame(failed_ranks([killed], None)).kind == "storage"


def test_a_report_of_an_older_agent_has_the_end_of_the_log_only():
    old = report(ended(0), tails={0: "x\nMemoryError: no room"})
    assert blame(failed_ranks([old], None)).kind == "out_of_memory"
    new = report(ended(0), tails={0: "x\nMemoryError: no room"}, causes={0: ()})
    assert blame(failed_ranks([new], None)).kind == "process_death"


def test_a_rank_that_ended_well_did_not_fail():
    assert failed_ranks([report(ended(0, 0), ended(1, None, None))], None).keys() == {ended(1, None, None)}


def test_places_and_evidence():
    one = blame({ended(3): TYPE, ended(9, at=1001.0): LOST})
    assert (places(one), evidence_of(one, 2)["place"], evidence_of(one, 2)["node"]) == (("n0000",), "n0000", None)
    many = blame({ended(3): TYPE, ended(9): TYPE})
    assert (places(many), evidence_of(many, 2)["alike_nodes"]) == ((), 2)
    lost = blame({ended(3): LOST, ended(9): LOST})
    assert lost.victim
    assert places(lost) == ("n0000",)


def test_of_sixteen_thousand_ranks_as_few_logs_are_judged_as_are_enough(monkeypatch: pytest.MonkeyPatch):
    failed = {ended(rank, at=1000.0 + rank / 1000): f"[rank{rank}]: {LOST}\n{rank}" for rank in range(16_384)}
    cause = ended(100, None, 6, 1000.5)
    failed[cause] = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    judge, judged = classify_exit.why_ended, []
    monkeypatch.setattr(classify_exit, "why_ended", lambda *each: judged.append(each) or judge(*each))
    assert blame(failed).first == cause
    assert len(judged) < 1000
