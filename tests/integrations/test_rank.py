"""What all adapters share: a rank around its updates, settings, the optimizer, checkpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ops.contract import CheckpointError, NotFiniteError, Options, PhaseName, UserError, committed, pin, read
from opt_ops.integrations.agreement import all_do
from opt_ops.integrations.checkpoints import Written
from opt_ops.integrations.loop_settings import plan_of
from opt_ops.integrations.optimizer import LiveOptimizer
from opt_ops.integrations.rank import Plan, SupervisedRank
from opt_ops.integrations.settings import betas, number, whole

CONSTANT = {"kind": "constant", "peak_lr": 0.5}


class FakeSignals:
    def __init__(self) -> None:
        self.save_requested = threading.Event()

    def dump_stacks_to(self, path: Path) -> None:
        pass

    def leave_sigterm_to_supervisor(self) -> None:
        pass


def adam() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], weight_decay=0.1)


def rank_of(folder: Path, **plan: Any) -> SupervisedRank:
    options = Options(run_dir=folder / "run", checkpoint_dir=folder / "checkpoints", attempt="a1")
    rank = SupervisedRank(options, FakeSignals())  # pyright: ignore[reportArgumentType]
    whole_plan = {"schedule": CONSTANT, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip_norm": 1.0, "batch": 4}
    rank.start(Plan(**{"steps": 100, **whole_plan, **plan}), adam())
    return rank


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "telemetry.jsonl").read_text().splitlines()]


def update(rank: SupervisedRank, **others: Any) -> bool:
    rank.begin_update()
    rank.before_update(1.0, 2.0, **others)
    return rank.after_update()


def writer(text: str, state: bool = True) -> Callable[[Path], Written]:
    def write(path: Path) -> Written:
        (path / "sub").mkdir()
        (path / "sub" / "weights").write_text(text)
        names = frozenset({"sub/weights"})
        return Written(names, names if state else frozenset())

    return write


def test_saves_are_due_marked_and_pruned(tmp_path: Path) -> None:
    rank = rank_of(tmp_path, steps=8, checkpoint_every=2, keep=1)
    for step in range(1, 9):
        rank.outside.signals.save_requested.set() if step == 5 else None
        due = update(rank)
        assert due == (step in (2, 4, 5, 6, 8))
        if due:
            rank.save(writer(str(step)))
            if step == 4:
                pin(tmp_path / "checkpoints" / "step-00000004")
    assert [step for step, _ in committed(tmp_path / "checkpoints")] == [4, 8]
    manifest = read(tmp_path / "checkpoints" / "step-00000008")
    assert manifest.files["sub/weights"]["state"] is True
    assert (manifest.data_position, manifest.tokens, manifest.telemetry["num_updates"]) == (32, 32, 8)
    phases = [json.loads(line)["phase"] for line in (tmp_path / "run" / "phases.jsonl").read_text().splitlines()]
    assert phases == ["start", *["training", "saving"] * 5, "ending"]


def test_a_save_that_fails_is_told_in_the_next_line_and_leaves_nothing(tmp_path: Path) -> None:
    rank = rank_of(tmp_path)

    def fails(path: Path) -> Written:
        (path / "half").write_text("x")
        raise RuntimeError("[enforce fail at inline_container.cc:672]") from OSError(28, "No space left on device")

    update(rank)
    rank.save(fails)
    update(rank)
    update(rank)
    told = [line["save_error"] for line in lines(tmp_path)]
    assert told == [None, "OSError: [Errno 28] No space left on device", None]
    assert not (tmp_path / "checkpoints" / "step-00000001").exists()
    assert rank.weights_moved


def test_the_last_save_must_not_fail(tmp_path: Path) -> None:
    rank = rank_of(tmp_path, steps=1)

    def fails(_: Path) -> Written:
        raise OSError("no space")

    assert update(rank)
    with pytest.raises(OSError, match="no space"):
        rank.save(fails)


def test_weights_move_with_a_rate_above_0_only(tmp_path: Path) -> None:
    rank = rank_of(tmp_path, schedule={"kind": "table", "knots": [[2, 0.0], [3, 1.0]]})
    update(rank)
    assert not rank.weights_moved
    update(rank)
    update(rank)
    assert rank.weights_moved
    rank.save(writer("x"))
    assert not rank.weights_moved


def test_a_stale_save_is_refused(tmp_path: Path) -> None:
    rank = rank_of(tmp_path)
    update(rank)
    rank.save(writer("same"))
    update(rank)
    with pytest.raises(CheckpointError, match="stale: sub/weights"):
        rank.save(writer("same"))
    assert [step for step, _ in committed(tmp_path / "checkpoints")] == [1]


def test_a_loss_or_a_norm_that_is_not_finite_is_no_update(tmp_path: Path) -> None:
    rank = rank_of(tmp_path)
    update(rank)
    rank.begin_update()
    with pytest.raises(NotFiniteError):
        rank.before_update(1.0, float("inf"))
    assert (rank.step, rank.position, rank.tokens) == (1, 4, 4)
    last = lines(tmp_path)[-1]
    assert (last["num_updates"], last["gnorm"], last["finite"], last["data_position"]) == (2, None, False, 4)


def test_a_rate_that_the_script_computes_is_told_with_its_base(tmp_path: Path) -> None:
    rank = rank_of(tmp_path, schedule={"kind": "function"})
    (tmp_path / "run" / "drill.json").write_text(
        '[{"id": "x", "kind": "lr", "from_step": 1, "updates": 1, "factor": 8}]'
    )
    update(rank, base_lr=0.25)
    update(rank, base_lr=0.125)
    assert [(line["lr"], line["base_lr"]) for line in lines(tmp_path)] == [(2.0, 0.25), (0.125, 0.125)]


def test_evaluation_does_not_count_as_time_of_a_step(tmp_path: Path) -> None:
    rank = rank_of(tmp_path)
    rank.folder.phase(PhaseName.EVALUATION, 0)
    rank.leave_out_seconds(-1000.0)  # as if the step had begun 1,000 s ago
    update(rank)
    assert lines(tmp_path)[-1]["step_seconds"] > 1000.0
    rank.leave_out_seconds(1000.0)
    update(rank)
    assert lines(tmp_path)[-1]["step_seconds"] < 1000.0


def test_groups_keep_their_ratio_and_their_decay() -> None:
    one, two = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [one], "lr": 0.5}, {"params": [two], "lr": 2.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    live = LiveOptimizer(optimizer, (0.8, 0.9), 0.3)
    optimizer.param_groups[0]["lr"] = 77.0  # as a checkpoint or a scheduler leaves it
    live.set(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert live.readback() == {"lr": 1.0, "betas": [0.8, 0.9], "weight_decay": 0.3}


def test_what_fails_is_raised() -> None:
    def refuses() -> None:
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        all_do(refuses, 1)
    assert all_do(lambda: 3, 1) == 3


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (whole(1), "0"),
        (whole(1), "1.5"),
        (whole(0), "-1"),
        (number, "nan"),
        (number, "-1"),
        (number, "x"),
        (betas, "1"),
    ],
)
def test_bad_values_of_settings(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse(text)


def planned(schedule: Any, optimizer: torch.optim.Optimizer | None = None, **settings: str) -> Plan:
    options = Options(settings={key.replace("__", "."): value for key, value in settings.items()})
    found = {"steps": 10, "checkpoint_every": 0, "clip_norm": 1.0, "batch": 2}
    return plan_of(options, optimizer or adam(), schedule=schedule, **found)[0]


def test_settings_of_a_loop() -> None:
    cosine = {"kind": "cosine", "peak_lr": 1.0, "total_steps": 10}
    plan = planned(cosine, steps="20", optim__peak_lr="0.5", optim__warmup_steps="3", optim__betas="0.7,0.8")
    assert plan.schedule == {**cosine, "peak_lr": 0.5, "warmup_steps": 3}
    assert (plan.steps, plan.betas, plan.weight_decay) == (20, (0.7, 0.8), 0.1)
    assert planned(lambda step: 1.0 / step).schedule == {"kind": "function"}


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ({"kind": "cosine", "peak_lr": 1.0}, {}, "needs the field 'total_steps'"),
        ({"kind": "constant", "peak_lr": 1.0, "warmup": 3}, {}, "has no field 'warmup'"),
        ({"kind": "cosin", "peak_lr": 1.0}, {}, "give a function"),
        (CONSTANT, {"optim__total_steps": "5"}, "no setting optim.total_steps"),
        (lambda _: 1.0, {"optim__peak_lr": "1"}, "no setting optim.peak_lr"),
        (CONSTANT, {"optim__betas": "0.9"}, "expected two numbers"),
    ],
)
def test_a_schedule_or_a_setting_that_cannot_work(schedule: Any, settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(schedule, **settings)


def test_an_optimizer_without_betas_refuses_them() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0)
    assert planned(CONSTANT, sgd).betas == ()
    with pytest.raises(UserError, match=r"no setting optim\.betas"):
        planned(CONSTANT, sgd, optim__betas="0.9,0.9")
