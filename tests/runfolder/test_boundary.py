"""Foreign JSON becomes typed, bounded, finite values, and what is left out is counted with an example."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from opt_ops.contract.telemetry import TelemetryLine
from opt_ops.runfolder import fields as f
from opt_ops.runfolder import telemetry as telemetry_reader
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.runfolder.left_out import LeftOutCounter
from opt_ops.runfolder.node_files import FileAgents
from opt_ops.runfolder.telemetry import point_of
from opt_ops.runfolder.telemetry_curve import read_curve
from opt_ops.runfolder.trainer_files import FileTrainer
from tests.e2e.stub_trainer import telemetry

GOOD = json.loads(json.dumps(telemetry(7, 1e-3, 2.0, 0.1)))


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return path


@pytest.mark.parametrize("loss", ["NaN", "Infinity", "-Infinity", "null", '"nan"', '" -Inf "', "1e999", "9" * 400])
def test_a_loss_that_is_not_finite_is_known_however_it_is_spelled(loss: str):
    line = json.dumps(GOOD | {"loss": 0, "finite": True}).replace('"loss": 0', f'"loss": {loss}')
    point = point_of(json.loads(line))
    assert (point.loss, point.finite, point.step) == (None, False, 7)


def test_a_gradient_norm_may_be_missing_but_not_infinite():
    assert point_of(GOOD | {"gnorm": None, "finite": True}).finite, "this trainer has none"
    assert not point_of(GOOD | {"gnorm": math.inf, "finite": True}).finite
    assert point_of(GOOD | {"gnorm": math.inf, "finite": True, "skip": "overflow"}).finite, "fp16 skips the update"


def test_whole_numbers_may_be_written_as_floats_and_nulls_stand_for_what_a_trainer_does_not_have():
    point = point_of(GOOD | {"num_updates": 7.0, "tokens": 1e6, "clip_norm": None, "betas": None, "busy_seconds": None})
    assert (point.step, point.tokens, point.clip_norm, point.betas) == (7, 1_000_000, 0.0, ())
    assert type(point.step) is type(point.tokens) is int


@pytest.mark.parametrize("name", ["num_updates", "ts", "lr", "loss"])
@pytest.mark.parametrize("value", ["x", True, {}, [], "7"])
def test_a_line_without_what_it_must_have_is_refused_with_the_name_of_the_field(name: str, value: Any):
    with pytest.raises(f.BadField, match=f"`{name}` is "):
        point_of(GOOD | {name: value})


def test_a_field_that_is_not_needed_is_left_out_alone_at_any_depth():
    left_out: list[str] = []
    busy = {"median": 1.0, "max": "slow", "rank": 0, "mood": []}
    point = point_of(
        GOOD | {"wps": "fast", "busy_seconds": busy, "valid": {"wiki": 2.0, "web": [], "x": math.nan}}, left_out
    )
    assert (point.wps, point.busy, point.valid) == (0.0, None, {"wiki": 2.0, "x": None})
    assert [why.partition(" ")[0] for why in left_out] == ["`wps`", "`busy_seconds.max`", "`valid.web`"]


def test_the_reader_of_telemetry_uses_the_names_of_the_contract():
    source = Path(telemetry_reader.__file__).read_text()
    used = {word.split('"')[1] for word in source.replace("\n", " ").split("record.")[1:] if word.count('"') >= 2}
    used -= {"median", "max", "rank", "ranks", "certain", "what"}
    assert used <= set(TelemetryLine.__annotations__)
    assert len(used) > 15


def test_text_and_numbers_are_bounded():
    assert f.text()("a\ud800b") == "a�b"
    assert len(f.text(10)("x" * 10**6)) == 10
    assert f.number()(1e300) == f.LARGEST_FLOAT
    for value in (10**400, 2**63):
        with pytest.raises(f.BadField):
            f.whole()(value)
    for value in (1.795e12, -1, math.inf):
        with pytest.raises(f.BadField):
            f.moment(value)
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    assert len(json.dumps(f.plain(deep))) < 100
    assert "nested" in f.why_not_plain(deep)


def test_what_is_left_out_is_counted_by_file_with_the_first_and_the_newest_example(tmp_path: Path):
    counter = LeftOutCounter(tmp_path)
    trainer = FileTrainer(tmp_path, counter)
    path = write(tmp_path / "12.00/a0/telemetry.jsonl", GOOD, "{", GOOD | {"num_updates": 8, "wps": "fast"})
    assert [point.step for point in trainer.points("12.00-a0")] == [7, 8]
    write(path, GOOD | {"num_updates": 9, "lr": True})
    assert not trainer.points("12.00-a0")
    (found,) = counter.left_out()
    assert (found.source, found.file, found.count, found.taken) == ("telemetry", "12.00/a0/telemetry.jsonl", 3, 2)
    assert found.first.startswith("line 2: not JSON")
    assert found.newest == "line 4: `lr` is true or false, not a number"


_CURVE = [
    "num_updates",
    "ts",
    "loss",
    "gnorm",
    "lr",
    "wps",
    "tokens",
    "finite",
    "betas",
    "weight_decay",
    "clip_norm",
    "skip",
]
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, -0.5, 7.0, 1e9 + 1, 2**63, 1e31, 1e300, math.nan, math.inf, -math.inf),
    *("7", "nan", "a\ud800b", [], [0.9], [0.9, 0.95, 1.0], [0.9, "x"], [math.nan, 0.9], {}, {"a": 1}),
)


@pytest.mark.parametrize("name", _CURVE)
def test_a_curve_that_is_read_fast_is_that_of_the_points(name: str, tmp_path: Path):
    """Each field takes every odd value in a line of its own, or is missing; then steps are strays, or fall."""
    odd = [GOOD | {"num_updates": step} | {name: value} for step, value in enumerate(_ODD, 8)]
    missing = {key: value for key, value in GOOD.items() if key != name} | (
        {"num_updates": 50} if name != "num_updates" else {}
    )
    for number, lines in enumerate(
        [
            [GOOD, *odd, missing, "{", "[]", '{"num_updates": 60', GOOD | {"num_updates": 60}],
            [GOOD, GOOD | {"num_updates": 5000}, *odd, GOOD | {"num_updates": 41}, GOOD | {"num_updates": 42}],
            [GOOD | {"num_updates": step} for step in (*range(1, 90), 20, 21, 22)] + odd,
        ]
    ):
        path = write(tmp_path / f"12.00/a{number}/telemetry.jsonl", *lines)
        points = FileTrainer(tmp_path).points(f"12.00-a{number}")
        assert points
        expected = [(p.step, p.loss, p.gnorm, p.lr, p.wps, p.tokens, p.finite) for p in points]
        assert [tuple(each) for each in read_curve(path)] == expected


def test_a_file_that_stays_unreadable_is_counted_once(tmp_path: Path):
    counter = LeftOutCounter(tmp_path)
    (tmp_path / "health").mkdir()
    os.mkfifo(tmp_path / "health/n1.jsonl")
    agents = FileAgents(tmp_path, counter)
    for _ in range(3):
        assert not list(agents.heartbeats())
    (found,) = counter.left_out()
    assert (found.count, found.newest) == (1, "the file cannot be read: it is a named pipe, and must be a regular file")


def steps(tmp_path: Path, *numbers: int) -> tuple[list[int], int]:
    counter = LeftOutCounter(tmp_path)
    trainer = FileTrainer(tmp_path, counter)
    write(tmp_path / "12.00/a0/telemetry.jsonl", *(GOOD | {"num_updates": number} for number in numbers))
    taken = [point.step for point in trainer.points("12.00-a0")]
    return taken, sum(each.count for each in counter.left_out())


def test_strays_among_the_steps_are_left_out_and_a_trainer_that_begins_again_is_followed(tmp_path: Path):
    usual = tuple(range(1, 100))
    assert steps(tmp_path / "1", *usual, 99, 100, 3, 101, 10**8, 102, 103) == ([*range(1, 104)], 3)
    assert steps(tmp_path / "2", *usual, 50, 51, 52) == ([*usual, 50, 51, 52], 0)
    assert steps(tmp_path / "3", 10**9, 1, 2, 3) == ([10**9, 1, 2, 3], 0)
    assert steps(tmp_path / "4", 100, 50_000, 100_000, 150_000, 200_000)[0] == [100, 50_000, 100_000, 150_000, 200_000]
    taken, left_out = steps(tmp_path / "5", *(1, 2, 3) * 1000)
    assert left_out > 2800
    assert taken[:3] == [1, 2, 3]


def test_a_step_time_that_is_not_told_is_taken_from_the_times_of_the_lines(tmp_path: Path):
    lines = [GOOD | {"num_updates": n, "ts": 100.0 + 2 * n, "step_seconds": None} for n in (1, 2, 4)]
    write(tmp_path / "12.00/a0/telemetry.jsonl", *lines)
    assert [point.step_seconds for point in FileTrainer(tmp_path).points("12.00-a0")] == [0.0, 2.0, 2.0]


CONFIG: dict[str, Any] = {
    "steps": 600.0,
    "schedule": {"peak_lr": 0.001, "warmup_steps": 60.0, "total_steps": 600, "final_fraction": 0.1, "mood": 1},
    "optimizer": {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0, "clip_norm": None},
    "versions": {"torch": math.nan, "x": "\ud800"},
    "layout": "tp2",
}


def test_settings_are_typed_and_what_decides_nothing_is_left_out_alone(tmp_path: Path):
    counter = LeftOutCounter(tmp_path)
    trainer = FileTrainer(tmp_path, counter)
    path = write(tmp_path / "12.00/a0/config.json", CONFIG)
    for _ in range(3):
        config = trainer.config("12.00-a0")
    assert config is not None
    assert (config.steps, config.schedule.warmup_steps, config.optimizer.clip_norm) == (600, 60, 0.0)
    assert type(config.steps) is type(config.schedule.warmup_steps) is int
    assert (config.versions, config.layout) == ({"torch": None, "x": "�"}, {})
    (found,) = counter.left_out()
    assert (found.count, found.newest) == (1, "`layout` is text, not an object")
    path.write_text(json.dumps(CONFIG | {"schedule": {"peak_lr": "1e-3"}}))
    assert trainer.config("12.00-a0") is None
    assert counter.left_out()[0].newest == "`schedule.peak_lr` is text, not a number: these settings are not taken"


BEAT: dict[str, Any] = {"node": "n1", "host": "h", "ts": 1.0, "nvml": "ok", "gpus": [{"index": 0, "temperature": 61.0}]}


def beats(tmp_path: Path, *changes: dict[str, Any]) -> list[Any]:
    write(tmp_path / "health/n1.jsonl", *(BEAT | change for change in changes))
    return list(FileAgents(tmp_path).heartbeats())


def test_a_heartbeat_says_unknown_and_never_less_hardware_than_there_is(tmp_path: Path):
    no_gpu = ({"gpus": {}}, {"gpus": [{"index": "0"}]}, {"gpus": [None]}, {"gpus": [{"temperature": 9}]})
    assert not beats(tmp_path / "1", *no_gpu), "a GPU that cannot be told is not a GPU that is gone"
    (beat,) = beats(tmp_path / "2", {"gpus": [{"index": 0.0, "temperature": "hot", "ecc_uncorrected": 3.0}]})
    assert (beat.gpus[0].index, beat.gpus[0].temperature, beat.gpus[0].ecc_uncorrected) == (0, None, 3)
    (beat,) = beats(
        tmp_path / "3", {"machine": {"mounts": {"/a": True, "/b": "yes"}, "carriers": {"e0": 1.0, "e1": {}}}}
    )
    assert (beat.machine.mounts, beat.machine.carriers) == (None, {"e0": 1})
    xid = {"code": 79, "pci": "0000:3b:00", "line": "Xid", "at": 1.0, "drill": None, "mood": 1}
    (beat,) = beats(tmp_path / "4", {"xids": [xid, {"code": "79"}, 5], "orders": "x", "burn_in": {"nodes": 3}})
    assert ([each.code for each in beat.xids], beat.orders, beat.burn_in) == ([79], (0, 0), None)
    assert not beats(tmp_path / "5", {"node": "n2"}), "an agent writes the file of its own node only"


def test_a_long_heartbeat_is_read(tmp_path: Path):
    mounts = {f"/nfs/export-{number:04d}/of/a/long/name": True for number in range(3000)}
    (beat,) = beats(tmp_path, {"machine": {"mounts": mounts}})
    assert beat.machine.mounts == mounts


def test_a_report_that_says_only_in_part_how_a_rank_ended_still_says_that_it_ended(tmp_path: Path):
    counter = LeftOutCounter(tmp_path)
    agents, path = FileAgents(tmp_path, counter), tmp_path / "12.00/a0/nodes/n1.json"
    ranks = [{"rank": 0.0, "code": 1.0, "ended": "now", "tail": 5}, {"rank": 1, "code": "1", "ended": 5}]
    write(path, {"node": "n1", "started": "x", "ranks": [*ranks, {"rank": 2, "code": None, "ended": {}}]})
    (report,) = agents.reports("12.00-a0").values()
    written = pytest.approx(path.stat().st_mtime)
    assert [(x.rank, x.code, x.signal, x.at) for x in report.exits] == [(0, 1, None, written), (1, None, None, 5.0)]
    assert not report.done, "nothing says that rank 2 has ended"
    for bad in (
        {"node": "n1", "ranks": []},
        {"node": "n1", "ranks": {}},
        {"node": 1},
        [],
        {"node": "n2", "ranks": [1]},
    ):
        path.unlink()
        write(path, bad)
        assert not agents.reports("12.00-a0")
    assert counter.left_out()[0].count == 6


def test_stacks_are_read_whatever_else_the_file_holds(tmp_path: Path):
    write(tmp_path / "12.00/a0/stacks/12-i000/n1.json", {"stacks": {"0": "a\ud800", "x": "b", "-1": "c", "1": 5}})
    write(tmp_path / "12.00/a0/stacks/12-i000/n2.json", "[1]")
    os.mkfifo(tmp_path / "12.00/a0/stacks/12-i000/n3.json")
    assert FileAgents(tmp_path).stacks("12.00-a0", "12-i000") == {0: "a�"}


def test_requests_that_cannot_be_moved_or_removed_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counter = LeftOutCounter(tmp_path)
    inbox, good = FileInbox(tmp_path, counter), {"ts": 1.0, "author": "ann", "verb": "note", "arguments": {"x": 1}}
    write(tmp_path / "inbox/good.json", good)
    write(tmp_path / "inbox/bad.json", {"ts": 1.0})
    os.mkfifo(tmp_path / "inbox/pipe.json")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert [each.request for each in inbox.requests()] == ["good"]
    inbox.done("good")
    told = sum(each.count for each in counter.left_out())
    for _ in range(3):
        assert not inbox.requests()
    assert sum(each.count for each in counter.left_out()) == told == 3


def test_requests_of_others_are_refused_and_arguments_out_of_all_bounds_are_said(tmp_path: Path):
    inbox = FileInbox(tmp_path)
    fields = {"ts": 1.0, "author": "ann", "verb": "note", "arguments": {"text": "a\ud800"}}
    write(tmp_path / "inbox/1.json", fields)
    write(tmp_path / "inbox/2.json", fields | {"arguments": {"x": [math.nan]}})
    write(tmp_path / "inbox/3.json", fields).chmod(0o666)
    write(tmp_path / "inbox/4 ü.json", fields)
    said = {each.request: each.unusable for each in inbox.requests()}
    assert said == {
        "1": "`arguments` holds text that is no Unicode",
        "2": "`arguments` holds a number that is not finite, or too large",
    }
    assert sorted(path.name for path in (tmp_path / "inbox").glob("*.refused")) == ["3.refused", "4 ü.refused"]
