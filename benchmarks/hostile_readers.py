"""Hostile input for readers that a supervisor with a simulated cluster does not use.

These are the kernel log, the output of the process that reads NVML, Slurm's text, and the journal. A reader may leave
input out, or say with an error of its own that there is no answer. Any other exception would end the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from unittest import mock

from benchmarks.mutations import break_bytes, mutate
from opt_ops.adapters.slurm import answers
from opt_ops.adapters.slurm.answers import OurJob, state_of
from opt_ops.core.state.fold import replay
from opt_ops.errors import SchedulerUnavailable
from opt_ops.node.kernel_log import parse_xid
from opt_ops.node.line_process import parsed
from opt_ops.node.reading import reading_of
from opt_ops.runfolder.journal_reader import JournalError, read

_KERNEL = (
    "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    "NVRM: Xid (PCI:0000:3b:00 GPU-I:01): 95, pid=1, name=x, Uncontained",
    "nvidia-nvswitch1: SXid (PCI:0000:07:00.0): 20034, Fatal, Link 30 LTSSM Fault Up",
    "NVRM: The NVIDIA GPU 0000:18:00.0\\x0aNVRM: fallen off the bus and is not responding to commands.",
)
_SQUEUE = "4242|RUNNING|n[1-3]|2026-11-29T18:00:00|2026-11-29T12:00:00|opt-ops-1-n0|None"
_SACCT = "COMPLETED|n[1-3]|None|2026-11-29T12:00:00|opt-ops-1-n0"
_SINFO = "n1|idle|none"
_READING = {
    "nvml": "ok",
    "driver": "570.86.15",
    "gpus": [{"index": 0, "uuid": "GPU-1", "pci": "0000:3b:00", "ecc_uncorrected": 0, "power_watts": 300.5}],
    "xids": [{"code": 79, "pci": "0000:3b:00", "line": "Xid 79", "at": 1.0}],
}


def attack_readers(number: int, random: Random, journals: list[Path]) -> Iterator[tuple[str, Exception | None]]:
    """Yield (format, error) of each of `number` mutations; the error is None where the reader held."""
    readers: dict[str, Callable[[Random], None]] = {
        "kernel log": _kernel_log,
        "NVML output": _nvml_output,
        "Slurm's text": _slurm_text,
    }
    if journals:
        readers["journal"] = lambda random: _journal(random, random.choice(journals))
    for _ in range(number):
        name = random.choice(list(readers))
        try:
            readers[name](random)
        except Exception as error:  # noqa: BLE001 - whatever it is, it would end the reading process
            yield name, error
        else:
            yield name, None


def _kernel_log(random: Random) -> None:
    parse_xid(break_bytes(random.choice(_KERNEL).encode(), random).decode(errors="replace"))


def _nvml_output(random: Random) -> None:
    broken = random.random() < 0.3
    text = json.dumps(_READING).encode()
    parsed(break_bytes(text, random) if broken else mutate(_READING, random, lies=True).encode(), reading_of)


def _slurm_text(random: Random) -> None:
    def answer(*command: str, may_fail: str = "") -> list[str]:
        good = {"squeue": _SQUEUE, "sacct": _SACCT, "sinfo": _SINFO, "scontrol": "n1"}[command[0]]
        if random.random() < 0.3:
            raise SchedulerUnavailable(f"{command[0]}: {random.choice(('Invalid job id', 'timed out'))}")
        lines = [_spoiled(good, random) for _ in range(random.randrange(4))]
        return lines if random.random() < 0.9 else [good, *lines]

    with mock.patch.object(answers, "ask", answer), suppress(SchedulerUnavailable):  # no answer, and said so
        state_of(OurJob(number="4242", name="opt-ops-1-n0", since=random.choice((0.0, 1e9))), {})


def _spoiled(line: str, random: Random) -> str:
    fields = line.split("|")
    words = ("", "???", "RUNNING+FAIL", "SUSPENDED", "\x1b[2J", "n[1-", "9999-99-99T99:99:99", "1e999", "x" * 100_000)
    fields[random.randrange(len(fields))] = random.choice(words)
    if random.random() < 0.2:
        return break_bytes(line.encode(), random)[:10_000].decode(errors="replace")
    return "|".join(fields)


def _journal(random: Random, folder: Path) -> None:
    """Spoil one line or file of a journal. It is read to another state only if the damage is at its end."""
    path = random.choice(sorted(folder.glob("*.jsonl")))
    good = path.read_bytes()
    lines = good.split(b"\n")
    if len(lines) < 3:
        return
    at = random.randrange(len(lines) - 2)  # the last line may be torn by a crash, and is then left out
    kind = random.randrange(4)
    if kind == 0:
        lines[at] = break_bytes(lines[at], random)
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        del lines[at]
    else:
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    path.write_bytes(b"\n".join(lines))
    try:
        entries, _ = read(folder)
        replay(entries)
    except JournalError:
        return  # refused, with file and line
    finally:
        path.write_bytes(good)
    if b"\n".join(lines) != good:
        raise AssertionError(f"{path.name}: a journal with a spoiled line {at + 1} was read without an error")
