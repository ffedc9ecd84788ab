"""The trainer's own model with given weights: what other programs' results are compared with."""

import torch

from trainer.convert.weights import Weights
from trainer.model.opt import OPT


def model_of(weights: Weights) -> OPT:
    """Without dropout. Its vocabulary is padded as for training."""
    model = OPT(weights.config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            content = weights.entries[name].load()
            parameter.zero_()
            parameter[: len(content)] = content
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return model
