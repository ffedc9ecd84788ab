"""A small transformer on bytes of text, in plain PyTorch, under opt-ops. Copy it and put your own model into it.

Alone:              python examples/pytorch_loop.py --text some.txt
On two processes:   torchrun --nproc-per-node 2 examples/pytorch_loop.py
Supervised:         docs/adapters.md

What a loop of one's own needs is marked by "opt-ops".
"""

from opt_ops.integrations.pytorch import setting, supervised  # opt-ops: before torch

# isort: split
import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="a text (default: a part of Python)")
arguments = parser.parse_args()

width = setting("width", 64)  # opt-ops: `--set width=128` reaches the script
depth = setting("depth", 2)
block = setting("block", 64)
micro_batches = setting("micro_batches", 1)
batch = setting("batch", 16)
pause = setting("pause", 0.0)  # seconds an update, in place of a larger model's work


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        samples, length, _ = x.shape
        q, k, v = (
            each.view(samples, length, 4, width // 4).transpose(1, 2)
            for each in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(samples, length, width))
        return x + self.feed_forward(self.norm(x))


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(block, width)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x, y):
        """The mean loss over all bytes of ``y``, in nats."""
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), y.flatten())


device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    torch.set_num_threads(1)  # the model is small: more threads would only wait for each other
torch.manual_seed(1)
data = torch.frombuffer(bytearray(arguments.text.read_bytes()), dtype=torch.uint8).long()
model = Model().to(device)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
schedule = {"kind": "cosine", "peak_lr": 3e-3, "warmup_steps": 20, "total_steps": 400, "final_fraction": 0.1}

with supervised(  # opt-ops: loads the checkpoint, if there is one
    model,
    optimizer,
    schedule=schedule,
    steps=400,
    checkpoint_every=50,
    batch=batch,
    tokens=block,
    clip_norm=1.0,
) as run:
    net = DistributedDataParallel(model) if run.world > 1 else model
    for step in run.steps():  # opt-ops: from the update after the checkpoint to the last one
        time.sleep(pause)
        starts = step.data_index(len(data) - block)  # opt-ops: instead of torch.randint(len(data) - block, (batch,))
        for part in starts.chunk(micro_batches):
            windows = torch.stack([data[i : i + block + 1] for i in part.tolist()]).to(device)
            loss = net(windows[:, :-1], windows[:, 1:])
            step.backward(loss / micro_batches)  # opt-ops: instead of loss.backward()
        step.update()  # opt-ops: instead of clipping, setting the learning rate, optimizer.step(), saving
        if run.rank == 0 and step.number % 50 == 0:
            print(f"step {step.number}: loss {step.loss:.3f}", flush=True)
