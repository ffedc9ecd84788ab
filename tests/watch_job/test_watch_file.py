"""`opt-ops run watch-job --from-file`: a log alone, read to its end."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from opt_ops.core.values import Driver
from opt_ops.runfolder import lineages
from tests.watch_job.recordings import WRITERS, recording
from tests.watch_job.watched import Ran, telemetry, watch

LOSS = {"loss_drift", "loss_spike"}


def watched(folder: Path, log: str | bytes, *arguments: str) -> Ran:
    (folder / "train.log").write_bytes(log.encode() if isinstance(log, str) else log)
    return watch("--from-file", "train.log", *arguments)


@pytest.mark.parametrize("name", WRITERS)
def test_a_divergence_is_found_in_every_format(folder: Path, name: str):
    ran = watched(folder, recording(name, last=520, diverges=400))
    assert ran.code == 5
    assert LOSS.intersection(ran.kinds), ran.findings
    first = next(each for each in ran.findings if each["kind"] in LOSS)
    assert 400 < first["step"] < 480
    assert {"ts", "kind", "severity", "step", "text"} <= set(first)
    assert WRITERS[name][0] in ran.stderr
    assert len(telemetry(ran)) == 520


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_found_in_a_healthy_log(folder: Path, name: str):
    ran = watched(folder, recording(name, last=400))
    assert (ran.code, ran.findings) == (0, [])
    lines = telemetry(ran)
    assert [line["num_updates"] for line in lines] == list(range(1, 401))
    assert abs(lines[-1]["loss"] - 3) < 0.2, "bits become nats"


@pytest.mark.parametrize("name", ["Megatron-LM", "transformers 4", "nanoGPT", "OLMo-core", "metaseq"])
def test_a_loss_that_is_not_a_number_is_found(folder: Path, name: str):
    ran = watched(folder, recording(name, last=210, nan=200))
    assert ran.kinds == ["non_finite_loss"]
    assert ran.findings[0]["step"] == 200
    assert telemetry(ran)[-1]["loss"] is None


def test_iterations_that_megatron_skips_are_found(folder: Path):
    log = recording("Megatron-LM", last=200).replace("iterations:   0 |", "iterations:   2 |")
    skipped = log.replace("nan iterations:   2", "nan iterations:   0")
    ran = watched(folder, skipped)
    assert ran.code == 5
    assert "skipped 2 iterations" in ran.findings[0]["text"]
    assert len(ran.findings) == 1, "told once, not on every line"


def test_a_restart_is_a_new_attempt_and_no_fall_of_the_loss(folder: Path):
    log = recording("nanoGPT", last=200) + recording("nanoGPT", first=151, last=300)
    ran = watched(folder, log)
    assert (ran.code, ran.findings) == (0, [])
    state = lineages.state(ran.lineage)
    assert [(a.first_step, a.last_step) for a in state.attempts.values()] == [(1, 200), (151, 300)]
    assert "began again at step 151" in ran.stderr


def test_ranks_that_tell_the_same_steps_are_no_restarts(folder: Path):
    lines = recording("nanoGPT", last=200).splitlines(keepends=True)
    twice = "".join(line for pair in zip(lines, lines, strict=True) for line in pair)
    ran = watched(folder, twice)
    assert len(lineages.state(ran.lineage).attempts) == 1
    assert len(telemetry(ran)) == 200


def test_a_log_that_no_format_reads(folder: Path):
    log = "".join(f"upd {n} :: nll {3.4 - n / 1000:.4f}\n" for n in range(300))
    ran = watched(folder, log)
    assert ran.code == 75
    assert "transformers, Megatron-LM, torchtitan" in ran.error
    assert "upd 0 :: nll 3.4000" in ran.error
    assert lineages.state(ran.lineage).failing, "the journal says that nothing was seen"
    ran = watched(folder, log, "--pattern", r"upd (?P<step>\d+) :: nll (?P<loss>\S+)")
    assert ran.code == 0
    assert len(telemetry(ran)) == 300


@pytest.mark.parametrize("content", [b"", b"\n\n", os.urandom(200_000), b"\0" * 300_000, b"x" * 3_000_000])
def test_what_is_no_log_at_all(folder: Path, content: bytes):
    assert watched(folder, content).code == 75


def test_a_log_with_anything_between_its_lines(folder: Path):
    noise = random.Random(3)
    lines = recording("nanoGPT", last=300, diverges=200).encode().splitlines(keepends=True)
    junk = [
        b"x" * 200_000 + b"\n",
        b"\x1b[2J\x1b]0;evil\x07\xff\xfe\0\n",
        b'{"a": ' * 5000 + b"\n",
        b"\r\r\n",
        b"iter 9",
    ]
    mixed = b"".join(part for line in lines for part in (noise.choice(junk) if noise.random() < 0.3 else b"\n", line))
    ran = watched(folder, mixed.replace(b"iter 9iter", b"iter 9\niter"))
    assert ran.code == 5
    assert len(telemetry(ran)) == 300
    assert all(text.isprintable() for each in ran.findings for text in (each["text"],))


def test_an_error_at_the_end_of_the_log(folder: Path):
    words = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB\n"
    ran = watched(folder, recording("nanoGPT", last=100) + words)
    assert ran.kinds == ["out_of_memory"]
    assert "CUDA out of memory" in ran.findings[0]["text"]
    survived = recording("nanoGPT", last=100) + words + recording("nanoGPT", first=101, last=200)
    assert watched(folder, survived).code == 0, "training went on after it"


def test_what_the_lineage_says_of_itself(folder: Path):
    from typer.testing import CliRunner

    from opt_ops.cli import build

    ran = watched(folder, recording("Megatron-LM", last=520, diverges=400))
    state = lineages.state(ran.lineage)
    assert state.driver is Driver.SHADOW
    assert all(i.decision.advice for i in state.incidents.values())
    said = {
        words: CliRunner().invoke(build(*words.split()[:2]), [*words.split(), ran.lineage.name]).stdout
        for words in ("run show", "run explain", "logbook render")
    }
    assert "only watched (shadow)" in said["run show"]
    assert "only watched (shadow)" in said["run explain"]
    assert "at or before step" in said["run explain"]
    book = (ran.lineage / "chronicle/logbook.md").read_text()
    assert "Only watched (shadow mode)" in book
    assert "Goodput" not in book
    assert "only watched (shadow)" in CliRunner().invoke(build("run", "list"), ["run", "list"]).stdout
    report = json.loads((ran.lineage / "chronicle/report.json").read_text())
    assert report["driver"] == "shadow"


def test_nothing_is_written_but_the_lineage(folder: Path):
    (folder / "there").mkdir()
    ran = watched(folder, recording("nanoGPT", last=50))
    assert ran.code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["runs", "there", "train.log"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("812", "--from-file", "x"), 2),
        (("--from-file", "not-there"), 3),
        (("8;rm -rf",), 2),
        (("--from-file", ".", "--pattern", "("), 2),
        (("--from-file", ".", "--pattern", "(?P<step>x)"), 2),
        (("812", "--follow"), 2),
    ],
)
def test_wrong_use(folder: Path, arguments: tuple[str, ...], code: int):
    ran = watch(*arguments)
    assert ran.code == code
    assert not (folder / "runs").exists()
