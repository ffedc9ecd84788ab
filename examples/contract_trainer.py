"""A whole trainer for opt-ops in plain Python, on any number of ranks. It learns a mean: one weight, one momentum."""

import json, math, os, random, time

from opt_ops import contract

BATCH, OPTIMIZER = 12, {"betas": [0.9], "weight_decay": 0.0, "clip_norm": 1.0}
SCHEDULE = {"kind": "cosine", "peak_lr": 0.02, "warmup_steps": 10, "total_steps": 2000}


def all_reduce(numbers):  # their sums over all ranks
    sums = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def train(options, outside, rank, world):
    options.accept_only(["steps", "checkpoint_every"])  # or 78
    steps, every = options.whole("steps", 2000), options.whole("checkpoint_every", 100)
    found = contract.starting_point(options, rank)  # the checkpoint to continue from, verified, or 65
    step, position = (found.step, found.data_position) if found else (0, 0)
    w, m = json.loads((options.resume / "state.json").read_text()) if found else (0.0, 0.0)
    folder = contract.RunFolder(options, rank)
    folder.config(steps=steps, schedule=SCHEDULE, optimizer=OPTIMIZER)
    while step < steps:
        folder.phase("training", step)
        step, first = step + 1, contract.next_sample(position, BATCH, options.skips)
        samples = range(first + rank, first + BATCH, world)  # a sample follows from its number
        errors = [w - random.Random(number).gauss(3.0, 1.0) for number in samples]
        part = math.nan if outside.spoils(step) else 1 / BATCH
        mine = [sum(error**2 for error in errors) * part, sum(errors) * part, *outside.local(step)]
        loss, gradient, *heard = all_reduce(mine) if world > 1 else mine  # the only reduction of a step
        agreed = outside.agreed(heard)
        if agreed.superseded:
            raise contract.SupersededError("a newer attempt exists")
        lr = contract.lr_of(SCHEDULE, options.lr_factors, step) * agreed.lr_factor
        if math.isfinite(loss):
            m = 0.9 * m + max(-1.0, min(gradient, 1.0))
            w, position = w - lr * m, first + BATCH
        time.sleep(0.01)  # a larger model takes longer
        place = {"num_updates": step, "data_position": position, "tokens": position}
        line = folder.telemetry(loss=loss, gnorm=abs(gradient), lr=lr, **OPTIMIZER, **place)
        if not line["finite"]:
            raise contract.NotFiniteError(f"step {step}: the loss is {loss}; the update was not applied")
        if rank == 0 and (agreed.save or step % every == 0 or step == steps):
            folder.phase("saving", step)
            contract.save_alone(options, outside, line, {"state.json": json.dumps([w, m])}, world=world)


with contract.leaving_on_faults():  # with the exit code of the error
    options, place = contract.parse(), contract.place_from_environment(os.environ)
    outside = contract.Outside(options, place.rank)  # it handles the signals: before torch is imported
    if place.world > 1:
        import torch

        torch.distributed.init_process_group("gloo")
    train(options, outside, place.rank, place.world)
