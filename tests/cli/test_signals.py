"""`opt-ops signals replay` on curves of one's own."""

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
from opt_ops.errors import OptOpsError, UsageError


def replay(path: Path, *options: str) -> str:
    done = CliRunner().invoke(app, ["signals", "replay", str(path), *options])
    if isinstance(done.exception, OptOpsError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def findings(path: Path, *options: str) -> list[dict[str, Any]]:
    return json.loads(replay(path, *options, "-o", "json", "-q"))["items"]


def table(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]], delimiter: str = ",") -> Path:
    path.write_text("\n".join(delimiter.join(map(str, row)) for row in [names, *rows]) + "\n")
    return path


def quiet(points: int, seed: int = 1) -> list[float]:
    noise = random.Random(seed)
    return [2.0 + noise.gauss(0.0, 0.02) for _ in range(points)]


@pytest.fixture
def diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "loss.csv"
    losses = [2.0 + 0.02 * (step % 7) + (3.0 if step >= 500 else 0.0) for step in range(700)]
    path.write_text("step,loss,lr\n" + "".join(f"{step},{loss},0.001\n" for step, loss in enumerate(losses)))
    return path


def test_a_divergence_is_shown_with_what_the_playbook_would_do(diverged: Path):
    items = json.loads(replay(diverged, "-o", "json", "-q"))["items"]
    assert [(f["signal"], f["tier"], f["onset_step"], f["playbook"]) for f in items] == [
        ("loss_spike", "alert", 500, "loss_spike"),
        ("loss_spike", "act", 500, "loss_spike"),
    ]
    assert items[0]["would"] == "notify only"
    assert items[1]["would"] == "rollback to a checkpoint at or before step 400, learning rate × 0.75"
    assert items[1]["evidence"]["lr"] == 0.001
    assert "limit" in replay(diverged, "-o", "wide").splitlines()[1]


def test_a_quiet_curve_has_no_findings(diverged: Path):
    diverged.write_text("\n".join(diverged.read_text().splitlines()[:400]))
    assert json.loads(replay(diverged, "-o", "json")) == {"schema": "opt-ops/signals-replay/1", "items": []}


