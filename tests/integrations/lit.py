"""Trains a tiny model with Lightning, in the way that ``--set`` says. Run by test_lightning.py."""

from __future__ import annotations

from opt_ops.integrations.lightning import placement, setting, supervise

# isort: split
import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

WHAT = setting("what", "usual")
RATE = setting("rate", "table")
DROPOUT = setting("dropout", 0.2)
STEPS = 12
SCHEDULE = {"kind": "cosine", "peak_lr": 0.02, "warmup_steps": 4, "total_steps": 12, "final_fraction": 0.1}

if "RANK" in os.environ or WHAT == "slurm":
    os.environ["TORCHELASTIC_RUN_ID"] = "a1"  # as the node agent does
if WHAT.startswith("slurm"):
    os.environ |= {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    os.environ |= {"SLURM_NODEID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "n1"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "PATH": f"{Path.cwd()}:{os.environ['PATH']}"}


class Data(Dataset):
    """With noise that is drawn as the samples are read."""

    def __init__(self, samples: int = 64) -> None:
        self._x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self._x[index]
        return x + DROPOUT * torch.randn(4), x.sum().reshape(1)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Data())


class Model(pl.LightningModule):
    def __init__(self, what: object = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = WHAT != "manual"
        hidden = [torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Dropout(DROPOUT)]
        self.layers = torch.nn.Sequential(*hidden, torch.nn.Linear(16, 1))

    def training_step(self, batch, _):
        x, y = batch
        return torch.nn.functional.mse_loss(self.layers(x).float(), y)

    def on_train_batch_end(self, *_):
        self.trainer.seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch, _):
        self.log("held_out", self.global_step * 1.0)  # grows: the plateau scheduler lowers the rate

    def configure_optimizers(self):
        groups = [{"params": self.layers[0].parameters(), "lr": 0.02}, {"params": self.layers[3].parameters()}]
        if RATE == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.01)
        if RATE == "tensor":
            return torch.optim.AdamW(self.parameters(), lr=torch.tensor(0.01), foreach=False, capturable=False)
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        if WHAT == "two":
            return [optimizer, torch.optim.SGD(self.parameters(), lr=1.0)], []
        if RATE == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "held_out"}}
        if RATE == "epoch":
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]
        if RATE == "annealing":  # computes a rate from the last one
            steps = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return optimizer


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 5


def main() -> None:
    pl.seed_everything(1, verbose=False)
    callbacks = {"stop": [Stop()], "usual": [EarlyStopping("held_out", patience=99), ModelCheckpoint()]}
    callbacks["accumulate"] = [GradientAccumulationScheduler({1: 2})]
    scaler = torch.amp.GradScaler("cpu", init_scale=float(setting("scale", 2.0**10)))
    trainer = pl.Trainer(
        **placement(),
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=setting("accumulate", 2),
        gradient_clip_val=1.0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if WHAT == "fp16" else None,
        callbacks=callbacks.get(WHAT, []),
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.seen = []
    batch, every = setting("batch", 4), setting("save", 4)
    supervise(trainer, schedule=SCHEDULE if RATE == "table" else None, checkpoint_every=every, keep=0, tokens=2)
    loader = DataLoader(Data(), batch_size=batch, shuffle=True)
    if WHAT == "endless":
        loader = DataLoader(Endless(), batch_size=batch)
    if WHAT == "replacement":
        loader = DataLoader(Data(), batch_size=batch, sampler=RandomSampler(Data(), replacement=True))
    data = {"many": loader} if WHAT == "many" else loader
    path = "weights.ckpt" if WHAT == "path" else None
    model = Model(what=Stop() if WHAT == "object" else 1)
    trainer.fit(model, data, DataLoader(Data(8), batch_size=2, shuffle=True), ckpt_path=path)
    if WHAT == "usual":
        trainer.validate(model, DataLoader(Data(8), batch_size=2), verbose=False)
        trainer.save_checkpoint("final.ckpt")


if __name__ == "__main__":
    main()
