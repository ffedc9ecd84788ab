"""OPT as it was released: a decoder with pre-layer norms, ReLU, biases everywhere and learned positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.dropout import Clock, Dropout
from trainer.recipes import ModelConfig

# The first two rows of the released position tables are unused: fairseq counted positions from the padding id + 1.
POSITION_OFFSET = 2

LAYER_NORM_EPS = 1e-5


class SelfAttention(nn.Module):
    """Causal multi-head attention. The heads may be a tensor-parallel shard: the projections tell their number."""

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

        # The queries are scaled by head_dim^-0.5, which is this function's default.
        attended = F.scaled_dot_product_attention(
            heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), is_causal=True
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each a residual branch behind its own layer norm."""

    def __init__(self, config: ModelConfig, index: int, clock: Clock) -> None:
        super().__init__()
        size = config.hidden_size
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(size, 4 * size)
        self.fc2 = nn.Linear(4 * size, size)
        self.attention_dropout = Dropout(config.dropout, 2 * index, clock)
        self.feed_forward_dropout = Dropout(config.dropout, 2 * index + 1, clock)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, hidden] → the same."""
        x = x + self.attention_dropout(self.self_attn(self.self_attn_layer_norm(x)))
        return x + self.feed_forward_dropout(self.fc2(F.relu(self.fc1(self.final_layer_norm(x)))))


class OPT(nn.Module):
    """The decoder with its tied output layer.

    Architecture and initialisation follow metaseq: no embedding scale, no dropout on embeddings, N(0, ``init_std``) for
    all weights, the two projections that write into the residual stream divided by √(2 · layers), biases zero.

    The weights are drawn from ``seed`` alone, on the CPU, before anything is sharded: all layouts start from the same.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.clock = Clock(seed=seed)
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, self.clock) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(size, eps=LAYER_NORM_EPS)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self._initialise(config, torch.Generator().manual_seed(seed))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next token at each position.

        Args:
            tokens: ids, [batch, sequence].

        Returns:
            Logits [batch, sequence, vocabulary], and the sum over this rank's tokens of the l2 norm of what enters the
            last layer norm: a scalar that shows divergence early. Under tensor parallelism the logits are a DTensor
            sharded over the vocabulary, and this rank's tokens are its shard of the sequence.
        """
        x = self.embed_tokens(tokens)
        first = self.clock.first_position + POSITION_OFFSET
        x = x + self.embed_positions(torch.arange(first, first + x.shape[1], device=x.device)[None])
        for layer in self.layers:
            x = layer(x)
        activation_norm = torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.float32).sum()
        return self.lm_head(self.final_layer_norm(x)), activation_norm

    @torch.no_grad()
    def _initialise(self, config: ModelConfig, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "layer_norm" not in name:
                residual = name.endswith(("out_proj.weight", "fc2.weight"))
                std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
                parameter.normal_(0.0, std, generator=generator)
