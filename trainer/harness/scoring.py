"""Scores tasks by lm-evaluation-harness, each into a file of its own."""

import difflib
import glob
import gzip
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from opt_ops.contract.files import write_durably
from trainer.console import print_line
from trainer.errors import UserError
from trainer.harness.loading import Loaded

_DRAWS = 1000  # of the bootstrap, for metrics whose standard error has no formula
_CPU_BATCH = 4  # the logits of a batch are this × positions × vocabulary numbers
_ROLLING = "loglikelihood_rolling"


class Tasks:
    """The tasks of one call. They are known by name before the model is loaded.

    Raises:
        UserError: there is no such task.
    """

    def __init__(self, names: Sequence[str]) -> None:
        groups = {_folder(name) for name in names if not _is_file(name) or _is_group(Path(name))}
        if groups:
            print_line("reading the harness's list of tasks", sys.stderr)  # 14,000 files
        # In one list for all, a task of one's own would take the place of the harness's or of another folder's.
        self._managers = {
            folder: TaskManager(include_path=folder, include_defaults=folder in groups)
            for folder in dict.fromkeys(map(_folder, names))
        }
        for name in names:
            if not _is_file(name) and name not in (known := self.manager(name).all_tasks):
                near = ", ".join(difflib.get_close_matches(name, known, 3))
                raise UserError(f"there is no task {name}{near and f'; near: {near}'}")

    def manager(self, name: str) -> TaskManager:
        """The harness's list in which a task is found."""
        return self._managers[_folder(name)]

    def named(self, name: str) -> str:
        """The harness's name of a task. By its path the harness does not load a group."""
        index = self.manager(name).task_index.items()
        return next((key for key, entry in index if entry.yaml_path == Path(name)), name) if _is_file(name) else name

    def title(self, name: str) -> str:
        """A name for people."""
        return Path(name).stem if _is_file(name) else name

    def scorer(self, loaded: Loaded) -> "Scorer":
        """What scores them with a model."""
        return Scorer(self, loaded)


class _Model(HFLM):
    """The harness's model, which puts exactly one ``</s>`` in front of each text, as in training.

    For rolling log-likelihoods the harness itself puts it there. The tokenizer would put a second one behind it, which
    would be scored as a token of the text: with a small model, 2.2 bits per byte instead of 2.0.
    """

    def loglikelihood_rolling(self, *arguments: Any, **named: Any) -> list[float]:
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(*arguments, **named)
        finally:
            self.add_bos_token = True


class Scorer:
    """Scores tasks with one model."""

    def __init__(self, tasks: Tasks, loaded: Loaded) -> None:
        self._tasks = tasks
        on_cpu = loaded.model.device.type == "cpu"
        make: Any = _Model  # its decorators hide the signatures of the harness's functions
        self._model = make(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=_CPU_BATCH if on_cpu else "auto",
            softmax_dtype="float64",  # a sum over thousands of tokens in fp32 is off by more than 1e-4
        )
        self._model.add_bos_token = True

    def write(
        self,
        name: str,
        target: Path,
        documents: Path | None,
        shots: int,
        limit: int | None,
        about: Mapping[str, Any],
    ) -> None:
        """Score one task, group or YAML file, and write the result, the answers beside it, and the documents.

        Args:
            name: The harness's name, or a YAML file.
            target: The result file: what the harness returns, and under `opt_ops` what is said about its origin.
            documents: Folder for the documents of each task; None: they are not written.
            shots: Examples in front of each question.
            limit: Only the first documents; None: all.
            about: Where the model is from, as the file shall say it.

        Raises:
            Exception: whatever the task raises, for example because its data is not on this machine.
        """
        manager = self._tasks.manager(name)
        built: Any = manager.load([self._tasks.named(name)])
        if documents is not None:
            for task_name, task in built["tasks"].items():
                keep_documents(documents, task_name, about.get("definition"), _texts(task))
        below = {group.name for each in built["groups"].values() for group in each.get_all_groups()}
        tops = [group for group in built["groups"].values() if group.name not in below]
        evaluate: Any = simple_evaluate
        results: dict[str, Any] = evaluate(
            model=self._model,
            tasks=tops or list(built["tasks"].values()),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=_DRAWS,
            task_manager=manager,
        )
        answers = results.pop("samples")
        origin = {
            **about,
            "shots": shots,
            "limit": limit,
            "harness": f"lm-eval {version('lm-eval')}",
            "bos": {key: task.OUTPUT_TYPE != _ROLLING for key, task in built["tasks"].items()},
        }
        _write_answers(target.with_name(f"{target.name.removesuffix('.json')}.answers.jsonl.gz"), answers)
        text = json.dumps(_finite({**results, "opt_ops": origin}), default=handle_non_serializable, ensure_ascii=False)
        write_durably_in(target, text + "\n")


def file_name(task: str) -> str:
    """A task's name as that of a file."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in task).lstrip(".") or "_"


def keep_documents(folder: Path, task: str, definition: str | None, texts: str) -> None:
    """Write the documents of a task, unless they are there. A file of other documents under its name stays.

    Args:
        folder: Of the documents of all tasks.
        task: Its name, which others may have as well: a task of one's own and the harness's, or of two folders.
        definition: Of a task of one's own.
        texts: The lines.
    """
    stem = file_name(task)
    first = folder / f"{stem}.jsonl"
    there = [first, *folder.glob(f"{glob.escape(stem)}+*.jsonl")]
    if not any(path.is_file() and path.read_bytes() == texts.encode() for path in there):
        owner = definition or f"lm-eval-{version('lm-eval')}"
        other = folder / f"{stem}+{owner}.jsonl"
        write_durably_in(other if first.exists() else first, texts)


def write_durably_in(path: Path, text: str) -> None:
    """Write a file, and create its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text)


def _texts(task: Any) -> str:
    """The documents of a task as lines that ``trainer.data.dedup --against`` reads: each with all its strings."""
    lines = ({"id": number, "text": "\n".join(_strings(each))} for number, each in enumerate(task.eval_docs))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines if line["text"].strip())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _strings(each)


def _write_answers(path: Path, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """For each document what the model answered and how it was scored. The document itself is in another file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a process that was killed, as on a spare
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file, gzip.open(file, "wt", encoding="utf-8") as packed:
        for task, samples in answers.items():
            for sample in samples:
                line = {
                    "task": task,
                    "doc": sample["doc_id"],
                    "filter": sample["filter"],
                    "target": sample["target"],
                    "answers": sample["filtered_resps"],
                    "metrics": {metric: sample[metric] for metric in sample["metrics"]},
                }
                packed.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")
        packed.close()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _finite(value: Any) -> Any:
    """The value with texts in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _is_file(name: str) -> bool:
    return name.endswith(".yaml")


def _folder(name: str) -> str | None:
    """Of a task of one's own; None: the task is the harness's."""
    return str(Path(name).parent) if _is_file(name) else None


def _is_group(path: Path) -> bool:
    return any(line.startswith("group:") for line in path.read_text(encoding="utf-8").splitlines())
