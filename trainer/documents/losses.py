"""The loss of each token of some samples under the weights of a checkpoint, in one process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.convert import native
from trainer.data.samples import Mixture
from trainer.errors import UserError
from trainer.model.opt import OPT

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, slots=True)
class Samples:
    """``count`` samples from ``first`` on, of ``order``. ``at_once`` go through the model together."""

    order: Mixture
    first: int
    count: int
    at_once: int


def losses(checkpoint: Path, samples: Samples, progress: Callable[[str], None]) -> np.ndarray:
    """The loss in nats of each predicted token, without dropout, in fp32: [samples, seq_len].

    Every byte of the checkpoint is verified first. The whole model must fit into the memory of this machine, or of its
    first GPU.

    Raises:
        CheckpointError: the checkpoint is torn or damaged.
        UserError: it does not hold an OPT, or one with too few tokens or positions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress(f"reading {checkpoint}")
    model = _model(checkpoint, device)
    found, shown = [], time.monotonic()
    with torch.inference_mode():
        for done in range(0, samples.count, samples.at_once):
            batch = samples.order.batch(samples.first + done, min(samples.at_once, samples.count - done))
            _require_fits(model, batch, checkpoint)
            inputs, targets = (ids.to(device) for ids in batch)
            logits, _ = model(inputs)
            each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            found.append(each.view_as(targets).cpu().numpy())
            if time.monotonic() - shown >= _SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                progress(f"loss: {done + len(inputs)} of {samples.count} samples")
    return np.concatenate(found)


def _model(checkpoint: Path, device: torch.device) -> OPT:
    weights = native.read(checkpoint)
    with torch.device("meta"):
        model = OPT(weights.config, seed=0)
    model.to_empty(device=device)
    model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            content = weights.entries[name].load()
            parameter.zero_()  # the rows that pad the vocabulary
            parameter[: len(content)].copy_(content)
    return model.eval()


def _require_fits(model: OPT, batch: Sequence[Tensor], checkpoint: Path) -> None:
    config, (inputs, targets) = model.config, batch
    most = int(max(inputs.max(), targets.max()))
    if most >= config.vocab_size or inputs.shape[1] > config.max_positions:
        raise UserError(
            f"{checkpoint} holds a model of {config.vocab_size} tokens and {config.max_positions} positions: it is not "
            f"the model of this data, which has token {most} and sequences of {inputs.shape[1]}."
        )
