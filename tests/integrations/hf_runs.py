"""Supervised trainings of a tiny model by Hugging Face's Trainer, in the process of the test."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import opt_ops.integrations.transformers as hf
from opt_ops.contract import UserError, leaving, parse


class Left(Exception):
    """The process would have ended, because of `error`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


class FakeSignals:
    """Signals of a process that is not the test's."""

    def __init__(self) -> None:
        self.save_requested = threading.Event()
        self.installed = 0

    def install(self) -> None:
        self.installed += 1

    def leave_sigterm_to_supervisor(self) -> None:
        pass

    def dump_stacks_to(self, path: Path) -> None:
        pass


class Data(torch.utils.data.Dataset):
    """Samples with their own number; remembers which were read."""

    def __init__(self, samples: int = 64) -> None:
        self.read: list[int] = []
        noise = torch.Generator().manual_seed(1)
        self._x = torch.randn(samples, 4, generator=noise)
        self._y = self._x.sum(1, keepdim=True) + 0.1 * torch.randn(samples, 1, generator=noise)

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {"x": self._x[index], "labels": self._y[index]}


class Model(torch.nn.Module):
    """Draws random numbers in each update: a resume that does not restore their state has other losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.nn.functional.mse_loss(self.layers(x), labels)}


class Run:
    """One attempt. `lines`: its telemetry, by step; `used`: what the optimizer had in each update that it applied."""

    def __init__(self, folder: Path, trainer: Trainer, signals: FakeSignals) -> None:
        self.folder, self.trainer, self.signals = folder, trainer, signals
        self.used: list[dict[str, Any]] = []

    @property
    def lines(self) -> dict[int, dict[str, Any]]:
        lines = map(json.loads, (self.folder / "telemetry.jsonl").read_text().splitlines())
        return {line["num_updates"]: line for line in lines}

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def compared(self, first: int = 1) -> list[tuple[Any, ...]]:
        fields = ("num_updates", "loss", "gnorm", "lr", "data_position", "tokens")
        return [tuple(line[name] for name in fields) for step, line in self.lines.items() if step >= first]


class Room:
    """A folder for the attempts of one run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.checkpoints = folder / "checkpoints"

    def step(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-????????") if path.is_dir())

    def options(self, name: str, *others: str, steps: int = 20) -> list[str]:
        return [
            *("--run-dir", str(self.folder / name), "--checkpoint-dir", str(self.checkpoints)),
            *("--set", f"steps={steps}", *others),
        ]

    def arguments(self, **others: Any) -> TrainingArguments:
        mine = {"output_dir": str(self.folder / "out"), "use_cpu": True, "report_to": [], "disable_tqdm": True}
        usual = {"per_device_train_batch_size": 4, "learning_rate": 0.01, "warmup_steps": 4, "weight_decay": 0.1}
        return TrainingArguments(**{**mine, **usual, **others})

    def trainer(self, data: Any = None, **arguments: Any) -> Trainer:
        held_out = Data(8) if arguments.get("eval_strategy") else None
        return Trainer(
            model=Model(), args=self.arguments(**arguments), train_dataset=data or Data(), eval_dataset=held_out
        )

    def train(
        self,
        name: str,
        *options: str,
        steps: int = 20,
        trainer: Trainer | None = None,
        each_step: Callable[[Run, int], None] = lambda run, step: None,
        **arguments: Any,
    ) -> Run:
        """`each_step`: called at the beginning of each update with its number."""
        signals = FakeSignals()
        self._monkeypatch.setattr(hf, "_options", parse(self.options(name, *options, steps=steps)))
        self._monkeypatch.setattr(hf, "_signals", signals)
        trainer = trainer or self.trainer(**arguments)
        run = Run(self.folder / name, trainer, signals)

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
                def look(inner: Any, *_: Any) -> None:
                    names = ("lr", "betas", "weight_decay")
                    run.used.append({key: [group.get(key) for group in inner.param_groups] for key in names})

                getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(look)

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                each_step(run, state.global_step + 1)

        trainer.add_callback(Watch)
        hf.supervise(trainer)
        trainer.train()
        return run

    @contextmanager
    def leaves(self, kind: type[BaseException], words: str = "") -> Iterator[None]:
        with pytest.raises(Left, match=words or None) as caught:
            yield
        assert isinstance(caught.value.error, kind), caught.value.error


def make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Room:
    def leave(error: BaseException) -> None:
        raise Left(error) from error

    monkeypatch.setattr(leaving, "leave", leave)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what is durable is tested elsewhere; here it is slow
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return Room(tmp_path, monkeypatch)


__all__ = ["Data", "FakeSignals", "Left", "Model", "Room", "Run", "UserError", "hf", "make_room"]
