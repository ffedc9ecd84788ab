"""Curves as other tools write them: each form gives the findings of the plain file."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opt_ops.cli import app
from opt_ops.cli.curve_files.read import CurveFile
from opt_ops.errors import UsageError
from tests.cli.test_signals import findings, quiet, replay, table

# ---- fp16


def fp16(path: Path, overflows: Sequence[int], halved: int, value: float = math.inf) -> Path:
    """A healthy curve. `halved`: the lower scale stands on the line of the overflow (0) or on the next (1)."""
    rows, scale = [], 2.0**20
    for step, loss in enumerate(quiet(300)):
        scale /= 2.0 if step - halved in overflows else 1.0
        rows.append((step, loss, value if step in overflows else 0.4, scale))
    return table(path, ["step", "loss", "grad_norm", "loss_scale"], rows)


@pytest.mark.parametrize("halved", [0, 1])
@pytest.mark.parametrize("overflows", [[150], [150, 151, 152, 153], [20, 150, 151, 299], [298, 299]])
def test_a_norm_that_is_not_finite_where_the_loss_scale_falls_is_an_overflow(
    tmp_path: Path, overflows: list[int], halved: int
):
    path = fp16(tmp_path / "loss.csv", overflows, halved, random.Random(halved).choice([math.inf, math.nan]))
    assert not [each for each in findings(path) if each["tier"] == "act"]
    assert [line.point.step for line in CurveFile(path).lines() if line.point.skip == "overflow"] == overflows


def test_a_norm_that_is_not_finite_under_a_loss_scale_that_stays_is_a_fault(tmp_path: Path):
    text = fp16(tmp_path / "loss.csv", [150], 2).read_text().replace("inf", "nan")
    (tmp_path / "loss.csv").write_text(text)
    (item,) = findings(tmp_path / "loss.csv")
    assert (item["signal"], item["step"]) == ("non_finite_loss", 150)


def test_a_scaler_that_halves_at_the_second_overflow(tmp_path: Path):
    path = fp16(tmp_path / "loss.csv", [151], 1)
    path.write_text(path.read_text().replace("\n150,", "\n150,2.0,nan,1048576.0\n150,", 1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for at, line in enumerate(lines) if at != 152) + "\n")
    assert not findings(path)


@pytest.mark.parametrize("said", ["1", "overflow", "True", "1.0"])
def test_a_column_skip_says_it_without_a_loss_scale(tmp_path: Path, said: str):
    losses: list[float] = quiet(200)
    losses[120] = math.nan
    rows = [(step, loss, said if step == 120 else 0) for step, loss in enumerate(losses)]
    assert not findings(table(tmp_path / "loss.csv", ["step", "loss", "skip"], rows))
    assert findings(table(tmp_path / "loss.csv", ["step", "loss", "other"], rows))[0]["signal"] == "non_finite_loss"


# ---- logs that go back


def resumed(losses: Sequence[float], *begins: tuple[int, int]) -> list[tuple[int, float, int]]:
    """Step, loss and attempt; each of `begins` says how many steps were trained before, and where it began again."""
    rows: list[tuple[int, float, int]] = []
    first = 0
    for attempt, (until, again) in enumerate([*begins, (len(losses), 0)], 1):
        rows += [(step, losses[step], attempt) for step in range(first, until)]
        first = again
    return rows


@pytest.mark.parametrize("names", [["step", "loss"], ["step", "loss", "attempt"]])
def test_what_an_attempt_discarded_is_forgotten(tmp_path: Path, names: list[str]):
    losses = quiet(1500)
    high = [*losses[:800], *(loss + 2.0 for loss in losses[800:])]
    rows = [
        row[: len(names)]
        for row in [*resumed(high, (900, 700))[:900], *((*row[:2], 2) for row in resumed(losses)[700:])]
    ]
    found = findings(table(tmp_path / "loss.csv", names, rows))
    acts = {(each["signal"], each["onset_step"], each["attempt"]) for each in found if each["tier"] == "act"}
    assert acts == {("loss_spike", 800, 1)}
    assert "ATTEMPT" in replay(tmp_path / "loss.csv").splitlines()[0]


def test_each_step_that_goes_back_is_an_attempt_however_short(tmp_path: Path):
    rows = [row[:2] for row in resumed(quiet(600), (400, 380), (384, 380), (383, 380))]
    rows[-1] = (599, math.nan)
    (item,) = findings(table(tmp_path / "loss.csv", ["step", "loss"], rows))
    assert (item["signal"], item["attempt"]) == ("non_finite_loss", 4)


def test_an_attempt_that_begins_with_the_last_step_is_one(tmp_path: Path):
    rows = [row[:2] for row in resumed(quiet(600), (400, 399))]
    rows[400] = (399, 2.1)
    rows[-1] = (599, math.nan)
    (item,) = findings(table(tmp_path / "loss.csv", ["step", "loss"], rows))
    assert item["attempt"] == 2


@pytest.mark.parametrize("planned", [False, True])
def test_attempts_that_do_not_continue_the_loss_are_bad_restores_unless_planned(tmp_path: Path, planned: bool):
    """Each begins where training from scratch does, and learns from there; nobody stops it."""
    noise = random.Random(3)
    rows = []
    for attempt, first in enumerate((0, 20_000, 26_000), 1):
        for at in range(400 if attempt == 1 else 130):
            rows.append((first + 50 * at, 4.5 + 4.0 / (1 + at / 15) + noise.gauss(0.0, 0.03), attempt))
    options = [word for first in (20_000, 26_000) for word in ("--planned", str(first))] if planned else []
    found = findings(table(tmp_path / "loss.csv", ["step", "loss", "attempt"], rows), *options)
    acts = [(each["signal"], each["attempt"], each["onset_step"]) for each in found if each["tier"] == "act"]
    assert acts == ([] if planned else [("bad_restore", 2, 20_000), ("bad_restore", 3, 26_000)])
    targets = [each["target_step"] for each in found if each["tier"] == "act"]
    assert targets == ([] if planned else [19_949, 25_949]), (
        "before the step that the attempt may have been restored from"
    )


def test_a_lone_stray_line_is_no_attempt(tmp_path: Path):
    rows: list[tuple[int, float]] = list(enumerate(quiet(300)))
    rows.insert(150, (40, 9.0))
    rows.append((300, math.nan))
    path = table(tmp_path / "loss.csv", ["step", "loss"], rows)
    (item,) = findings(path)
    assert (item["signal"], item["attempt"]) == ("non_finite_loss", 1)
    done = CliRunner().invoke(app, ["signals", "replay", str(path)])
    assert "1 line whose step does not follow passed over." in done.stderr


def test_runs_in_one_file_are_curves_of_their_own(tmp_path: Path):
    rows = [("a", step, loss) for step, loss in enumerate(quiet(200))]
    rows += [("b", step, 5.0 + loss) for step, loss in enumerate(quiet(200), 200)]
    rows.append(("b", 400, math.nan))
    (item,) = findings(table(tmp_path / "loss.csv", ["run", "step", "loss"], rows))
    assert (item["run"], item["attempt"], item["signal"]) == ("b", 1, "non_finite_loss")


# ---- other tools' files


class Spiked:
    """A curve with a divergence at step 500, and what is found in it as a plain file."""

    def __init__(self, folder: Path) -> None:
        noise = random.Random(5)
        self.steps = range(0, 7000, 10)
        self.losses = [loss + (1.5 if at >= 500 else 0.0) for at, loss in enumerate(quiet(700))]
        self.norms = [0.3 + noise.gauss(0.0, 0.02) for _ in self.steps]
        self.rows = list(zip(self.steps, self.losses, self.norms, [0.0003] * 700, strict=True))
        self.names = ["step", "loss", "grad_norm", "lr"]
        self.found = findings(table(folder / "plain.csv", self.names, self.rows))
        assert "act" in {each["tier"] for each in self.found}


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Spiked:
    return Spiked(tmp_path_factory.mktemp("plain"))


def test_wandbs_history_with_rows_of_other_metrics(tmp_path: Path, spiked: Spiked):
    names = [
        "_step",
        "_timestamp",
        "eval/loss",
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/global_step",
    ]
    rows: list[list[Any]] = []
    for at, (step, *values) in enumerate(spiked.rows):
        rows.append([len(rows), 1.7e9 + at, "", *values, step])
        if at % 50 == 0:
            rows.append([len(rows), 1.7e9 + at, 2.5, "", "", "", step])
    path = table(tmp_path / "wandb.csv", names, rows)
    assert findings(path) == spiked.found
    done = CliRunner().invoke(app, ["signals", "replay", str(path)])
    assert "14 lines without a loss passed over." in done.stderr
    assert "step is train/global_step" in done.stderr


def test_wandbs_export_of_a_chart(tmp_path: Path, spiked: Spiked):
    keys = ["_step", "train/loss", "train/grad_norm", "train/lr"]
    names = ["Step", *(f"grand-sun - 3 - {key}{end}" for key in keys for end in ("", "__MIN", "__MAX"))]
    rows = [[f'"{cell}"' for cell in (row[0], *(value for value in row for _ in range(3)))] for row in spiked.rows]
    path = table(tmp_path / "chart.csv", [f'"{name}"' for name in names], rows)
    assert findings(path) == spiked.found


def test_json_lines_and_hugging_faces_state(tmp_path: Path, spiked: Spiked):
    names = ["step", "loss", "grad_norm", "learning_rate"]
    records: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in spiked.rows]
    records.insert(100, {"step": 1000, "eval_loss": 2.1})
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"best_metric": None, "log_history": records, "max_steps": 7000}, indent=2))
    assert findings(state) == spiked.found
    state.write_text(json.dumps({"log_history": records}))
    assert findings(state) == spiked.found
    lines = tmp_path / "history.jsonl"
    nested = [{"_step": each.pop("step"), "train": each} for each in records]
    lines.write_text("\n".join(map(json.dumps, nested)) + '\n{"_step": 7000, "train": {"lo')
    assert findings(lines) == spiked.found


def test_tensorboards_scalars(tmp_path: Path, spiked: Spiked):
    rows = [(1.7e9 + at, step, loss) for at, (step, loss, *_) in enumerate(spiked.rows)]
    path = table(tmp_path / "scalars.csv", ["Wall time", "Step", "Value"], rows)
    assert findings(path) == findings(table(tmp_path / "plain.csv", ["step", "loss"], [row[:2] for row in spiked.rows]))


def test_our_own_telemetry(tmp_path: Path, spiked: Spiked):
    path = tmp_path / "telemetry.jsonl"
    lines = [
        {"num_updates": step, "ts": 1.7e9 + step, "loss": loss, "gnorm": norm, "lr": lr, "finite": True}
        for step, loss, norm, lr in spiked.rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert findings(path) == spiked.found
    assert findings(path, "--column", "grad_norm=gnorm") == spiked.found


@pytest.mark.parametrize(
    ("before", "delimiter", "encoding", "comma"),
    [
        ("\ufeff", ";", "utf-8", ","),
        ("", "\t", "utf-8", "."),
        ("\ufeff", ",", "utf-16-le", "."),
        ("\n\n", ", ", "utf-8", "."),
    ],
)
def test_dialects_of_csv(tmp_path: Path, spiked: Spiked, before: str, delimiter: str, encoding: str, comma: str):
    path = table(tmp_path / "loss.csv", spiked.names, spiked.rows, delimiter)
    text = path.read_text().replace(".", comma) if comma != "." else path.read_text()
    path.write_bytes((before + text).encode(encoding))
    assert findings(path) == spiked.found


def test_comments_spaces_doubled_lines_and_large_steps(tmp_path: Path, spiked: Spiked):
    path = table(tmp_path / "loss.csv", spiked.names, spiked.rows, "  ")
    path.write_text("# of run 12\n" + "".join(2 * line for line in path.read_text().splitlines(keepends=True)[1:]))
    path.write_text(path.read_text().replace("12\n", "12\n" + "  ".join(spiked.names) + "\n", 1))
    assert findings(path) == spiked.found
    rows = [(f'"{row[0]:,}"', *row[1:]) for row in spiked.rows]
    assert findings(table(path, spiked.names, rows)) == spiked.found


def test_thousands_of_columns_and_a_last_line_that_is_cut_short(tmp_path: Path, spiked: Spiked):
    names = [*(f"layer {n}/norm" for n in range(600)), *spiked.names, *(f"rank {n}/time" for n in range(600))]
    rows = [[*[1] * 600, *row, *[2] * 600] for row in spiked.rows]
    path = table(tmp_path / "wide.csv", names, rows)
    path.write_text(path.read_text() + ",".join(["1"] * 600 + ["7000", "9"]))
    assert findings(path) == spiked.found


def test_columns_that_nobody_guesses_are_named(tmp_path: Path, spiked: Spiked):
    path = table(tmp_path / "loss.csv", ["tick", "nats per token", "size of the gradient", "rate"], spiked.rows)
    with pytest.raises(UsageError, match="no column step or loss in tick, nats per token, size") as error:
        replay(path)
    assert "--column step=COLUMN" in error.value.hint
    said = ["step=tick", "loss=nats per token", "grad_norm=size of the gradient", "lr=rate"]
    assert findings(path, *(word for each in said for word in ("--column", each))) == spiked.found


@pytest.mark.parametrize(
    ("said", "what", "next_"),
    [
        ("loss", "names no column: step, loss, grad_norm, lr", "NAME=COLUMN"),
        ("los=train/loss", "names no column", "NAME=COLUMN"),
        ("loss=train/los", "has no column train/los; it has step, train/loss, eval/loss", "--column loss=train/loss"),
    ],
)
def test_a_wrong_column_is_told_with_what_to_type(tmp_path: Path, said: str, what: str, next_: str):
    path = table(tmp_path / "loss.csv", ["step", "train/loss", "eval/loss"], [(1, 2.0, 2.1)])
    with pytest.raises(UsageError, match=what) as error:
        replay(path, "--column", said)
    assert next_ in error.value.hint


def test_what_else_a_log_may_say_reaches_the_detectors(tmp_path: Path):
    names = ["step", "loss", "lr", "bsz", "tokens", "total", "stage", "batch", "overflow"]
    rows = [
        (1, 2.0, "", 256, 524288, 1, "web", 1, 0),
        (2, 2.0, 0.1, "", "", 2, "", 2, 0),
        (3, 2.0, "", 512, 1048576, 3, "books", 3, 0),
    ]
    points = [line.point for line in CurveFile(table(tmp_path / "loss.csv", names, rows)).lines()]
    assert [(p.lr, p.batch, p.batch_tokens, p.stage) for p in points] == [
        (0.0, None, 524288, "web"), (0.1, None, 524288, "web"), (0.1, None, 1048576, "books"),
    ]  # fmt: skip
    points = [line.point for line in CurveFile(tmp_path / "loss.csv", ["bsz=bsz"]).lines()]
    assert [p.batch for p in points] == [256, 256, 512]
