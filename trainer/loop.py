"""The training loop: from a recipe, and perhaps a checkpoint, to the last step.

Where ranks can be replaced, the loop goes on in a newer generation of the membership: on the ranks that kept their
process, and on new ones. ``docs/in-place.md`` has the protocol.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from opt_ops.contract import environment
from opt_ops.contract.drills import standby_delay
from opt_ops.contract.environment import Place
from opt_ops.contract.membership import MembersFile, Membership, is_standby
from opt_ops.contract.phases import PhaseFile, PhaseName
from trainer import device, preconditions
from trainer.attempt import Attempt, outside_of
from trainer.checkpoint import Writer
from trainer.checkpoint.peer_copies import DamagedCopyError
from trainer.console import print_line
from trainer.data import dataset
from trainer.errors import NoCommonStepError
from trainer.job import TrainJob, check_folders
from trainer.progress_log import ProgressLog
from trainer.recovery import standby
from trainer.recovery.rejoin import Members, can_replace
from trainer.telemetry import StepOverheads

__all__ = ["AttemptRunner", "TrainJob", "train"]


def train(job: TrainJob) -> None:
    """Train to the last step of the recipe.

    Raises:
        UserError: something that the user gave cannot work.
        RankEnvironmentError: some of the variables that a rank needs are missing.
        CheckpointError: the checkpoint to resume from is missing, torn or damaged.
        NotFiniteError: the loss or the gradient norm is not finite.
        LossScaleError: the loss scale of fp16 stays at its floor.
        CorruptionError, PeerCorruptionError: the data of this rank, or of another, is corrupt.
        SupersededError: a newer attempt of the lineage exists.
        NoCommonStepError: ranks were lost, and no step is left whose state all places hold.
        RuntimeError: all steps are done, but the last checkpoint was not saved.
    """
    recipe = job.recipe
    file = MembersFile.of(os.environ)
    membership = standby.first_membership(file, os.environ)
    waits = is_standby(os.environ)
    place, phases, outside = Place(0, 1, 0), PhaseFile(None), None
    if not membership and not waits:
        place = environment.place_from_environment(os.environ)
        preconditions.check_layout(recipe, place.world)
        check_folders(job)
        outside = outside_of(job, place)
        phases = PhaseFile(job.run_dir / "phases.jsonl" if place.rank == 0 else None)
        phases.enter(PhaseName.START, None)
    device.prepare(job.run_dir, deterministic=recipe.deterministic, replaceable=can_replace(recipe, file))
    writer = Writer()  # forked before this process has threads, connections or a GPU
    data = dataset.load(
        job.data,
        job.valid,
        job.tokenizer,
        recipe,
        lambda: phases.enter(PhaseName.TOKENS, None, again=True),
        since=job.data_since,
    )
    phases.enter(PhaseName.START, None)
    members = Members(file)
    attempt = Attempt(job, data, writer, members)
    runner = AttemptRunner(attempt, members)
    if file.path:
        members.watch(writer.end)
    if outside:
        attempt.start(place, outside, phases)
    else:
        if waits:
            print_line(standby.warm_up(recipe, data.samples(recipe.data.seq_len, recipe.seed), os.environ))
        membership = membership or standby.wait_for_place(members)
        time.sleep(standby_delay(job.run_dir / "drill.json"))
        runner.recover(membership)
    runner.run()
    dist.destroy_process_group()


class AttemptRunner:
    """Runs the steps of an attempt on one rank, also when other ranks are replaced meanwhile.

    Args:
        attempt: its parts.
        members: the other ranks, and whether they change.
    """

    def __init__(self, attempt: Attempt, members: Members) -> None:
        self._attempt, self._members = attempt, members
        self._log = ProgressLog(attempt.job.recipe)

    def run(self) -> None:
        """Run the steps that are left, also when ranks are replaced meanwhile.

        Raises:
            Exception: as :func:`train`.
        """
        while True:
            try:
                self._run()
            except DamagedCopyError as error:
                raise NoCommonStepError(str(error)) from error
            except Exception as error:
                if not self._members.is_loss(error):
                    raise
                self._members.lose(error, self._attempt.progress.step)
            else:
                return
            self.recover()  # without the error: its traceback keeps the broken step

    def recover(self, membership: Membership | None = None) -> None:
        """Join a newer generation of the membership: as a rank that has kept its process, or as a new one.

        Args:
            membership: of the generation. None: wait for it.

        Raises:
            NoCommonStepError: as :func:`train`.
        """
        while True:
            membership = membership or self._members.wait_for_newer()
            try:
                self._attempt.rejoin(membership)
            except Exception as error:
                if not self._members.is_loss(error):
                    raise
                self._members.lose(error, self._attempt.progress.step)
            else:
                return
            membership = None

    def _run(self) -> None:
        attempt, steps = self._attempt, self._attempt.job.recipe.steps
        if attempt.to_save is not None and attempt.progress.step >= steps:
            self._save(attempt.to_save, durable=True)
        overheads = StepOverheads()
        while attempt.progress.step < steps:
            overheads = self._next(overheads)
        attempt.phases.enter(PhaseName.ENDING, attempt.progress.step)
        if attempt.copies:
            attempt.copies.wait()  # then the last line is written
        if not attempt.checkpointer.finish():
            error = attempt.checkpointer.take_error()
            raise RuntimeError(f"all steps are done, but the last checkpoint was not saved: {error}")

    def _next(self, overheads: StepOverheads) -> StepOverheads:
        """Run one step, and save where a save is due.

        Args:
            overheads: seconds that were spent on saving and logging after the previous step. They count in this one.
        """
        attempt, recipe, recorder = self._attempt, self._attempt.job.recipe, self._attempt.recorder
        attempt.phases.enter(PhaseName.TRAINING, attempt.progress.step)
        device.collect_garbage(attempt.progress.step)
        step = attempt.progress.step + 1
        to_log = step % recipe.log_every == 0 or step == recipe.steps
        outcome = attempt.steps.take(attempt.progress, closely=to_log)
        self._members.require_whole()
        attempt.progress = outcome.progress
        valid, overheads.evaluation = ({}, 0.0) if outcome.fault else self._evaluate(step)
        self._members.require_whole()
        computed = time.monotonic()
        save_error = attempt.checkpointer.take_error()
        line: Mapping[str, Any] = {}
        if recorder:
            line = recorder.record(step, outcome, attempt.engine.optimizer, overheads, save_error, valid)
        if outcome.fault:
            attempt.phases.enter(PhaseName.ENDING, attempt.progress.step)
            if recorder:
                recorder.append_waiting()
            attempt.checkpointer.wait()  # a save in flight holds an earlier, good state
            raise outcome.fault
        if recorder:
            self._log.update(line)
        durable = outcome.agreed.save or outcome.measured.save_due
        to_save = durable or outcome.measured.snapshot_due
        # A copy with each save: lines wait for a copy, and those before a checkpoint must be there after a restart.
        if attempt.copies and (to_save or attempt.copies.due(step)):
            attempt.keep(line)
        overheads = StepOverheads(logging=time.monotonic() - computed)
        if to_save:
            overheads.saving = self._save(line, durable=durable)
        return overheads

    def _evaluate(self, step: int) -> tuple[dict[str, float], float]:
        """The losses on the corpora that are due after ``step``, and the seconds that this took."""
        attempt = self._attempt
        due = attempt.evaluation.due(step)
        if not due:
            return {}, 0.0
        attempt.phases.enter(PhaseName.EVALUATION, step)
        return attempt.evaluation.run(due)

    def _save(self, line: Mapping[str, Any], *, durable: bool) -> float:
        """Start a save, and return the seconds that training was held up.

        Args:
            line: the telemetry line of the step, on rank 0.
            durable: whether a durable checkpoint is needed. Otherwise a snapshot is enough.
        """
        attempt = self._attempt
        attempt.phases.enter(PhaseName.SAVING, attempt.progress.step)
        start = time.monotonic()
        attempt.checkpointer.wait()
        if durable:
            attempt.job.signals.save_requested.clear()  # this save answers all requests so far
        attempt.checkpointer.save(attempt.header(line), durable)
        cost = time.monotonic() - start
        attempt.saves.saved(cost, attempt.checkpointer.background_seconds, durable=durable)
        return cost
