"""The largest attention logits of a sample. Where training becomes unstable, they grow before the loss tells."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model.opt import DecoderLayer
from trainer.model.sharded import own
from trainer.parallel.engine import Engine

ROWS = 8  # queries of the sample, spread evenly over the sequence; the last one attends to all of it


@contextmanager
def sampling(engine: Engine, *, wanted: bool) -> Iterator[list[Tensor]]:
    """While this lasts, take a sample in each forward pass: from its first sequence, before each layer.

    The forward pass itself is not touched, compiled or not: the sample repeats the little that it needs of it.

    Args:
        engine: the model. All ranks of a tensor-parallel group must do the same.
        wanted: with False nothing is sampled.

    Yields:
        A list that receives a scalar for each layer: the largest of the logits of this rank's heads.
    """
    found: list[Tensor] = []

    def sample(layer: DecoderLayer, stream: Tensor, branch: Tensor | None) -> None:
        engine.gather(layer)  # the layer would do it next in any case
        found.append(_largest_logit(engine, layer, stream[:1], None if branch is None else branch[:1]))

    engine.model.before_layer = sample if wanted else None
    try:
        yield found
    finally:
        engine.model.before_layer = None


@torch.no_grad()
def _largest_logit(engine: Engine, layer: DecoderLayer, stream: Tensor, branch: Tensor | None) -> Tensor:
    """The largest logit of some queries of one sequence with all keys that the causal mask lets them see.

    Queries go back through the weights of the keys, to be multiplied with the hidden states. With few queries this is
    much cheaper than to compute the keys: by a factor of about head_dim / ``ROWS``.

    Args:
        engine: gathers the sequence.
        layer: with its gathered weights, or this rank's heads of them.
        stream: its input, of one sequence.
        branch: its second input.
    """
    attention = layer.self_attn
    hidden = engine.whole_sequence(layer.normed(stream, branch)[1])[0]
    rows = (torch.arange(1, ROWS + 1, device=hidden.device) * len(hidden) // ROWS - 1).clamp(min=0)
    queries = F.linear(hidden[rows], own(attention.q_proj.weight), own(attention.q_proj.bias))
    queries = queries.unflatten(-1, (-1, attention.head_dim)) * attention.head_dim**-0.5
    # r: queries, h: heads, e: channels of a head, d: channels of the hidden state, s: positions of the keys
    key_weight = own(attention.k_proj.weight).unflatten(0, (-1, attention.head_dim))
    key_bias = own(attention.k_proj.bias).unflatten(0, (-1, attention.head_dim))
    back = torch.einsum("rhe,hed->rhd", queries, key_weight)
    # In fp32, because a logit may be too large for fp16.
    logits = torch.einsum("rhd,sd->rhs", back.float(), hidden.float())
    logits += torch.einsum("rhe,he->rh", queries.float(), key_bias.float())[..., None]
    hidden_from = torch.arange(len(hidden), device=hidden.device) > rows[:, None]
    return logits.masked_fill(hidden_from[:, None], -torch.inf).amax()
