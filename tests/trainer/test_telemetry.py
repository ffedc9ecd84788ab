import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

from opt_ops.contract.environment import Place
from opt_ops.contract.outside import Agreed
from opt_ops.contract.phases import PhaseFile
from opt_ops.contract.telemetry import TelemetryLine
from trainer import optim, recipes, telemetry
from trainer.parallel import mesh
from trainer.step.measured import Progress, StepMeasurements, StepOutcome
from trainer.telemetry import StepOverheads, Telemetry


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("Tesla T4", None)],
)
def test_the_peak_is_known_or_it_is_not(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert telemetry._peak_tflops(torch.device("cuda", 0)) == peak
    assert telemetry._peak_tflops(torch.device("cpu")) is None


def lines_of_hard_numbers(path: Path) -> list[bytes]:
    """What reaches the file, write by write."""
    layout = mesh.start(Place(0, 1, 0), 1, 1)
    recorder = Telemetry(path, recipes.build("opt-tiny"), layout, process_start=time.monotonic())
    optimizer = optim.build(torch.nn.Linear(2, 2).parameters(), recipes.build("opt-tiny").optim)
    writes: list[bytes] = []
    system_write = os.write

    def write(fd: int, content: bytes) -> int:
        writes.append(content)
        return system_write(fd, content)

    os.write = write
    try:
        for step, measured in enumerate(
            (
                StepMeasurements(loss=800.0, activation_norm=1.0, gnorm=0.5),
                StepMeasurements(loss=math.inf, activation_norm=1.0, gnorm=0.5),
                StepMeasurements(loss=1.0, activation_norm=math.nan, gnorm=math.nan),
                StepMeasurements(loss=1.0, activation_norm=1.0, gnorm=math.inf, loss_scale=4.0),
            ),
            start=1,
        ):
            outcome = StepOutcome(measured=measured, agreed=Agreed(), progress=Progress(step=1))
            recorder.record(step, outcome, optimizer, StepOverheads(), None, {})
    finally:
        os.write = system_write
    return writes


def test_a_line_is_one_write_of_strict_json(ranks, tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    (writes,) = ranks(1, lines_of_hard_numbers, path)
    assert b"".join(writes) == path.read_bytes()
    assert all(write.endswith(b"\n") and write.count(b"\n") == 1 for write in writes)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(writes[0]).keys() == TelemetryLine.__annotations__.keys()
    huge, infinite, nan, overflow = (json.loads(write, parse_constant=refuse) for write in writes)
    assert (huge["loss"], huge["ppl"], huge["finite"]) == (800.0, None, True)
    assert (infinite["loss"], infinite["finite"]) == (None, False)
    assert (nan["gnorm"], nan["actv_norm"], nan["clip"], nan["finite"]) == (None, None, 0, False)
    assert (overflow["gnorm"], overflow["loss_scale"], overflow["finite"]) == (None, 4.0, True), "fp16 goes on"


def test_a_phase_is_told_once_unless_it_gets_on(tmp_path: Path) -> None:
    phases = PhaseFile(tmp_path / "phases.jsonl")
    phases.enter("start", None)
    for _ in range(2):
        phases.enter("tokens", None, again=True)
    for _ in range(2):
        phases.enter("start", None)
    told = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in told] == ["start", "tokens", "tokens", "start"]
    assert told == sorted(told, key=lambda line: line["ts"])
