"""The training loop: from a recipe and perhaps a checkpoint to the last step."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer import manifest, optim, parallel, telemetry, tokens
from trainer.checkpoint import Checkpointer
from trainer.data import Samples, next_sample, part
from trainer.errors import NonFiniteError, UserError
from trainer.fence import Fence
from trainer.lines import say
from trainer.manifest import CheckpointError
from trainer.model import OPT
from trainer.outside import Heard, Outside
from trainer.parallel import Layout
from trainer.recipes import Recipe, trajectory_digest
from trainer.signals import Signals
from trainer.telemetry import Measured, Phases, Progress, Telemetry
from trainer.tokens import TokenFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the command line asks for."""

    recipe_name: str
    recipe: Recipe
    run_dir: Path
    checkpoint_dir: Path
    attempt: str
    resume: Path | None
    from_scratch: bool
    init_from: Path | None
    lr_factors: Sequence[tuple[int, float]]
    skips: Sequence[tuple[int, int]]
    data: Sequence[Path]
    tokenizer: Path | None
    fence: Path | None
    process_start: float
    signals: Signals


def train(job: Job) -> None:
    """Train to the last step of the recipe.

    Raises:
        UserError: something the user gave cannot work.
        CheckpointError: the checkpoint to resume from is missing, torn or damaged.
        NonFiniteError: training has diverged.
        SupersededError: a newer attempt of the lineage exists.
    """
    recipe = job.recipe
    place = parallel.place_from_environment(os.environ)
    dp, tp = parallel.check_layout(recipe, place.world)
    check_folders(job)
    job.signals.dump_stacks_to(job.run_dir / "stacks" / f"rank-{place.rank:04d}.txt")
    phases = Phases(job.run_dir / "phases.jsonl" if place.rank == 0 else None)
    phases.enter("start", None)
    text = tokens.load(job.data, job.tokenizer, recipe.model.vocab_size)
    samples = Samples(text.ids, recipe.data.seq_len, recipe.seed)
    settings_digest = trajectory_digest(recipe, job.lr_factors, job.skips, text.digest, _initial_weights(job))

    layout = parallel.start(place, dp, tp)
    parallel.require_agreement("the recipe, its settings or the data", settings_digest)
    model = parallel.shard(OPT(recipe.model, recipe.seed), layout, recipe.precision)
    optimizer = optim.build(model, recipe.optim)
    fence = Fence(job.fence, job.attempt)
    checkpointer = Checkpointer(job.checkpoint_dir, model, optimizer, fence)
    progress = _begin(job, checkpointer, settings_digest, layout)
    recorder = _recorder(job, layout, _config(job, layout, model, text, progress)) if layout.rank == 0 else None
    outside = Outside(job.run_dir, layout, job.signals, fence)

    save_seconds = 0.0
    while progress.step < recipe.steps:
        phases.enter("training", progress.step)
        step = progress.step + 1
        position = next_sample(progress.data_position, recipe.data.global_batch, job.skips)
        before = replace(progress, data_position=position)
        shares = forward_backward(model, samples, recipe, layout, before)
        measured = measure(model, *shares, outside.heard(step))
        outside.stop_if_told(measured)
        if measured.finite:
            lr = optim.learning_rate(step, recipe.optim, job.lr_factors) * measured.drill_factor
            optim.update(optimizer, measured.gnorm, lr)
            progress = advanced(before, recipe)
        save_error = checkpointer.take_error()
        line = recorder.record(step, measured, optimizer, progress, save_seconds, save_error) if recorder else {}
        if not measured.finite:
            phases.enter("ending", progress.step)
            checkpointer.wait()  # what is being saved is of before
            raise NonFiniteError(f"step {step}: loss {measured.loss}, gradient norm {measured.gnorm}: not applied")
        if recorder and (step % recipe.log_every == 0 or step == recipe.steps):
            _print_progress(line, recipe.steps)
        save_seconds = 0.0
        if measured.save_requested or step % recipe.checkpoint_every == 0 or step == recipe.steps:
            phases.enter("saving", step)
            save_seconds = _save(job, checkpointer, _header(job, layout, progress, settings_digest, line))
    phases.enter("ending", progress.step)
    if not checkpointer.wait():
        raise RuntimeError(f"all steps are done, but the last checkpoint was not saved: {checkpointer.take_error()}")
    dist.destroy_process_group()


