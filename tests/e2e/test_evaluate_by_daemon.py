"""Evaluations that the daemon orders: real daemon, agents and processes; the real trainer and harness once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from opt_ops.core.state.status import Status
from opt_ops.core.values import EvaluationEnd
from tests.e2e.site import QUICK_SILENCE, Site, until

SETTINGS = (
    "steps=120",
    "checkpoint_every=60",
    "evaluate_every=1000",
    "peer_copies.every=0",
    "data.seq_len=64",
    "model.num_layers=1",
    "model.hidden_size=32",
    "optim.warmup_steps=4",
)
TASK = """task: texts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: loglikelihood_rolling
metadata:
  version: 1.0
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def test_a_spare_evaluates_outlives_the_daemon_and_gives_way_to_a_launch(tmp_path: Path):
    site = Site(tmp_path, "[local]\nnodes = ['n1', 'n2']\n[evaluate]\nevery = 20\ntasks = ['mine']\n", **QUICK_SILENCE)
    go = tmp_path / "go"
    script = f"echo $0 $@ $$; while [ ! -e {go} ]; do sleep 0.1; done"
    command = f"EvaluationCommand(argv=('sh', '-c', {script!r}))"
    stand_in = "from opt_ops.supervise import site; from opt_ops.supervise.evaluation_orders import EvaluationCommand"
    stand_in += f"; site.evaluation_command = lambda *_: {command}"
    try:
        site.start("steps=100000", "checkpoint_every=20", "pause=0.05", nodes=1, spares=1)
        site.start_daemon(stand_in)
        first = site.wait(lambda state: state.evaluation)
        log = site.runs / "1" / "evaluations" / f"{first.name}.log"
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        assert first.checkpoint in log.read_text()
        assert f"evaluates {first.checkpoint}" in site.command("node", "list", "1")
        assert f"evaluates {first.checkpoint} on n2" in site.command("run", "show", "1")
        site.kill_daemon()
        site.start_daemon(stand_in)
        site.looked()
        assert site.state().evaluation.name == first.name
        go.touch()
        site.wait(lambda state: state.evaluations[first.name].end is EvaluationEnd.DONE)
        assert len(log.read_text().splitlines()) == 1, "it was not begun again"
        go.unlink()
        second = site.wait(lambda state: state.evaluation)
        log = site.runs / "1" / "evaluations" / f"{second.name}.log"
        until(lambda: log.exists() and log.read_text().endswith("\n"))
        os.kill(site.agents()["n1"], signal.SIGKILL)
        state = site.wait(lambda state: state.attempt.nodes == ("n2",) and state.attempt.live and state)
        evaluation = site.wait(lambda state: state.evaluations[second.name].end and state.evaluations[second.name])
        assert evaluation.end is EvaluationEnd.GIVEN_UP
        assert evaluation.why == f"{state.attempt.name} needs n2"
        pid = int(log.read_text().split()[-1])
        until(lambda: not Path(f"/proc/{pid}").exists())
        site.wait(lambda state: state.attempt.first_step is not None)
        assert site.state().evaluation is None, "there is no idle node"
    finally:
        site.close()


def test_evaluations_beside_training_leave_its_losses_as_they_are(tmp_path: Path):
    tasks = tmp_path / "mine"
    tasks.mkdir()
    texts = [" ".join(topics[name].split())[:200] for name in sorted(topics)[:5]]
    (tasks / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    (tasks / "texts.yaml").write_text(TASK.format(file=tasks / "texts.jsonl"))
    (tmp_path / "prompts.txt").write_text("The value of\n")
    site = Site(
        tmp_path,
        "[local]\nnodes = ['n1']\n"
        "[evaluate]\nevery = 60\ntasks = ['mine']\nwhere = 'daemon'\n"
        "[samples]\nprompts = 'prompts.txt'\nevery = 60\ntokens = 4\n",
        trainer=f"'{sys.executable}', '-m', 'trainer'",
    )
    words = [f"--set={each}" for each in SETTINGS]
    try:
        site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=0", "--ranks=1", "-q")
        site.start_daemon(HF_HOME=str(tmp_path / "hub"))
        first = site.wait(lambda state: next(iter(state.evaluations.values()), None))
        state = site.wait(lambda state: state.evaluations[first.name].end and state)
        assert state.evaluations[first.name].end is EvaluationEnd.DONE, _logs(site)
        assert first.intended.checkpoint.step == 60, "while training went on"
        assert [(each.step, each.task, each.metric) for each in state.scores.values()] == [
            (60, "texts", "bits_per_byte")
        ]
        assert [each.step for each in state.samples.values()] == [60]
        site.wait(lambda state: state.status is Status.COMPLETED)
        site.end_daemon()  # and with it the evaluation of the last checkpoint
        alone = tmp_path / "alone"
        folders = ["--run-dir", str(alone), "--checkpoint-dir", str(alone / "checkpoints")]
        sets = [word for each in SETTINGS for word in ("--set", each)]
        command = [sys.executable, "-m", "trainer", "--recipe", "opt-tiny", *sets, *folders, "--from-scratch"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert _losses(site.attempt_folder()) == _losses(alone)
    finally:
        site.close()


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def _logs(site: Site) -> str:
    return "\n".join(path.read_text() for path in (site.runs / "1" / "evaluations").glob("*.log"))
