"""What a run prints: what is trained and where, the first update, and the time that is left."""

from pathlib import Path

import pytest

from tests.trainer.harness import SMALL, settings, train
from trainer import recipes
from trainer.progress_log import ProgressLog, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (3_031_200, "35 d 2 h")],
)
def test_a_span_of_time_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def line(step: int, seconds: float) -> dict[str, float]:
    return {"num_updates": step, "step_seconds": seconds, "loss": 9.0, "lr": 1e-4, "gnorm": 1.0, "wps": 1e5}


def test_the_first_update_of_a_process_is_printed_and_does_not_count_for_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = ProgressLog(recipes.build("opt-tiny", ["steps=1000", "log_every=10"]))
    for step in range(203, 1001):
        log.update(line(step, 300.0 if step == 203 else 2.0))
    printed = capsys.readouterr().out.splitlines()
    steps = [int(each.split("step ")[1].split("/")[0]) for each in printed]
    assert steps == [203, *range(210, 1001, 10)]
    assert printed[0].endswith("100,000 tokens/s"), "one update tells nothing of the time left"
    assert printed[1].endswith("100,000 tokens/s  26 min left")
    assert printed[-1].endswith("100,000 tokens/s")


def test_a_run_says_at_its_start_what_is_trained_and_where(text: Path, tmp_path: Path) -> None:
    places = ["--run-dir", tmp_path / "a1", "--checkpoint-dir", tmp_path / "checkpoints"]
    (done,) = train(0, "--recipe", "opt-tiny", "--data", text, *places, *settings(*SMALL, "steps=3", "log_every=2"))
    assert done.returncode == 0, done.stderr
    model, layout, batch, device, *updates = done.stdout.splitlines()
    assert model.startswith("model: opt-tiny, ")
    assert model.endswith(" parameters, fp32")
    assert layout == "layout: 1 rank, dp 1 × tp 1, engine fsdp2"
    assert batch == "batch: 256 tokens per update, updates 1 to 3"
    assert device.startswith("device: cpu, attention ")
    assert device.endswith(", own kernels: none")
    assert [each.split("step ")[1].split("  ")[0] for each in updates] == ["1/3", "2/3", "3/3"]