def test_what_is_not_finite_is_found_and_stays_json(diverged: Path):
    diverged.write_text("step,loss\n1,2.0\n2,nan\n")
    (item,) = json.loads(replay(diverged, "-o", "json"))["items"]
    assert (item["signal"], item["step"], item["evidence"]["loss"]) == ("non_finite_loss", 2, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: no column step or loss in an empty file"),
        ("epoch,loss\n1,2\n", "line 1: no column step in epoch, loss"),
        ("step,loss\n", "no points"),
        ("step,loss\n" + "".join(f"{step},2.0\n" for step in range(9, 0, -1)), "of 7 lines do not follow"),
        ("step,loss\n1,\n2,\n", "no points"),
        ("step,loss\n1,2.0\n2,abc\n", "line 3: loss is 'abc', not a number"),
        ("step,loss\n1.5,2.0\n", "line 2: step is '1.5', not a whole number up to 1,000,000,000"),
        ("step,loss\n,2.0\n", "line 2: step is '', not a whole number"),
        ("step,loss\n-5,2.0\n", "line 2: step is '-5', not a whole number"),
        ('{"step": 1, "loss": [2]}\n', "line 1: loss is "),
        ('{"log_history": []}', "no column step or loss in log_history"),
        ("[1, 2]", "holds no list of records"),
        ("{", "is not JSON"),
        ("step,a - train/loss,b - train/loss\n1,2,3\n", "more than one column may be loss"),
        ("".join(f"{step},2\n" for step in ["step,loss\n0", *[n % 7 for n in range(9000)]]), "more than 1000 attempts"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(diverged: Path, text: str, said: str):
    diverged.write_text(text)
    with pytest.raises(UsageError, match=said):
        replay(diverged)


def test_a_file_that_is_no_text_is_told(diverged: Path):
    diverged.write_bytes(b"step,loss\n\xff\xfe\n")
    with pytest.raises(UsageError, match="is no CSV file"):
        replay(diverged)


def test_a_dead_tail_is_one_finding(tmp_path: Path):
    losses = [*quiet(300), *[math.nan] * 900]
    losses[40] = math.inf
    first, dead = findings(table(tmp_path / "loss.csv", ["step", "loss"], list(enumerate(losses))))
    assert (first["step"], first["evidence"]["points"]) == (40, 1)
    assert (dead["step"], dead["evidence"]["points"], dead["evidence"]["last_step"]) == (300, 900, 1199)


def test_an_unknown_norm_is_unknown(tmp_path: Path):
    rows = [(step, loss, "" if 200 <= step < 400 else 0.2) for step, loss in enumerate(quiet(600))]
    path = table(tmp_path / "loss.csv", ["step", "loss", "grad_norm"], rows)
    assert findings(path) == []
    unknown = [line.point for line in CurveFile(path).lines()][300]
    assert (unknown.gnorm, unknown.finite) == (None, True)


def test_each_finding_says_what_would_be_done_and_to_where(diverged: Path):
    alert, act = findings(diverged)
    assert (alert["action"], alert["target_step"]) == ("tell", None)
    assert act["action"] == "rollback"
    assert act["margin_steps"] >= 100
    assert act["target_step"] == act["onset_step"] - act["margin_steps"]
    rows = [(step, loss + (3.0 if step >= 60 else 0.0)) for step, loss in enumerate(quiet(300))]
    (act,) = (each for each in findings(table(diverged, ["step", "loss"], rows)) if each["tier"] == "act")
    assert act["target_step"] == 0


def test_a_page_that_only_tells_has_no_target(tmp_path: Path):
    rows = [(step, loss - (1.0 if step >= 600 else 0.0)) for step, loss in enumerate(quiet(900))]
    found = findings(table(tmp_path / "loss.csv", ["step", "loss"], rows))
    assert {(each["signal"], each["action"], each["target_step"]) for each in found} == {("loss_too_low", "tell", None)}


LOG_SETS = Path(__file__).parents[1] / "core/failures/data/log_sets"


def blame(folder: Path) -> list[dict[str, object]]:
    done = CliRunner().invoke(app, ["signals", "blame", str(folder), "-o", "json"])
    if isinstance(done.exception, OptOpsError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["items"]


@pytest.mark.parametrize("name", ["ecc-abort", "every-rank-same-error", "host-memory", "storage-client"])
def test_blame_by_the_logs_of_all_ranks(name: str):
    wanted = json.loads((LOG_SETS / name / "wanted.json").read_text())
    (said,) = blame(LOG_SETS / name)
    assert said["class"] in wanted["class"].split("|")
    assert said["first_rank"] in wanted["first_rank"]
    assert said["node"] == wanted["node"]
    assert wanted["line_has"] in said["line"]


def test_blame_without_exits(tmp_path: Path):
    (tmp_path / "rank-0000.log").write_text("ncclRemoteError: remote process exited\n")
    (tmp_path / "rank-0003.log").write_text("step 3\nOSError: [Errno 116] Stale file handle\n")
    (said,) = blame(tmp_path)
    assert (said["class"], said["first_rank"], said["node"]) == ("storage", 3, None)


@pytest.mark.parametrize(
    "exits",
    ["", "[]", "null", '{"exits": 3}', '{"exits": [null, [], {"rank": "x"}, {"rank": 1e400}]}', "[" * 100_000,
        '{"exits": [{"rank": 9, "code": true, "at": NaN}]}'],
)  # fmt: skip
def test_blame_with_exits_that_cannot_be_read(tmp_path: Path, exits: str):
    (tmp_path / "exits.json").write_text(exits)
    (tmp_path / "rank-0000.log").mkdir()
    (tmp_path / "rank-0001.log").write_bytes(bytes(range(256)) * 100 + b"\nMemoryError\n")
    assert all(item["class"] == "out_of_memory" for item in blame(tmp_path))


def test_blame_for_nothing_and_for_no_folder(tmp_path: Path):
    assert blame(tmp_path) == []
    with pytest.raises(OptOpsError, match="cannot be read"):
        blame(tmp_path / "none")
