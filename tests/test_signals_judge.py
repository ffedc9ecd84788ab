"""The judge of the detectors: it must be able to say no."""

import json
import math
import random
from pathlib import Path

import pytest

from benchmarks import signals, signals_judge, signals_rules
from benchmarks.published_rules import Curve
from benchmarks.signals_curves import PLAIN, Look, Rows, draw, healthy
from benchmarks.signals_diverged import SHAPES, divergences
from benchmarks.signals_events import FAULTS, HARMLESS, put
from benchmarks.signals_judge import Run, Tally
from benchmarks.signals_rules import OURS, Case, Found


def run_of(real: dict[str, Rows], seed: int = 1) -> Run:
    return Run(real, {}, seed, 0.1, (OURS,))


def test_cases_are_drawn_by_seed_and_begin_where_they_say():
    first, again, other = (divergences(len(SHAPES), random.Random(seed)) for seed in (3, 3, 4))
    assert [c.name for c in first] == [c.name for c in again] != [c.name for c in other]
    for case in (*first, *put(FAULTS, len(FAULTS), {}, random.Random(3))):
        assert case.quiet is not None
        assert case.harmed is not None
        changed = [
            now.step
            for now, was in zip(case.rows, case.quiet, strict=True)
            if not math.isclose(now.loss, was.loss, abs_tol=1e-12) or now.gnorm != was.gnorm
        ]
        assert case.onset <= changed[0] <= case.harmed or case.onset == case.harmed <= changed[0]
        assert len(changed) > 5


def test_a_rule_that_never_acts_misses_every_fault_and_one_that_always_acts_does_harm(
    monkeypatch: pytest.MonkeyPatch,
):
    real = {"drawn": healthy(random.Random(5), Look(noise="global batch", sd=0.02, start=5000), 2000)}
    run = run_of(real)
    monkeypatch.setattr(signals_judge, "answers", lambda rule, case: [])
    figures = [*signals_judge.faults_section(run, Tally(run)), *signals_judge.rates_section(run, Tally(run))]
    assert all(f.counts[OURS] == 0 and not f.met and len(f.misses) == f.tried for f in figures)

    def always(rule: str, case: Case) -> list[Found]:
        return [Found(case.onset, case.onset, "loss_spike", "rollback", case.onset)]

    monkeypatch.setattr(signals_judge, "answers", always)
    tally = Tally(run)
    figures = [*signals_judge.harmless_section(run, tally), *signals_judge.planned_section(run, tally)]
    assert not any(f.met for f in figures if f.goal.startswith("≤"))
    # It goes back to the onset itself: that is inside the fault.
    assert tally.strict.tried == len(tally.strict.misses) >= len(tally.inside.misses) > 0


def test_only_what_the_untouched_curve_does_not_call_forth_is_an_answer(monkeypatch: pytest.MonkeyPatch):
    rows = healthy(random.Random(5), draw(random.Random(5), noises=PLAIN, every=1), 300)
    here, there = rows[100].step, rows[200].step

    def alarms(rule: str, curve: Curve, case: Case | None = None) -> list[Found]:
        steps = [here, there] if case else [here]
        return [Found(step, step, "loss_spike", "rollback", step - 100) for step in steps]

    monkeypatch.setattr(signals_rules, "alarms", alarms)
    case = Case(kind="", name="", rows=rows, onset=rows[50].step, quiet=rows)
    assert [f.step for f in signals_rules.answers(OURS, case)] == [there]
    case.onset = there + 1
    assert signals_rules.answers(OURS, case) == []


def test_a_plain_divergence_is_found_and_a_single_outlier_is_not():
    blow_up = next(k for k in FAULTS if k.name == "step of 0.5 to 3 nats")
    outlier = next(k for k in HARMLESS if k.name == "one outlier")
    (bad,) = put((blow_up,), 1, {}, random.Random(2))
    (good,) = put((outlier,), 1, {}, random.Random(2))
    assert signals_judge.rolled_back(signals_rules.answers(OURS, bad), bad)
    assert not signals_judge.rolled_back(signals_rules.answers(OURS, good), good)


def test_the_command_prints_figures_and_fails_on_a_missed_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = healthy(random.Random(1), Look(noise="global batch", sd=0.02), 1200)
    lines = [f"{r.step},{r.loss},{r.gnorm}" for r in rows]
    (tmp_path / "a.csv").write_text("\n".join(["step,loss,grad_norm", *lines]))
    arguments = ["signals", "--series", str(tmp_path), "--size", "small", "--only", "scale", "--ours", "--check"]
    monkeypatch.setattr("sys.argv", [*arguments, "-o", "json"])
    monkeypatch.setattr(signals_judge, "answers", lambda rule, case: [])
    assert signals.main() == 1  # a collapsed loss scale is not acted on
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "opt-ops/signals-judge/1"
    first = said["figures"][0]
    assert (first["met"], first["counts"][OURS], len(first["misses"])) == (False, 0, first["tried"])
    monkeypatch.setattr("sys.argv", [arguments[0], *arguments[1:3], "--only", "low", "--ours"])
    assert signals.main() == 0  # nothing is asked without --check
    assert "| too low a loss noticed | ≥ 30 | 0/36 ✗ |" in capsys.readouterr().out
