"""A script for the tests: a hand-written loop on a tiny model. `--fault` says what is wrong with it."""

from opt_ops.integrations.pytorch import setting, start_distributed, supervised

# isort: split
import argparse
import os
import random
import resource
import signal

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from opt_ops.integrations import pytorch

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
fault = parser.parse_args().fault

torch.set_num_threads(1)
torch.manual_seed(1)
sharded, dropout, micro_batches = setting("sharded", False), setting("dropout", 0.1), setting("micro_batches", 1)
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 1))
data = torch.randn(1000, 8, generator=torch.Generator().manual_seed(2))
target = data.sum(1, keepdim=True)
if sharded:
    start_distributed()
    for layer in (model[0], model[3], model):
        fully_shard(layer)
groups = [
    {"params": model[0].parameters(), "lr": 1.0},
    {"params": model[3].parameters(), "lr": 0.5, "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
if fault == "stale":
    optimizer.step = lambda: None
schedule = {"kind": "cosine", "peak_lr": 1e-2, "warmup_steps": 4, "total_steps": 12, "final_fraction": 0.1}
if fault == "killed":
    write = pytorch.write_random

    def killed(path, rank):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, rank)

    pytorch.write_random = killed

with supervised(
    model, optimizer, schedule=schedule, steps=12, checkpoint_every=6, batch=16, tokens=2, clip_norm=1.0
) as run:
    net = DistributedDataParallel(model) if run.world > 1 and not sharded and fault != "not wrapped" else model
    for step in run.steps():
        if fault == "full disk" and run.rank == 1:  # in the first save; the soft limit can be lifted again
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if step.number <= 6 else hard, hard))
        for index in step.data_index(1000).chunk(micro_batches):
            noise = random.random() * dropout
            loss = ((net(data[index]) - target[index]) ** 2).mean() + noise
            step.backward(loss / micro_batches)
        if fault == "no update" and step.number == 3:
            continue
        step.update()
        if fault == "left" and step.number == 3:
            break
