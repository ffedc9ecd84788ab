"""The parts of an attempt on one rank: made at its start, and made to fit after each change of its members."""

import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from opt_ops.contract import environment
from opt_ops.contract.environment import Place
from opt_ops.contract.fence import Fence
from opt_ops.contract.files import write_durably
from opt_ops.contract.manifest import Manifest
from opt_ops.contract.membership import Membership
from opt_ops.contract.options import Options
from opt_ops.contract.outside import Outside
from opt_ops.contract.phases import PhaseFile
from opt_ops.contract.telemetry import cut_torn_line
from trainer import preconditions
from trainer.checkpoint import Checkpointer, Writer
from trainer.checkpoint.peer_copies import PeerCopies, Version, local_tensors
from trainer.checkpoint.schedule import SaveSchedules
from trainer.config_file import config_of, layout_of
from trainer.console import print_line
from trainer.data.changes import first_samples
from trainer.data.dataset import Dataset
from trainer.errors import NoCommonStepError, UserError
from trainer.evaluation import Evaluation
from trainer.job import TrainJob, destination, initial_weights
from trainer.optim_config import stated
from trainer.parallel.build import build
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import Layout
from trainer.progress_log import print_start
from trainer.recipes import trajectory_digest
from trainer.recovery import rebuild
from trainer.recovery.rejoin import Members, capabilities
from trainer.sources import running_code
from trainer.step.checksums import Checksums
from trainer.step.guard import Guard
from trainer.step.kill_drill import KillDrill
from trainer.step.measured import Progress
from trainer.step.rank_inputs import RankInputs
from trainer.step.step import Steps
from trainer.telemetry import Telemetry, write_config


