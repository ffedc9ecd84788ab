"""The OPT model as released: a decoder with ReLU, biases and learned positions. OPT-350M has a form of its own."""

import math
from collections.abc import Callable
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.hashing import key
from trainer.kernels.choice import Ops, Setting, choose
from trainer.model.attention import SelfAttention
from trainer.model.dropout import DropoutClock
from trainer.model.fused import BranchEnd, FirstNorm, LinearReLU, ResidualNorm, use
from trainer.recipes import ModelConfig

# The first two rows of the released position tables are not used: fairseq counted positions from the padding id + 1.
POSITION_OFFSET = 2

PADDING_TOKEN = 1


class DecoderLayer(nn.Module):
    """Attention and feed-forward. Each is a residual branch with a layer norm, before it or after the addition.

    Where norms come first, the end of the second branch belongs to the next layer, because it is one op with the norm
    there. So a layer takes and returns the residual stream and a branch that has not been added to it yet.
    """

    def __init__(self, config: ModelConfig, index: int, clock: DropoutClock) -> None:
        super().__init__()
        size, self.norm_first = config.hidden_size, config.norm == "pre"

        def norm(site: int) -> ResidualNorm:
            return ResidualNorm(size, config.dropout, site, clock)

        first = 2 * index - 1 if self.norm_first else 2 * index  # number of the first dropout that is computed here
        self.self_attn_layer_norm = norm(first) if first >= 0 else FirstNorm(size)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = norm(first + 1)
        self.fc1 = LinearReLU(size, 4 * size)
        self.fc2 = BranchEnd(4 * size, size)

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the layer. All are [batch, sequence, hidden].

        Args:
            stream: the residual stream.
            branch: the result of the branch before, without dropout. None for the first layer, and if norms come last.

        Returns:
            The same two for the next layer.
        """
        if self.norm_first:
            stream, x = self.normed(stream, branch)
            stream, x = self.final_layer_norm(stream, self.self_attn(x))
            return stream, self.fc2(self.fc1(x))
        _, x = self.self_attn_layer_norm(stream, self.self_attn(stream))
        _, x = self.final_layer_norm(x, self.fc2(self.fc1(x)))
        return x, None

    def normed(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream at the start of this layer, and what attention gets of it."""
        if not self.norm_first:
            return stream, stream
        return (
            (stream, self.self_attn_layer_norm(stream)) if branch is None else self.self_attn_layer_norm(stream, branch)
        )


