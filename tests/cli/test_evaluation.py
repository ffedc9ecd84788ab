"""What `ckpt evaluate` does around the harness: names of tasks, folders of results, conversions that stay."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from opt_ops.cli.ckpt import evaluate as ckpt_evaluate
from opt_ops.cli.ckpt import evaluation_answers, evaluation_results, evaluation_samples, harness
from opt_ops.cli.ckpt.checkpoints import Named
from opt_ops.cli.ckpt.evaluation_tasks import GROUPS, wanted
from opt_ops.cli.shared.options import Lineage
from opt_ops.config import Config, load
from opt_ops.contract.manifest import MARKER
from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled
from opt_ops.core.state.model import State
from opt_ops.core.values import Checkpoint, Shape
from opt_ops.errors import NotFound, OptOpsError, Unavailable, UsageError
from opt_ops.ports import Request
from opt_ops.runfolder import lineages
from opt_ops.runfolder.inbox import FileInbox
from opt_ops.supervise.operator_requests import event_of
from tests.fake_nvml.build import FakeDriver

SMALL = ("hellaswag", "storycloze", "piqa", "arc", "openbookqa", "winogrande", "wsc273", "crows_pairs", "toxigen")
SHAPE = Shape(nodes=1, spares=0, ranks_per_node=1)


def test_the_named_groups_are_tasks_of_the_harness():
    assert len(GROUPS["opt-16"]) == len(set(GROUPS["opt-16"])) == 16
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    tasks = Path(spec.origin).parent / "tasks"
    folders = (*SMALL, "super_glue", "glue")
    texts = (file.read_text() for folder in folders for file in (tasks / folder).rglob("*.yaml"))
    known = {name for text in texts for name in re.findall(r'^task: "?([\w-]+)', text, re.MULTILINE)}
    assert {name for names in GROUPS.values() for name in names} <= known


def test_a_folder_of_tasks_is_identified_by_its_files(tmp_path: Path):
    for name, text in (("a.yaml", "task: a\n"), ("b.yaml", "include: _x\ntask: b\n"), ("_x.yaml", "doc_to_text: ''\n")):
        (tmp_path / name).write_text(text)
    first = wanted([str(tmp_path)], 0, None)
    assert [(each.name, each.stem) for each in first] == [("a", "a.0-shot"), ("b", "b.0-shot")]
    assert [each.version("1.0") for each in first] == [f"1.0+{first[0].definition}"] * 2
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert wanted([str(tmp_path)], 0, None)[0].definition != first[0].definition
    (limited,) = wanted(["piqa"], 5, 100)
    assert (limited.stem, limited.version(1.0)) == ("piqa.5-shot.first-100", "1.0 first 100")
    stems = [each.stem for each in wanted(["a_b", "a+b", "a:b", "x" * 250], 0, None)]
    assert len(set(stems)) == 4, "each has a file of its own"
    assert max(map(len, stems)) < 200
    with pytest.raises(NotFound, match="is no folder"):
        wanted(["./none"], 0, None)
    for name in ("a|b", "a.yaml"):
        with pytest.raises(UsageError, match="neither"):
            wanted([name], 0, None)


def test_tasks_of_one_name_in_two_folders_are_scored_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = _named(tmp_path / "12", "12.00", "a", counts=True)

    def run(_: str, work: harness.Work, __: object) -> None:
        for number, (task, file) in enumerate(work.tasks.items(), start=1):
            origin = {"digest": chosen.digest, "definition": task.definition, "harness": "lm-eval 1", "bos": {}}
            about: dict[str, object] = {"n-samples": {}, "n-shot": {}, "versions": {}, "opt_ops": origin}
            file.write_text(json.dumps({**about, "results": {"x": {"acc,none": number / 10}}}))

    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(ckpt_evaluate, "converted", lambda *_: tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.yaml").write_text(f"task: x\n# {name}\n")
    tasks = wanted([str(tmp_path / name) for name in "ab"], 0, None)
    wishes = ckpt_evaluate.Wishes(tasks=(), shots=None, limit=None, prompts=None, tokens=None, again=False, quiet=True)
    monkeypatch.setattr(evaluation_answers, "post", lambda *_, **__: None)
    folder = evaluation_results.folder_of(chosen)
    for ran in (True, False):
        found = ckpt_evaluate._evaluated(chosen, folder, Config(runs=tmp_path), "lm-eval 1", tasks, None, wishes)
        assert sorted(item["value"] for item in found.items) == [0.1, 0.2]
        assert all(item["ran"] is ran for item in found.items)


def test_a_folder_may_hold_what_is_no_utf_8(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"# M\xfcller\ntask: a\n")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.txt")).write_text("x")
    assert [each.name for each in wanted([str(tmp_path)], 0, None)] == ["a"]


@pytest.mark.parametrize("change", [{"value": 10**400}, {"sample_len": 1e999}, None, []])
def test_a_result_file_of_another_form_is_named(tmp_path: Path, change: dict[str, object] | list[object] | None):
    chosen = _named(tmp_path, "12.00", "a", counts=True)
    origin = {"digest": chosen.digest, "definition": "", "harness": "lm-eval 1", "bos": {}, "tokens": 60, "seed": 1}
    row = {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 3}
    if isinstance(change, dict):
        row |= {"acc,none" if "value" in change else "sample_len": next(iter(change.values()))}  # type: ignore[dict-item]
    whole = {"opt_ops": origin, "results": {"piqa": row}, "n-samples": {}, "n-shot": {}, "versions": {}}
    (tmp_path / "piqa.0-shot.json").write_text(json.dumps(whole if change else change))
    (task,) = wanted(["piqa"], 0, None)
    with pytest.raises(OptOpsError, match=r"piqa\.0-shot\.json is no result file"):
        evaluation_results.find(chosen, tmp_path, State(), task, "lm-eval 1")
    (tmp_path / "prompts").write_text("Once\n")
    prompts = evaluation_samples.read(tmp_path / "prompts", 60)
    (tmp_path / "samples.60-tokens.json").write_text(json.dumps(whole if change else change))
    with pytest.raises(OptOpsError, match=r"samples\.60-tokens\.json is no result file"):
        evaluation_samples.find(chosen, tmp_path, State(), prompts)


def test_the_perplexity_of_a_model_that_has_diverged_is_taken():
    arguments = {"run": "12.00", "step": 1, "digest": "a" * 64, "task": "t", "metric": "perplexity", "value": 4e17}
    arguments |= {"n": 1, "shots": 0, "harness": "lm-eval 1", "task_version": "1", "file": "f", "sha256": "b" * 64}
    request = Request(request="r", author="ann", verb="evaluated", arguments=arguments)
    event = event_of(State(runs={"12.00": None}), request)  # pyright: ignore[reportArgumentType]
    assert isinstance(event, CheckpointEvaluated), event


def _named(lineage: Path, run: str, digest: str, *, counts: bool) -> Named:
    path = lineage / run / "checkpoints" / "step-00061000"
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).write_text(f"{digest * 64}\n")
    checkpoint = Checkpoint(run=run, step=61_000, path=str(path))
    return Named(lineage=Lineage(lineage, State()), checkpoint=checkpoint, counts=counts)


def test_the_same_step_of_two_runs_has_two_folders(tmp_path: Path):
    first = evaluation_results.folder_of(_named(tmp_path, "12.00", "a", counts=True))
    assert first == tmp_path / "evaluations" / "step-00061000"
    taken_back = _named(tmp_path, "12.00", "a", counts=False)
    assert evaluation_results.folder_of(taken_back) == first, "what was found before a rollback stays where it is"
    second = evaluation_results.folder_of(_named(tmp_path, "12.01", "b", counts=True))
    assert second.name == "step-00061000-12.01"
    again = evaluation_results.folder_of(_named(tmp_path, "12.01", "c", counts=True))
    assert again.name == f"step-00061000-12.01-{'c' * 12}", "a restart has saved the step again"
    assert evaluation_results.folder_of(_named(tmp_path, "12.01", "b", counts=True)) == second


def test_a_discarded_checkpoint_never_takes_the_folder_of_the_one_that_counts(tmp_path: Path):
    assert evaluation_results.folder_of(_named(tmp_path, "12.00", "a", counts=False)).name == "step-00061000-12.00"
    assert evaluation_results.folder_of(_named(tmp_path, "12.01", "b", counts=True)).name == "step-00061000"


def test_a_second_command_waits_for_the_first(tmp_path: Path):
    told: list[str] = []
    with evaluation_results.alone(tmp_path, told.append):
        second = threading.Thread(target=lambda: _take(tmp_path, told), daemon=True)
        second.start()
        while not told:
            assert second.is_alive()
        assert told[0].startswith("pid ")
    second.join(240)
    assert told[1:] == ["taken"]


def _take(folder: Path, told: list[str]) -> None:
    with evaluation_results.alone(folder, told.append):
        told.append("taken")


def test_paths_of_the_configuration_are_relative_to_it(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "opt-ops.toml").write_text(
        "[evaluate]\npython = '.venv-evaluate/bin/python'\ntasks = ['piqa', 'mine']\n[serve]\npython = 'python3'\n"
    )
    found = load(tmp_path / "opt-ops.toml")
    assert found.evaluate.python == str(tmp_path / ".venv-evaluate/bin/python")
    assert found.evaluate.tasks == ["piqa", str(tmp_path / "mine")]
    assert found.serve.python == "python3"


def test_an_evaluation_takes_only_gpus_that_nobody_uses(tmp_path: Path, nvml_library: Path):
    driver = FakeDriver(tmp_path, gpus=3, library=nvml_library)
    driver.set(1, processes="4711:1000000")
    code = "from opt_ops.cli.ckpt import harness; print(harness._gpus())"

    def seen(**environment: str) -> dict[str, str]:
        outer = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        env = {**outer, **driver.env, **environment}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return ast.literal_eval(done.stdout)

    (free,) = seen().values()
    assert len(free.split(",")) == 2
    assert all(each.startswith("GPU-") for each in free.split(","))
    for gpu in (0, 2):
        driver.set(gpu, processes="4712:1000000")
    assert seen() == {"CUDA_VISIBLE_DEVICES": ""}, "the CPU computes"
    assert seen(CUDA_VISIBLE_DEVICES="1") == {}, "whoever starts it has chosen"


def test_a_harness_that_is_killed_is_told(tmp_path: Path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho loading >&2\nkill -9 $$\n")
    program.chmod(0o755)
    work = harness.Work(weights=tmp_path, about={}, tasks={}, documents=tmp_path, prompts=None, completions=None)
    told: list[str] = []
    failure = harness.run(str(program), work, told.append)
    assert "SIGKILL ended it" in str(failure)
    assert told == ["starting the harness", "loading"]
    said = "error: task piqa: Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"  # by the harness's library
    program.write_text(f'#!/bin/sh\necho "  File x" >&2\necho "{said}" >&2\nexit 1\n')
    told.clear()
    missing = harness.run(str(program), work, told.append)
    assert isinstance(missing, OptOpsError)
    assert "not on this machine" in str(missing)
    assert "python -m lm_eval run --model dummy" in (missing.hint or "")
    assert told == ["starting the harness"], "no traceback"
    other = "error: task wsc: no such column"
    traces = "\n".join([other, *(f"  File {n}" for n in range(20)), *[said] * 5])
    program.write_text(f'#!/bin/sh\ncat >&2 <<"E"\n{traces}\nE\nexit 1\n')
    several = str(harness.run(str(program), work, told.append))
    assert several.startswith("the harness failed: task wsc: no such column; task piqa")
    assert several.endswith("; and 2 more")
    with pytest.raises(Unavailable, match="No such file"):
        harness.probe(str(tmp_path / "none"))


def test_completions_become_a_request_that_the_daemon_takes(tmp_path: Path):
    """A model may write anything: null characters, and more than a request can hold."""
    chosen = _named(tmp_path, "12.00", "a", counts=True)
    told = {"prompt": "Once", "greedy": "a\0b", "drawn": "é" * 8192}
    whole = {"completions": [told] * evaluation_samples.MOST_PROMPTS, "opt_ops": {"tokens": 60, "seed": 1}}
    (tmp_path / "samples.60-tokens.json").write_text(json.dumps(whole))
    completed = evaluation_samples.completed_in(chosen, tmp_path / "samples.60-tokens.json")
    lineages.ask(tmp_path, "ann", "sampled", evaluation_results.arguments(completed), 1.0, identifier="sampled-a")
    (request,) = FileInbox(tmp_path).requests()
    event = event_of(State(runs={"12.00": None}), request)  # pyright: ignore[reportArgumentType]
    assert isinstance(event, CheckpointSampled), event
    assert event.completions[0].greedy == "a�b"
    assert event.completions[0].drawn == "é" * len(event.completions[0].drawn)
