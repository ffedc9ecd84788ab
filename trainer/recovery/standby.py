"""A process that waits for a place in a running attempt, and does beforehand what needs no other rank."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist

from opt_ops.contract.environment import LOCAL_RANK, WORLD_SIZE, Place
from opt_ops.contract.membership import MembersFile, Membership, is_standby, tell_ready
from trainer import device
from trainer.console import print_line
from trainer.data.samples import Mixture
from trainer.parallel import mesh
from trainer.parallel.build import build
from trainer.recipes import Recipe
from trainer.recovery.rejoin import Members
from trainer.step.measured import Progress
from trainer.step.step import forward_backward

_LAYERS = 2  # all layers are alike: what one needs is there for all


def first_membership(file: MembersFile, environment: Mapping[str, str]) -> Membership | None:
    """The membership in which this process starts, if the attempt runs already. None at the launch of the attempt.

    A process that waits for a place gets it later (:func:`wait_for_place`).
    """
    found = file.newer(1)
    return found if found and (is_standby(environment) or found.rank in found.new) else None


def wait_for_place(members: Members) -> Membership:
    """Say that this process is ready, again once a minute, and wait for its place."""
    path = members.file.path
    assert path is not None, "the node agent names it to a process that waits"

    def still_ready() -> None:
        if torch.cuda.is_available() and LOCAL_RANK in os.environ:  # a GPU that has failed must not be counted on
            torch.zeros(1, device="cuda").item()
        try:
            tell_ready(path, os.getpid())
        except OSError as error:  # told again in a minute
            print_line(f"note: this process is ready, but cannot say so: {error}", sys.stderr)

    still_ready()
    return members.wait_for_newer(still_ready)


def warm_up(recipe: Recipe, samples: Mixture, environment: Mapping[str, str]) -> str:
    """Run forward and backward pass of one micro-batch alone, with the shapes of the running attempt.

    The first pass of a process loads code and kernels, starts threads and fills caches. So it is run before the process
    gets a place. The weights are random, of a few layers, and are dropped afterwards.

    Args:
        recipe: of the attempt.
        samples: to train on.
        environment: of this process. It has the number of ranks of the attempt.

    Returns:
        What was done, in one line.
    """
    if recipe.parallel.tp > 1 or recipe.engine != "fsdp2":
        return "no warm-up: tensor-parallel layers need their peers"
    if torch.cuda.is_available() and LOCAL_RANK not in environment:  # any place of the node may need this process
        return "no warm-up: the GPUs of this node are in use"
    model = replace(recipe.model, num_layers=min(_LAYERS, recipe.model.num_layers))
    share = max(1, -(-recipe.data.global_batch // int(environment.get(WORLD_SIZE, "1"))))
    data = replace(recipe.data, global_batch=share, micro_batch=min(recipe.data.micro_batch, share))
    alone = replace(recipe, model=model, data=data, parallel=replace(recipe.parallel, dp=1, replicas=1))
    engine = build(alone, mesh.start(Place(0, 1, int(environment.get(LOCAL_RANK, "0"))), 1, 1))
    shares = forward_backward(engine, samples, alone, Progress())
    engine.update(1.0, 0.0, shares.divisor)
    engine.zero_grad()
    del engine, shares
    dist.destroy_process_group()
    device.collect_garbage(0)  # at its first call this takes long
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return f"warm: one pass over {min(data.micro_batch, share)} sequences, {model.num_layers} layers"
