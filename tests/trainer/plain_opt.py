"""A plain OPT: what a careful person writes in an afternoon of PyTorch. Reference of tests, and peer in benchmarks.

It has no part in common with ``trainer/model/opt.py`` but the names of its parameters, which are those of the released
models: attention is one call, dropout is PyTorch's, and the loss comes out of ``forward``, so that ``torch.compile``
sees all of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.recipes import ModelConfig


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q, k, v = (
            f(x).view(batch, length, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, size))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.pre, self.p = config.norm == "pre", config.dropout
        self.self_attn = Attention(size, config.num_heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.self_attn(self.self_attn_layer_norm(x) if self.pre else x)
        x = x + F.dropout(y, self.p, self.training)
        if not self.pre:
            x = self.self_attn_layer_norm(x)
        y = self.fc2(F.relu(self.fc1(self.final_layer_norm(x) if self.pre else x)))
        x = x + F.dropout(y, self.p, self.training)
        return x if self.pre else self.final_layer_norm(x)


class PlainOPT(nn.Module):
    """The decoder with its tied output layer; the vocabulary may have rows that are never predicted."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.embedding_width
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.padded_vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_positions + 2, size)
        self.project_in = nn.Linear(width, size, bias=False) if width != size else nn.Identity()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(size) if config.norm == "pre" else nn.Identity()
        self.project_out = nn.Linear(size, width, bias=False) if width != size else nn.Identity()

    def logits(self, tokens: Tensor) -> Tensor:
        """[batch, sequence] → [batch, sequence, padded vocabulary]."""
        positions = torch.arange(2, 2 + tokens.shape[1], device=tokens.device)
        x = self.project_in(self.embed_tokens(tokens)) + self.embed_positions(positions)
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.project_out(self.final_layer_norm(x)), self.embed_tokens.weight)
        padding = torch.arange(logits.shape[-1], device=tokens.device) >= self.vocab_size
        return logits.masked_fill(padding, float("-inf"))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, in nats."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), targets.flatten())
