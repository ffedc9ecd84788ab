"""The OPT model as released: a decoder with ReLU, biases and learned positions. OPT-350M has a form of its own."""

import math
from collections.abc import Callable
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.hashing import key
from trainer.model.dropout import Dropout, DropoutClock
from trainer.recipes import ModelConfig

# The first two rows of the released position tables are not used: fairseq counted positions from the padding id + 1.
POSITION_OFFSET = 2

LAYER_NORM_EPS = 1e-5

PADDING_TOKEN = 1


class SelfAttention(nn.Module):
    """Causal multi-head attention. The heads may be a tensor-parallel shard; their number follows from projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.head_dim = size // config.num_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] → the same."""

        def heads(y: Tensor) -> Tensor:  # [batch, heads, sequence, head_dim]
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        # This function scales the queries by head_dim^-0.5 by default.
        attended = F.scaled_dot_product_attention(
            heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), is_causal=True
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Attention and feed-forward. Each is a residual branch with a layer norm, before it or after the addition."""

    def __init__(self, config: ModelConfig, index: int, clock: DropoutClock) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm_first = config.norm == "pre"
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)
        self.attention_dropout = Dropout(config.dropout, 2 * index, clock)
        self.feed_forward_dropout = Dropout(config.dropout, 2 * index + 1, clock)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] → the same."""
        if self.norm_first:
            x = x + self.attention_dropout(self.self_attn(self.self_attn_layer_norm(x)))
            return x + self.feed_forward_dropout(self.fc2(F.relu(self.fc1(self.final_layer_norm(x)))))
        x = self.self_attn_layer_norm(x + self.attention_dropout(self.self_attn(x)))
        return self.final_layer_norm(x + self.feed_forward_dropout(self.fc2(F.relu(self.fc1(x)))))


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

    Attributes:
        before_layer: called with each layer and its input, just before the layer runs. No part of the computation.
    """

    before_layer: Callable[[DecoderLayer, Tensor], None] | None

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.embedding_width
        self.config = config
        self.before_layer = None
        self.clock = DropoutClock(seed=seed)
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, width)
        self.project_in = nn.Linear(width, size, bias=False) if width != size else None
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, self.clock) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS) if config.norm == "pre" else None
        self.project_out = nn.Linear(size, width, bias=False) if width != size else None
        self.lm_head = nn.Linear(width, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            for name, parameter in self.named_parameters():
                self._draw(name, parameter)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next token at each position.

        Args:
            tokens: ids, [batch, sequence].

        Returns:
            Logits [batch, sequence, padded vocabulary], and the l2 norm of the last layer's output, summed over this
            rank's tokens. This scalar shows divergence early. With tensor parallelism the logits are a DTensor, sharded
            over the vocabulary. This rank's tokens are then its shard of the sequence.
        """
        self.clock.start(tokens.device)
        x = self.embed_tokens(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        first = self.clock.first_position + POSITION_OFFSET
        x = x + self.embed_positions(torch.arange(first, first + x.shape[1], device=x.device)[None])
        for layer in self.layers:
            if self.before_layer is not None:
                assert isinstance(layer, DecoderLayer)
                self.before_layer(layer, x)
            x = layer(x)
        activation_norm = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32).sum()
        if self.final_layer_norm is not None:
            x = self.final_layer_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return hide_padding(self.lm_head(x), self.config.vocab_size), activation_norm

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
