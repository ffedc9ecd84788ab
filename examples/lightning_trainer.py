"""Trains a small model with Lightning. Two lines make opt-ops supervise it: the import and the call.

python examples/lightning_trainer.py                # alone, as any script
opt-ops run start tiny --set steps=400 --nodes 2    # with this command in [trainer] of opt-ops.toml
"""

from opt_ops.integrations.lightning import (
    placement,
    setting,
    supervise,
)  # before Lightning: it handles signals

import time

import lightning.pytorch as pl
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

STEPS = 400
PAUSE = setting("pause", 0.0)  # seconds an update, in place of a larger model's work
SCHEDULE = {"kind": "cosine", "peak_lr": 3e-3, "total_steps": STEPS, "delay": 1}  # what the model's scheduler does


class Model(pl.LightningModule):
    """Learns a function of 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def training_step(self, batch, _):
        """The loss of a batch."""
        time.sleep(PAUSE)
        numbers, wanted = batch
        return functional.mse_loss(self.layers(numbers), wanted)

    def configure_optimizers(self):
        """AdamW; the rate falls by a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    """Train."""
    pl.seed_everything(1, verbose=False)
    numbers = torch.randn(4096, 16)
    data = TensorDataset(numbers, torch.sin(numbers.sum(1, keepdim=True)))
    trainer = pl.Trainer(
        **placement(),
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    supervise(trainer, schedule=SCHEDULE, checkpoint_every=50)
    trainer.fit(Model(), DataLoader(data, batch_size=16, shuffle=True))


if __name__ == "__main__":
    main()
