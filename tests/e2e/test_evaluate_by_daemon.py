"""Evaluations on a spare that the daemon orders: real daemon, agents, trainer and harness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from opt_ops.core.events import CheckpointEvaluated, CheckpointSampled
from opt_ops.core.events.evaluation import score_key
from opt_ops.core.values import EvaluationEnd
from tests.e2e.site import PATIENCE, QUICK_HANG, QUICK_SILENCE, Site, until
from tests.e2e.trained import harnesses

EVERY, COMPARED = 200, 260
SETTINGS = (
    "steps=100000",
    f"checkpoint_every={EVERY}",
    "evaluate_every=100000",
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
PATIENT = {**QUICK_HANG["hang"], "floor_seconds = 30.0": "floor_seconds = 900.0"}
"""With ranks that stand still: this test stops them, so that training does not go far while nodes come and go."""


def test_a_spare_evaluates_gives_way_to_a_launch_and_the_next_idle_one_ends_it(tmp_path: Path):
    tasks = tmp_path / "mine"
    tasks.mkdir()
    texts = [" ".join(topics[name].split())[:200] for name in sorted(topics)[:5]]
    (tasks / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    (tasks / "texts.yaml").write_text(TASK.format(file=tasks / "texts.jsonl"))
    (tmp_path / "prompts.txt").write_text("The value of\n")
    site = Site(
        tmp_path,
        "[local]\nnodes = ['n1', 'n2', 'n3']\n"
        f"[evaluate]\nevery = {EVERY}\ntasks = ['mine']\n"
        f"[samples]\nprompts = 'prompts.txt'\nevery = {EVERY}\ntokens = 4\n",
        trainer=f"'{sys.executable}', '-m', 'trainer'",
        **QUICK_SILENCE,
        hang=PATIENT,
    )
    environment = {"HF_HOME": str(tmp_path / "hub")}
    words = [f"--set={each}" for each in SETTINGS]
    try:
        site.command("run", "start", "opt-tiny", *words, "--nodes=1", "--spares=1", "--ranks=1", "-q")
        site.start_daemon(**environment)
        first = site.wait(lambda state: state.evaluation)
        os.kill(site.pids("1.00-a0")[0], signal.SIGSTOP)
        assert (first.checkpoint, first.intended.node) == (f"1.00/{EVERY}", "n2")
        (harness,) = until(lambda: harnesses(site))
        os.kill(harness, signal.SIGSTOP)  # it does not end before the node is needed
        assert f"evaluates {first.checkpoint}" in site.command("node", "list", "1")
        assert f"evaluates {first.checkpoint} on n2" in site.command("run", "show", "1")

        site.kill_daemon()
        site.start_daemon(**environment)
        site.looked()
        assert site.state().evaluation.name == first.name
        assert harnesses(site) == [harness], "it outlives the daemon"

        os.kill(site.agents()["n1"], signal.SIGKILL)
        attempt = site.wait(lambda state: state.attempt.nodes == ("n2",) and state.attempt.first_step and state.attempt)
        os.kill(site.pids(attempt.name)[0], signal.SIGSTOP)
        until(lambda: not Path(f"/proc/{harness}").exists())
        gave_way = site.state().evaluations[first.name]
        assert (gave_way.end, gave_way.why) == (EvaluationEnd.GIVEN_UP, f"{attempt.name} needs n2")

        again = site.wait(lambda state: next((x for x in state.evaluations.values() if x.intended.node == "n3"), None))
        assert again.checkpoint == first.checkpoint
        os.kill(site.pids(attempt.name)[0], signal.SIGCONT)
        until(lambda: site.step() >= COMPARED)
        os.kill(site.pids(attempt.name)[0], signal.SIGSTOP)
        state = site.wait(lambda state: state.evaluations[again.name].end and state)
        assert state.evaluations[again.name].end is EvaluationEnd.DONE, _logs(site)
        events = [entry.event for entry in site.entries()]
        keys = Counter(score_key(event) for event in events if isinstance(event, CheckpointEvaluated))
        assert set(keys.values()) == {1}
        assert [(x.step, x.task, x.metric) for x in state.scores.values()] == [(EVERY, "texts", "bits_per_byte")]
        assert [event.step for event in events if isinstance(event, CheckpointSampled)] == [EVERY]

        before, after = (_losses(site.runs / "1" / "1.00" / name) for name in ("a0", "a1"))
        with_evaluations = [*before[:EVERY], *after][:COMPARED]
        assert with_evaluations == _alone(tmp_path), "training does not notice"
    finally:
        site.close()


def _alone(folder: Path) -> Sequence[float]:
    """The losses of the same training, which nobody watches."""
    run = folder / "alone"
    folders = ["--run-dir", str(run), "--checkpoint-dir", str(run / "checkpoints")]
    sets = [word for each in SETTINGS for word in ("--set", each)]
    command = [sys.executable, "-m", "trainer", "--recipe", "opt-tiny", *sets, *folders, "--from-scratch"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or len(_losses(run)) >= COMPARED, 2 * PATIENCE)
        finally:
            process.kill()
    return _losses(run)[:COMPARED]


def _losses(folder: Path) -> list[float]:
    path = folder / "telemetry.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def _logs(site: Site) -> str:
    return "\n".join(path.read_text() for path in (site.runs / "1" / "evaluations").glob("*.log"))
