"""The one table of failure classes: complete, agreed with playbooks, detectors and schedulers, and without rivals."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opt_ops import playbook_loader
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.core import events as e
from opt_ops.core.failures import causes, classes, classify_exit
from opt_ops.core.failures.classes import ROWS, AlertSignal, Blames, Confidence, Domain, FailureClass, Nature, Spends
from opt_ops.core.values import Severity, Tier
from opt_ops.runfolder.journal import read
from opt_ops.supervise import watch_allocation

ROOT = Path(__file__).parents[3]
JOURNALS = [ROOT / "tests" / "data" / "journal-first-light", ROOT / "tests" / "chronicles" / "data" / "1" / "journal"]
EVIDENCE: dict[str, Any] = {
    "rank": 3, "code": 1, "signal": None, "line": "RuntimeError: boom", "job": "77", "reason": "NODE_FAIL",
    "loss": 9.0, "median": 3.0, "level": 3.4, "best": 3.1, "before": 3.0, "loss_scale": 0.01, "floor": 0.03125,
    "seconds": 40.0, "patience": 30.0, "phase": "training", "wps": 70.0, "ratio": 1.5, "why": "its ranks are slow",
    "ranks": [3], "certain": True, "what": "weights", "bad_module": "layers.3", "lr": 3e-3, "planned_lr": 1e-3,
}  # fmt: skip


def raised(kind: str, evidence: dict[str, Any] = EVIDENCE) -> e.SignalRaised:
    return e.SignalRaised(
        signal=kind,
        tier=Tier.ACT,
        attempt="12.00-a0",
        step=450,
        onset_step=440,
        at=1.0,
        nodes=("n2",),
        rule="a rule",
        evidence=evidence,
    )


def grounds(evidence: dict[str, Any], named: bool = False) -> Any:
    return SimpleNamespace(evidence=evidence, stacks_name_ranks=named)


# ---- rows


def test_every_class_has_a_row_and_every_row_a_class():
    assert set(ROWS) == set(FailureClass)
    titles = [row.title for row in ROWS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("kind", list(FailureClass))
def test_every_row_explains_and_judges(kind: FailureClass):
    sentence = classes.cause(raised(kind))
    assert sentence
    assert "None" not in sentence
    for named in (True, False):
        for evidence in (EVIDENCE, {}):
            word, why = classes.confidence(kind, grounds(evidence, named), drill=False)
            assert word in Confidence
            assert why
    assert classes.confidence(kind, grounds({}), drill=True)[0] is Confidence.CERTAIN


def test_the_evidence_of_every_journaled_finding_is_understood():
    found = [entry.event for folder in JOURNALS for entry in read(folder)[0] if isinstance(entry.event, e.SignalRaised)]
    assert found
    for event in found:
        assert classes.cause(event)
    for entry in (entry for folder in JOURNALS for entry in read(folder)[0]):
        if isinstance(entry.event, e.IncidentOpened):
            assert classes.confidence(entry.event.failure, grounds(dict(entry.event.evidence)), drill=False)


def test_what_lists_used_to_disagree_about():
    row = classes.row
    assert classes.confidence("silent_data_corruption", grounds({"certain": True}), drill=False)[0] is Confidence.HIGH
    assert classes.confidence("silent_data_corruption", grounds({}), drill=False)[0] is Confidence.MEDIUM
    preempted = row("preemption")
    assert (preempted.nature, preempted.severity, preempted.spends) == (Nature.MOVE, Severity.INFO, Spends.OWN)
    assert row("job_cancelled").nature is Nature.REQUEST
    assert row("throughput_drop").blames is Blames.NODE
    assert row("loss_too_low").domain is Domain.LOSS
    assert {kind for kind, each in ROWS.items() if each.quiet} == {
        *(FailureClass.TIME_LIMIT, FailureClass.PREEMPTION, FailureClass.NODES_RETURNED),
        *(FailureClass.DAEMON_RESTART, FailureClass.OPERATOR),
    }


def test_a_time_limit_is_a_move_where_it_was_seen_coming_and_a_fault_where_not():
    assert classes.nature("time_limit", None) is Nature.MOVE
    assert classes.nature("time_limit", "12.00-a0/time_limit") is Nature.FAULT
    assert classes.nature("preemption", "12.00-a0/preemption") is Nature.MOVE


def test_a_word_of_a_newer_version_is_unexplained():
    assert classes.row("cosmic_ray") is ROWS[FailureClass.UNKNOWN]
    assert classes.title("cosmic_ray") == "Cosmic ray"


# ---- those who must agree


def test_playbooks_are_triggered_by_every_class_and_by_nothing_else():
    _, pages = playbook_loader.load(playbook_loader.folder())
    triggered = {trigger: page.playbook.name for page in pages for trigger in page.playbook.triggers}
    assert triggered == {kind: row.playbook for kind, row in ROWS.items() if row.playbook is not None}
    assert {kind for kind, row in ROWS.items() if row.playbook is None} == {FailureClass.OPERATOR}


def test_every_exit_code_of_the_contract_is_a_class_or_no_failure_of_its_own():
    silent = {code for code in ExitCode if code not in classify_exit.CLASS_OF_CODE}
    assert silent == {ExitCode.DONE, ExitCode.UNEXPECTED_ERROR, ExitCode.SUPERSEDED}
    assert set(classify_exit.CLASS_OF_CODE.values()) <= set(FailureClass)


def test_every_end_that_a_scheduler_names_is_a_class():
    assert set(watch_allocation.SIGNAL_OF_END.values()) <= set(FailureClass)


def test_the_page_for_people_on_call_has_the_same_table():
    from scripts.classes_docs import page

    text = (ROOT / "docs" / "playbooks.md").read_text(encoding="utf-8")
    assert page(text) == text, "python scripts/classes_docs.py"


# ---- no rivals


ALLOWED = {
    ("opt_ops/core/values.py", "unknown"),  # Verdict.UNKNOWN, AllocationStatus.UNKNOWN
    ("opt_ops/core/values.py", "hang"),  # Fault.HANG
    ("opt_ops/core/values.py", "suspended"),  # AllocationStatus.SUSPENDED
    ("opt_ops/node/agent.py", "hang"),  # the drill's word
    ("opt_ops/laboratory/simulated/agents.py", "hang"),  # the same
    ("opt_ops/laboratory/replay/fault_plan.py", "hang"),  # a kind of stop in a scenario
    ("opt_ops/laboratory/replay/play.py", "hang"),  # the same
    ("trainer/burn_in.py", "hang"),  # a drill of the burn-in
    ("opt_ops/laboratory/replay/trace.py", "unknown"),  # a field that the record leaves open
    ("opt_ops/cli/curve_files/columns.py", "gradient_norm"),  # a column of other tools' exports
    ("opt_ops/cli/shared/standing.py", "suspended"),  # what is wrong with a lineage now
    ("opt_ops/cli/daemon/commands.py", "unknown"),  # a field that the file does not have
    ("opt_ops/cli/node/ledger.py", "unknown"),  # a GPU without a serial number
    ("chronicles/logbook/story/words.py", "hang"),  # the noun of people, beside the class
    ("chronicles/logbook/story/words.py", "preemption"),  # the same
    ("chronicles/publish/redact.py", "operator"),  # an author that is nobody
    ("chronicles/publish/redact.py", "unknown"),  # the same
}


def constants(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_other_module_spells_a_class_out():
    words = {str(each) for each in (*FailureClass, *AlertSignal)}
    found = {
        (str(path.relative_to(ROOT)), word)
        for top in ("opt_ops", "chronicles", "trainer", "playbooks")
        for path in (ROOT / top).rglob("*.py")
        if path not in (Path(classes.__file__), Path(causes.__file__))
        for word in constants(path)
        if word in words
    }
    assert found - ALLOWED == set()