def check_folders(job: Job) -> None:
    """Refuse to start over in silence or to write into another attempt's telemetry; make the folders.

    Raises:
        UserError: one of the two.
    """
    if (job.run_dir / "telemetry.jsonl").exists():
        raise UserError(
            f"{job.run_dir} holds the telemetry of another attempt: give each attempt a --run-dir of its own."
        )
    present = manifest.committed(job.checkpoint_dir)
    if present and not job.resume and not job.from_scratch:
        raise UserError(
            f"{job.checkpoint_dir} holds a checkpoint of step {present[-1][0]}: "
            f"continue with --resume {present[-1][1]}, or start over with --from-scratch."
        )
    job.run_dir.mkdir(parents=True, exist_ok=True)
    job.checkpoint_dir.mkdir(parents=True, exist_ok=True)


def _begin(job: Job, checkpointer: Checkpointer, settings_digest: str, layout: Layout) -> Progress:
    """Read what training begins with, if anything."""
    if not job.resume:
        if job.init_from:
            checkpointer.load_weights(job.init_from)
        return Progress()
    found = checkpointer.load(job.resume)
    if layout.rank == 0:
        say(f"resumed from {job.resume}, step {found.step}")
        if found.settings_digest != settings_digest:
            say("note: settings, data, learning-rate factors or skips are not those the checkpoint was saved under")
    return Progress(step=found.step, data_position=found.data_position, tokens=found.tokens)


def _initial_weights(job: Job) -> str | None:
    """What identifies the weights that the run began with, if they were given: the digest in the marker."""
    if job.init_from is None:
        return None
    try:
        return manifest.digest(job.init_from)
    except CheckpointError:
        if not job.resume:
            raise
        return None  # they are not needed any more


