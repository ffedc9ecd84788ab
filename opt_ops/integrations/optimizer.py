"""The settings of a live optimizer: set before every update, and read back for telemetry."""

from collections.abc import Sequence
from typing import Any

import torch


class LiveOptimizer:
    """Sets what each update must use, whatever a checkpoint or a scheduler has left in the optimizer.

    A checkpoint brings back the learning rate, betas and weight decay of the time when it was saved. With them, a
    rollback would train with the rate that it should have lowered.

    Groups may differ: a group keeps its ratio to the largest learning rate, and a group without weight decay stays
    without.

    Args:
        optimizer: before a checkpoint is loaded into it.
        betas: of all groups; an empty sequence where the optimizer has none.
        weight_decay: of the groups that have any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, betas: Sequence[float], weight_decay: float) -> None:
        self._optimizer = optimizer
        self._betas = tuple(betas)
        self._weight_decay = weight_decay
        # A scheduler that was made before this keeps the rate of each group there: in a warm-up, `lr` itself is 0.
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        largest = max(rates) or 1.0
        self._ratios = [rate / largest if max(rates) else 1.0 for rate in rates]
        self._decays = [bool(group.get("weight_decay")) for group in optimizer.param_groups]

    def set(self, lr: float) -> None:
        """Set the learning rate of the next update, and the other settings."""
        for group, ratio, decays in zip(self._optimizer.param_groups, self._ratios, self._decays, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
            if "betas" in group and self._betas:
                group["betas"] = self._betas
            if "weight_decay" in group:
                group["weight_decay"] = self._weight_decay if decays else 0.0

    def readback(self) -> dict[str, Any]:
        """``lr``, ``betas`` and ``weight_decay``, as the optimizer has them: of the group with the largest rate."""
        groups = self._optimizer.param_groups
        group = groups[self._ratios.index(max(self._ratios))]
        return {
            "lr": float(group["lr"]),
            "betas": [float(beta) for beta in group.get("betas", ())],
            "weight_decay": max(float(each.get("weight_decay", 0.0)) for each in groups),
        }