class Attempt:
    """What one rank needs for steps, evaluations, copies and saves. :meth:`start` or :meth:`rejoin` makes the parts.

    Args:
        job: what the command line asks for.
        data: what to train and to evaluate on.
        writer: of this rank's checkpoints.
        members: the other ranks, and whether they change.

    Attributes:
        progress: after the last step.
        guard: decides which updates are applied.
        phases: where each phase is recorded.
        recorder: of telemetry, on rank 0.
        copies: of the state in the memory of peers, where ranks can be replaced.
        saves: when saves are due.
        to_save: the line of the last step, if its checkpoint may be missing.
        steps, evaluation, checkpointer, engine: run steps, measure, save, hold the model.
    """

    engine: Engine
    checkpointer: Checkpointer
    evaluation: Evaluation
    steps: Steps
    _layout: Layout
    _drill: KillDrill

    def __init__(self, job: TrainJob, data: Dataset, writer: Writer, members: Members) -> None:
        recipe = job.recipe
        self.job, self._data, self._writer, self._members = job, data, writer, members
        self._settings_digest = trajectory_digest(recipe, job.lr_factors, job.skips, data.digest, initial_weights(job))
        self.phases = PhaseFile(None)
        self.guard = Guard(recipe)
        self.progress = Progress()
        self.recorder: Telemetry | None = None
        self.copies: PeerCopies | None = None
        self._outside: Outside | None = None
        self.saves = SaveSchedules(recipe, snapshots=job.snapshot_dir is not None)
        self.to_save: Mapping[str, Any] | None = None  # the line of the last step, if its checkpoint is missing
        self._firsts: Sequence[int] = ()  # samples with which changes of the data begin

    def start(self, place: Place, outside: Outside, phases: PhaseFile) -> None:
        """Begin the attempt, together with the other ranks.

        Args:
            place: of this rank.
            outside: what this rank hears.
            phases: where each phase is recorded.

        Raises:
            UserError, CheckpointError: as :func:`train`.
        """
        job, recipe = self.job, self.job.recipe
        self._outside, self.phases = outside, phases
        self._drill = KillDrill(place.rank)
        agreed = self._settings_digest + self._data.validation_digest
        self._layout, group = self._members.form(place, recipe, None, agreed)
        self.engine = build(recipe, self._layout)
        self.checkpointer = self._new_checkpointer(outside, environment.address_of_rank_0(os.environ))
        found = self._resume()
        if found:
            self.progress = Progress(step=found.step, data_position=found.data_position, tokens=found.tokens)
            if found.nodes and found.step >= recipe.steps:
                # Nothing is left to train. But this last snapshot has no durable checkpoint yet.
                self.to_save = dict(found.telemetry)
        self._firsts = first_samples(
            self._data.changes,
            self.progress.step,
            self.progress.data_position,
            recipe.data.global_batch,
            job.skips,
            found.data_since if found else (),
        )
        if place.rank == 0:
            config = config_of(job, self.engine, self._data, self.progress, self._firsts)
            config["capabilities"] = capabilities(recipe, place.world, self._members.file)
            write_config(job.run_dir, config)
            write_durably(job.run_dir / "tokenizer.json", self._data.tokenizer.text)
            self.recorder = self._new_recorder(waits=group is not None)
            print_start(config, self.progress.step)
        self._make_steps(outside)
        if group:
            nodes = [""] * place.world
            dist.all_gather_object(nodes, environment.node_name(os.environ), group=self._layout.host)
            self.copies = self._new_copies(nodes, group, self._members.generation)
            self.keep(dict(found.telemetry) if found else {})

    def keep(self, line: Mapping[str, Any]) -> None:
        """Copy the state after the last step for a peer.

        Args:
            line: the telemetry line of the step, on rank 0.
        """
        assert self.copies is not None
        header = {"progress": asdict(self.progress), "guard": self.guard.state(), "line": dict(line), "lines": []}
        header["firsts"] = self._firsts
        self.copies.wait()  # before the lines are taken: those of the version before are in the file now
        if self.recorder:
            header["lines"] = self.recorder.for_copy()
        self.copies.keep(self.progress.step, header)

    def _before_update(self) -> None:
        """Called in a step, before its update changes the state.

        If a copy is due after this step, the one before must be confirmed first. So when a rank is lost, at most the
        steps since the last copy and the step in flight are made again.
        """
        assert self.copies is not None
        if self.copies.due(self.progress.step + 1):
            self.copies.wait()
        self.copies.before_update()

    def rejoin(self, membership: Membership) -> None:
        """Form the groups of ``membership``, agree on a step, and restore its state: on all ranks together."""
        recipe, place, generation = self.job.recipe, membership.place, membership.generation
        is_new, done = self.copies is None, self.progress.step
        if self.copies:
            self.copies.stop()
        rebuild.abort()
        if not is_new:
            gc.collect()  # what keeps an old group alive, and with it gloo's threads
        self._writer.renew()
        # At the launch all ranks begin with the same command and the code on disk. Both may have changed since. Another
        # interval of logs or copies would be enough for ranks to wait for each other.
        agreed = self._settings_digest + self._data.validation_digest + running_code() + f"{recipe}"
        try:
            layout, group = self._members.form(place, recipe, membership, agreed)
        except UserError as error:  # the attempt ran with its settings, so a restart will
            raise NoCommonStepError(f"a new rank has other settings or other code than the attempt: {error}") from error
        assert group is not None, "all ranks have agreed that they can be replaced"
        if self.copies:
            rebuild.rewire(self.engine, layout)
            rebuild.drop_broken_step(self.engine)
            self._layout = self.engine.layout
        else:
            self._layout, self.engine = layout, build(recipe, layout)
            self._drill = KillDrill(place.rank)
            self.copies = self._new_copies(membership.nodes, group, generation)
        version = self.copies.rejoin(membership.nodes, group, generation)
        if version is None:
            raise NoCommonStepError("ranks were lost, and no step is left whose state all places hold")
        repeated = self._repeated(done, version.step)
        self._take_up(version, membership)
        if self.recorder:  # now all ranks and their writers have met
            about = {"generation": generation, "step": version.step, "repeated": repeated, "new": membership.new}
            path = self.job.run_dir / "members.jsonl"
            cut_torn_line(path)
            with path.open("a") as file:
                file.write(json.dumps({"ts": round(time.time(), 6)} | about) + "\n")
        self.job.signals.save_requested.set()
        # It begins with the step: what the log said of the lost peer before is over, and names no cause of a later end.
        print_line(f"step {version.step}: goes on in generation {generation}{' on a new rank' * is_new}")

    def _repeated(self, done: int, step: int) -> int:
        """How many steps are made again, without the one in flight. All ranks call this when they have restored."""
        newest = torch.tensor([done])
        dist.all_reduce(newest, dist.ReduceOp.MAX, group=self._layout.host)
        return max(0, int(newest) - step - 1)

    def _take_up(self, version: Version, membership: Membership) -> None:
        """Take up what a restored copy says, and make what a new rank lacks. All ranks and their writers meet here."""
        job, header, place = self.job, version.header, membership.place
        if self._outside is None:
            outside = outside_of(job, place, newcomer=True)
            outside.fence.generation = membership.generation
            self.checkpointer = self._new_checkpointer(outside, membership.address)
            self._outside = outside  # not before: if a peer is lost until here, a newer generation makes both
            self._drill.spare_until(version.step + 3)  # one for the step in flight may be told again
            if place.rank == 0:
                cut_torn_line(job.run_dir / "phases.jsonl")
                self.phases = PhaseFile(job.run_dir / "phases.jsonl")
                self.recorder = self._new_recorder(waits=True)
            self._firsts = header["firsts"]
            self._make_steps(outside)
        else:
            self._outside.fence.generation = membership.generation
            self.checkpointer.rejoin(membership.address, self._layout.host)
            self.steps.restored()
        self.progress = Progress(**header["progress"])  # until here it tells how many steps are repeated
        self.guard.restore(header["guard"])
        if self.recorder:
            self.recorder.go_on(header["lines"], membership.generation)
        self.to_save = header["line"]

    def _new_checkpointer(self, outside: Outside, address: str) -> Checkpointer:
        to = destination(self.job, outside.fence)
        return Checkpointer(self._writer, to, self.engine.state(), address, self._layout.host)

    def _new_recorder(self, *, waits: bool) -> Telemetry:
        job = self.job
        fence = Fence(job.fence, job.attempt, self._members.generation) if waits else None
        return Telemetry(job.run_dir / "telemetry.jsonl", job.recipe, self._layout, job.process_start, fence)

    def _new_copies(self, nodes: Sequence[str], group: dist.ProcessGroup, generation: int) -> PeerCopies:
        settings = self.job.recipe.peer_copies
        self.engine.before_update = self._before_update
        return PeerCopies(
            local_tensors(self.engine.state()),
            nodes,
            group,
            generation,
            every=settings.every,
            versions=settings.versions,
            passing=self._drill.passes,
            confirmed=self._confirmed,
        )

    def _confirmed(self, step: int) -> None:
        if self.recorder:
            self.recorder.confirm(step)

    def _make_steps(self, outside: Outside) -> None:
        """Make what runs steps and evaluations."""
        job, recipe, engine = self.job, self.job.recipe, self.engine
        self.evaluation = Evaluation(recipe, self._data.validation, engine)
        layers = () if recipe.compiles(on_gpu=self._layout.device.type == "cuda") else engine.model.layers
        inputs = RankInputs(outside, self._layout, self.saves, layers)
        every = recipe.checksum_every if engine.comparable else 0
        checksums = Checksums(engine.model, engine.optimizer, self._layout, every)
        samples = self._data.samples(recipe.data.seq_len, recipe.seed, self._firsts)
        self.steps = Steps(
            recipe, job.lr_factors, job.skips, engine, samples, self.guard, inputs, checksums, self._drill
        )

    def _resume(self) -> Manifest | None:
        """Read the weights or the state that training begins with. Returns what it resumes from, if anything."""
        job, checkpointer = self.job, self.checkpointer
        if not job.resume:
            if job.init_from:
                preconditions.require_same_shape(checkpointer.load_weights(job.init_from), job.recipe, job.init_from)
            return None
        found = checkpointer.load(job.resume)
        preconditions.require_same_shape(found, job.recipe, job.resume)
        if self._layout.rank == 0:
            print_line(f"resumed from {job.resume}, step {found.step}")
            if found.settings_digest != self._settings_digest:
                print_line(
                    "note: settings, data, learning-rate factors or skip windows differ from those of the checkpoint"
                )
        note = self.guard.restore(found.guard)
        if note and self._layout.rank == 0:
            print_line(note)
        return found

    def header(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The header of a checkpoint. ``line``: the telemetry line of the last step, on rank 0."""
        job = self.job
        return {
            **asdict(self.progress),
            "guard": self.guard.state(),
            "attempt": job.attempt,
            "ts": time.time(),
            "layout": layout_of(self._layout),
            "settings_digest": self._settings_digest,
            "seed": job.recipe.seed,  # with the step, this is the state of every random choice
            "schedule": stated(job.recipe.optim),
            "lr_factors": job.lr_factors,
            "skips": job.skips,
            "data_since": [
                (step, first)
                for step, first in zip(self._data.changes, self._firsts, strict=True)
                if step <= self.progress.step
            ],
            "model": asdict(job.recipe.model),
            "telemetry": line,
        }


def outside_of(job: TrainJob, place: Place, *, newcomer: bool = False) -> Outside:
    """What a rank at ``place`` hears."""
    heard = Options(run_dir=job.run_dir, attempt=job.attempt, fence=job.fence)
    return Outside(heard, place.rank, job.signals, newcomer=newcomer)