def forward_backward(
    model: OPT, samples: Samples, recipe: Recipe, layout: Layout, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Leave the gradients of the mean loss over the global batch in the parameters.

    Args:
        model: whose clock is set.
        samples: what to train on.
        recipe: for the sizes of batch and sequence.
        layout: for this rank's share.
        progress: that before this update. Its data position is that of the batch.

    Returns:
        This rank's shares of the mean loss and of the mean activation norm: over all ranks, they add up to them.
    """
    assert isinstance(model, FSDPModule)
    seq_len, batch = recipe.data.seq_len, recipe.data.global_batch
    share = part(progress.data_position, batch, layout.dp, layout.dp_rank)
    # As many as the largest share needs: each is a round of collectives, which all ranks must go through together.
    micro_steps = math.ceil(math.ceil(batch / layout.dp) / recipe.data.micro_batch)
    tokens_per_rank = batch * seq_len / layout.dp  # on average: FSDP averages over ranks, whatever their shares
    loss_sum = activation_norm_sum = torch.zeros((), device=layout.device)
    model.clock.step = progress.step + 1
    model.clock.first_position = layout.tp_rank * (seq_len // layout.tp)
    model.zero_grad()
    for micro_step in range(micro_steps):
        first, count = part(*share, micro_steps, micro_step)
        if count == 0:
            first = share[0]  # something to go through the motions with
        model.clock.first_sample = first
        model.set_requires_gradient_sync(micro_step == micro_steps - 1)
        inputs, targets = (ids.to(layout.device) for ids in samples.batch(first, max(1, count)))
        with layout.loss_context():
            logits, activation_norm = model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / tokens_per_rank
            if count == 0:
                loss, activation_norm = loss * 0, activation_norm * 0
            loss.backward()
        loss_sum = loss_sum + (loss.to_local() if isinstance(loss, DTensor) else loss).detach()
        activation_norm_sum = activation_norm_sum + activation_norm
    return loss_sum / layout.world, activation_norm_sum / (batch * seq_len)


def measure(model: OPT, loss: Tensor, activation_norm: Tensor, heard: Heard) -> Measured:
    """Add up over all ranks, in the one collective of the step that is not the gradients'.

    Args:
        model: with its gradients.
        loss: what :func:`forward_backward` returned.
        activation_norm: what :func:`forward_backward` returned.
        heard: what this rank has to tell the others.
    """
    told = [heard.drill_factor, heard.save_requested, heard.superseded]
    sums = torch.stack([loss.double(), activation_norm.double(), optim.square_norm_share(model.parameters())])
    if heard.busy_seconds is not None:  # each rank has a place of its own in the sum
        by_rank = [0.0] * dist.get_world_size()
        by_rank[dist.get_rank()] = heard.busy_seconds
        told += by_rank
    total = torch.cat([sums, torch.tensor(told, dtype=torch.float64, device=loss.device)])
    dist.all_reduce(total)
    mean_loss, mean_activation_norm, square_norm, drill_factor, save_requests, superseded, *busy = total.tolist()
    return Measured(
        loss=mean_loss,
        activation_norm=mean_activation_norm,
        gnorm=math.sqrt(square_norm),
        drill_factor=drill_factor,
        save_requested=save_requests > 0,
        superseded=superseded > 0,
        busy_seconds=busy,
    )


def _recorder(job: Job, layout: Layout, config: dict[str, Any]) -> Telemetry:
    telemetry.write_config(job.run_dir, config)
    return Telemetry(job.run_dir / "telemetry.jsonl", job.recipe, layout, job.process_start)


def _save(job: Job, checkpointer: Checkpointer, header: dict[str, Any]) -> float:
    """Begin a checkpoint; returns the seconds that training was held up."""
    start = time.monotonic()
    checkpointer.wait()
    job.signals.save_requested.clear()  # what was asked for until now, this save answers
    checkpointer.save(header)
    return time.monotonic() - start


def advanced(progress: Progress, recipe: Recipe) -> Progress:
    """``progress`` after one more update."""
    batch = recipe.data.global_batch
    return Progress(
        step=progress.step + 1,
        data_position=progress.data_position + batch,
        tokens=progress.tokens + batch * recipe.data.seq_len,
    )


def _header(job: Job, layout: Layout, progress: Progress, settings_digest: str, line: dict[str, Any]) -> dict[str, Any]:
    return {
        **asdict(progress),
        "attempt": job.attempt,
        "ts": time.time(),
        "layout": _layout(layout),
        "settings_digest": settings_digest,
        "seed": job.recipe.seed,  # with the step, the state of every random choice
        "schedule": _schedule(job.recipe),
        "lr_factors": job.lr_factors,
        "skips": job.skips,
        "model": asdict(job.recipe.model),
        "telemetry": line,
    }


def _config(job: Job, layout: Layout, model: OPT, text: TokenFile, progress: Progress) -> dict[str, Any]:
    recipe = job.recipe
    config = recipe.optim
    return {
        "attempt": job.attempt,
        "recipe": job.recipe_name,
        "steps": recipe.steps,
        "settings": asdict(recipe),
        "schedule": _schedule(recipe),
        "lr_factors": job.lr_factors,
        "skips": job.skips,
        "optimizer": {
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "clip_norm": config.clip_norm,
        },
        "layout": _layout(layout),
        "model": {"parameters": sum(p.numel() for p in model.parameters()), **asdict(recipe.model)},
        "data": {
            "sources": text.sources,
            "tokens": len(text.ids),
            "digest": text.digest,
            "tokenizer": text.tokenizer,
        },
        "resume": {"path": str(job.resume), "step": progress.step} if job.resume else None,
        "init_from": str(job.init_from) if job.init_from else None,
    }


def _schedule(recipe: Recipe) -> dict[str, float]:
    names = ("peak_lr", "warmup_steps", "total_steps", "final_fraction")
    return {name: getattr(recipe.optim, name) for name in names}


def _layout(layout: Layout) -> dict[str, int]:
    return {"world": layout.world, "dp": layout.dp, "tp": layout.tp}


def _print_progress(line: dict[str, Any], steps: int) -> None:
    say(
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}  step {line['num_updates']}/{steps}  loss {line['loss']:.4f}  "
        f"lr {line['lr']:.3g}  gnorm {line['gnorm']:.3f}  {line['wps']:,.0f} tokens/s"
    )