class OPT(nn.Module):
    """The decoder with its tied output layer.

    Architecture and initialisation follow metaseq. There is no embedding scale and no dropout on embeddings. All
    weights are drawn from N(0, ``init_std``). For the two projections that write into the residual stream, this is
    divided by √(2 · layers). Biases are zero, and so is the embedding of the padding token. Only the projections of
    embeddings are uniform within ±1/√(inputs), because metaseq's Megatron initialisation does not cover them.

    The embedding matrix has extra rows, so that its size suits the hardware. They are zero, are never predicted and get
    no gradient. Training computes the same with and without them.

    Each parameter is drawn whole, from the seed and its name, before it is sharded. So all layouts start with the same
    weights. On the meta device nothing is drawn at first. Then :meth:`draw` does it part by part, for models that no
    single device can hold.

    Args:
        config: the shape.
        seed: of the weights and of dropout.
        kernels: which ops run as kernels, on this device. An engine chooses again for the device of the model.

    Attributes:
        before_layer: called with each layer and its two inputs, just before the layer runs. No part of the computation.
        ops: what the modules of the model call, and what computes its loss.
    """

    before_layer: Callable[[DecoderLayer, Tensor, Tensor | None], None] | None
    ops: Ops

    def __init__(self, config: ModelConfig, seed: int, kernels: Setting = "auto") -> None:
        super().__init__()
        size, width = config.hidden_size, config.embedding_width
        self.config = config
        self.before_layer = None
        self.clock = DropoutClock(seed=seed)
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, width)
        self.project_in = nn.Linear(width, size, bias=False) if width != size else None
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, self.clock) for i in range(config.num_layers))
        last = 2 * config.num_layers - 1
        pre = config.norm == "pre"
        self.final_layer_norm = ResidualNorm(size, config.dropout, last, self.clock) if pre else None
        self.project_out = nn.Linear(size, width, bias=False) if width != size else None
        self.lm_head = nn.Linear(width, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.use(choose(kernels))
        if not self.lm_head.weight.is_meta:
            for name, parameter in self.named_parameters():
                self._draw(name, parameter)

    def use(self, ops: Ops) -> None:
        """Let the model compute with these ops."""
        self.ops = ops
        use(self, ops)

    def forward(self, tokens: Tensor, *, hide: bool = True) -> tuple[Tensor, Tensor]:
        """Predict the next token at each position.

        Args:
            tokens: ids, [batch, sequence].
            hide: whether the logits of padding are −∞. A loss that knows the vocabulary does not need that copy.

        Returns:
            Logits [batch, sequence, padded vocabulary], and the l2 norm of the last layer's output, summed over this
            rank's tokens. This scalar shows divergence early. With tensor parallelism the logits are a DTensor, sharded
            over the vocabulary. This rank's tokens are then its shard of the sequence.
        """
        self.clock.start(tokens.device)
        if self.training and self.config.attention_dropout:
            clock = self.clock
            torch.manual_seed(key(clock.seed, clock.step, clock.first_sample, clock.first_position))
        x = self.embed_tokens(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        first = self.clock.first_position + POSITION_OFFSET
        stream = x + self.embed_positions(torch.arange(first, first + x.shape[1], device=x.device)[None])
        branch = None
        for layer in self.layers:
            if self.before_layer is not None:
                self.before_layer(cast("DecoderLayer", layer), stream, branch)  # an engine may have wrapped it
            stream, branch = layer(stream, branch)
        x = stream
        if self.final_layer_norm is not None:
            stream, x = self.final_layer_norm(stream, branch)
        activation_norm = torch.linalg.vector_norm(stream.detach(), dim=-1, dtype=torch.float32).sum()
        if self.project_out is not None:
            x = self.project_out(x)
        logits = self.lm_head(x)
        return hide_padding(logits, self.config.vocab_size) if hide else logits, activation_norm

    def draw(self, part: nn.Module, device: torch.device) -> None:
        """Move ``part`` of this model to ``device``. If it has no weights yet, draw the initial ones."""
        if not any(parameter.is_meta for parameter in part.parameters()):
            part.to(device)
            return
        prefix = next(name for name, module in self.named_modules() if module is part)
        part.to_empty(device=device)
        for name, parameter in part.named_parameters():
            self._draw(f"{prefix}.{name}", parameter)
        if part is self.embed_tokens:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.no_grad()
    def _draw(self, name: str, parameter: Tensor) -> None:
        seed = key(self.clock.seed, crc32(name.encode()))
        generator = torch.Generator(parameter.device).manual_seed(seed)
        std, layers = self.config.init_std, self.config.num_layers
        if name.endswith("bias"):
            parameter.zero_()
        elif name.startswith("project_"):
            bound = parameter.shape[1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
        elif name == "embed_tokens.weight":
            parameter[: self.config.vocab_size].normal_(0.0, std, generator=generator)
            parameter[self.config.vocab_size :].zero_()
            parameter[PADDING_TOKEN].zero_()
        elif "layer_norm" in name:
            parameter.fill_(1.0)
        else:
            residual = name.endswith(("out_proj.weight", "fc2.weight"))
            parameter.normal_(0.0, std / math.sqrt(2 * layers) if residual else std, generator=generator)


def hide_padding(logits: Tensor, vocab_size: int) -> Tensor:
    """``logits`` [..., padded vocabulary] with −∞ from ``vocab_size`` on, so that padding has the probability zero.

    A DTensor must be sharded evenly over its last dimension.
    """
    if isinstance(logits, DTensor):
        local, mesh = logits.to_local(), logits.device_mesh
        hidden = hide_padding(local, vocab_size - mesh.get_local_rank() * local.shape[-1])
        return DTensor.from_local(hidden, mesh, logits.placements)
    if logits.shape[-1] <= vocab_size:
        return logits
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocab_size, -math.inf)
