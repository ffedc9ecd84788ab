"""Each trainer's lines are recognised as its own, and read as what was printed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from opt_ops.watch_job.given_pattern import pattern_format
from opt_ops.watch_job.line_formats import FORMATS, Reader
from opt_ops.watch_job.log_follower import LineSplitter
from opt_ops.watch_job.reading import Reading, number, stamp, whole
from opt_ops.watch_job.recognition import Labels, Recognition
from tests.watch_job.recordings import WRITERS, recording, updates

DATA = Path(__file__).parent / "data"


def read(reader: Reader, data: bytes, source: int = 0) -> list[Reading]:
    labels, splitter = Labels(source), LineSplitter()
    found: list[Reading] = []
    for segment in [*splitter.feed(data), *splitter.finish()]:
        line = labels.take(segment.text, segment.starts_line)
        found += reader.take(line.text, line.source)
    return found


def recognised(log: str, formats=FORMATS) -> Recognition:
    labels, splitter, recognition = Labels(), LineSplitter(), Recognition(formats)
    for segment in [*splitter.feed(log.encode()), *splitter.finish()]:
        recognition.take(labels.take(segment.text, segment.starts_line))
    return recognition


@pytest.mark.parametrize("name", WRITERS)
def test_lines_are_read_as_they_were_printed(name: str):
    log, wanted = recording(name, last=300), list(updates(300))
    found = recognised(log).found
    assert found is not None
    assert found.format.name == WRITERS[name][0]
    reader = found.format.reader(None)
    readings = [*read(reader, log.encode()), *reader.end()]
    assert [r.step for r in readings] == [u.step for u in wanted]
    digits = 0.006 if name in ("nanotron", "OLMo-core", "transformers 5", "Lightning") else 0.001
    assert all(abs(r.loss - u.loss) <= digits * max(1, u.loss / 5) for r, u in zip(readings, wanted, strict=True))
    for field, tolerance in (("lr", 1e-6), ("gnorm", 6e-3)):
        told = [getattr(r, field) for r in readings]
        if any(value is not None for value in told):
            assert all(abs(v - getattr(u, field)) <= tolerance for v, u in zip(told, wanted, strict=True))
    if any(r.at for r in readings):
        assert all(abs(r.at - u.at) < 1 for r, u in zip(readings, wanted, strict=True))


FIELDS = {
    "transformers 5": {"lr", "gnorm"},
    "transformers 4": {"lr", "gnorm"},
    "Megatron-LM": {"lr", "gnorm", "step_seconds", "at", "steps", "batch"},
    "Megatron-DeepSpeed": {"lr", "gnorm", "step_seconds", "steps", "batch"},
    "torchtitan": {"gnorm", "tokens_per_second", "at"},
    "Lightning": {"step_seconds"},
    "nanoGPT": {"step_seconds"},
    "nanochat": {"step_seconds", "tokens_per_second", "steps"},
    "picotron": {"tokens_per_second", "tokens"},
    "nanotron": {"lr", "gnorm", "step_seconds", "tokens_per_second", "tokens", "at", "steps"},
    "OLMo-core": {"lr", "gnorm", "tokens_per_second", "at", "steps"},
    "metaseq": {"lr", "gnorm", "step_seconds", "tokens_per_second", "at", "batch", "loss_scale"},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_field_of_a_format_is_read(name: str):
    found = recognised(recording(name, last=60)).found
    assert found is not None
    reader = found.format.reader(None)
    readings = [*read(reader, recording(name, last=60).encode()), *reader.end()]
    missing = {field for field in FIELDS[name] if getattr(readings[-1], field) is None}
    assert not missing
    if name == "nanochat":
        assert readings[-1].lr is None, "lrm is a multiplier"


def test_real_lines_of_the_trainer():
    """Recorded from transformers 5.23 on a CPU, logging_steps=5, with evaluations between."""
    steps = list(range(5, 45, 5))
    for parts in (["transformers-5.23.log"], ["transformers-5.23-stdout.log", "transformers-5.23-stderr.log"]):
        reader = next(each for each in FORMATS if each.name == "transformers").reader(None)
        readings = [r for source, part in enumerate(parts) for r in read(reader, (DATA / part).read_bytes(), source)]
        readings += reader.end()
        assert [r.step for r in readings] == steps
        assert readings[0].lr == 0.0009
    counted = next(each for each in FORMATS if each.name == "transformers").reader(5)
    only = [*read(counted, (DATA / "transformers-5.23-stdout.log").read_bytes()), *counted.end()]
    assert [r.step for r in only] == steps


def test_real_lines_of_lightning():
    """Recorded from lightning 2.6.6 on a CPU: two epochs of 40 batches, the bar drawn each fifth."""
    reader = next(each for each in FORMATS if each.name == "Lightning").reader(None)
    data = (DATA / "lightning-2.6.6.log").read_bytes()
    readings = [*read(reader, data), *reader.end()]
    assert [r.step for r in readings] == list(range(5, 85, 5))
    assert all(0.5 < r.loss < 3 for r in readings)
    assert recognised(data.decode()).found.format.name == "Lightning"


@pytest.mark.parametrize(
    "line",
    [
        "{'eval_loss': '1.089', 'eval_runtime': '0.0084', 'epoch': '1.25'}",
        "{'train_runtime': '0.1705', 'train_loss': '1.458', 'epoch': '2.5'}",
        "step 250: train loss 3.3012, val loss 3.3511",
        "validation loss at iteration 1000 | lm loss value: 3.1E+00 | lm loss PPL: 2.2E+01 |",
        '2026-08-30 03:14:07 | INFO | valid | {"epoch": 1, "valid_loss": "4.9", "num_updates": "120"}',
        "Validation DataLoader 0:  12%|█▏        | 120/1000 [00:30<03:40,  4.00it/s, val_loss=3.410]",
        "Step 00250 | Validation bpb: 0.8123",
        "12%|█▏        | 120/1000 [00:30<03:40,  4.00it/s]",
        "NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
    ],
)
def test_what_is_no_training_line(line: str):
    assert not [each.name for each in FORMATS if each.is_training_line(line)]


def test_a_line_without_a_loss_is_megatrons_word_for_nan():
    log = recording("Megatron-LM", last=3, nan=3)
    reader = next(each for each in FORMATS if each.name == "Megatron-LM").reader(None)
    assert [(r.loss_missing, r.nan_updates) for r in read(reader, log.encode())] == [(False, 0), (False, 0), (True, 1)]


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"Megatron-LM", "Megatron-DeepSpeed"}))
def test_a_loss_that_is_not_finite_is_read(name: str):
    log = recording(name, last=40, nan=30)
    found = recognised(log).found
    reader = found.format.reader(None)
    readings = [*read(reader, log.encode()), *reader.end()]
    assert [math.isnan(r.loss) for r in readings] == [r.step >= 30 for r in readings]


def test_labels_are_stripped_and_one_rank_is_taken():
    quiet = [f"1: [titan] rank 1 has nothing to say of update {u.step}" for u in updates(50)]
    loud = [f"3: {line}" for line in recording("nanoGPT", last=50).splitlines()]
    mixed = "\n".join(line for pair in zip(quiet, loud[-50:], strict=True) for line in pair)
    found = recognised(mixed).found
    assert (found.format.name, found.rank, found.lines) == ("nanoGPT", 3, 50)
    both = "\n".join(f"[rank{rank}]:{line[3:]}" for line in loud[-50:] for rank in (1, 0))
    assert recognised(both).found.rank == 0, "of two that tell the same the lower one"


def test_a_pattern_with_named_groups():
    pattern = re.compile(r"upd=(?P<step>\d+) nll=(?P<loss>\S+) eta=(?P<lr>\S+) dt=(?P<step_seconds>\S+)")
    (only,) = [pattern_format(pattern)]
    reader = only.reader(None)
    (found,) = reader.take("upd=120 nll=3.41 eta=1e-4 dt=0.5")
    assert (found.step, found.loss, found.lr, found.step_seconds) == (120, 3.41, 1e-4, 0.5)
    counted = pattern_format(re.compile(r"nll=(?P<loss>\S+)")).reader(10)
    assert [r.step for line in ("nll=3", "nll=2") for r in counted.take(line)] == [10, 20]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3.412", 3.412), ("1,234", 1234), ("98.21K", 98210), ("1.05M", 1.05e6), ("6.0E-04", 6e-4), ("'0.5'", 0.5)],
)
def test_numbers(text: str, value: float):
    assert number(text) == pytest.approx(value)


def test_numbers_that_are_none():
    assert math.isnan(number("nan"))
    assert number("-inf") == -math.inf
    assert [number(text) for text in ("", "abc", "1.2.3x", None)] == [None] * 4
    assert whole("9" * 30) is None
    assert number("9" * 400) is not None
    assert stamp("[9999-99-99 99:99:99] x") is None


def test_lines_that_look_like_training_are_remembered():
    log = "\n".join(f"hello {n}" for n in range(50)) + "\nupd 7 nll 3.41 lr 0.1\nepoch 3 objective 2.5\n"
    recognition = recognised(log)
    assert recognition.found is None
    assert recognition.liked[0] == "upd 7 nll 3.41 lr 0.1"
    assert len(recognition.liked) == 3
