"""What a model costs, from its shape: weights, and operations per token."""

from trainer.recipes import ModelConfig, Recipe


def parameters(model: ModelConfig) -> int:
    """Number of weights with norms and biases, as published. Rows that pad the vocabulary do not count."""
    size, width = model.hidden_size, model.embedding_width
    embeddings = model.vocab_size * width + (model.max_positions + 2) * size  # two rows of positions are unused
    projections = 2 * width * size if width != size else 0
    final_norm = 2 * size if model.norm == "pre" else 0
    return embeddings + projections + final_norm + model.num_layers * layer_parameters(model)


def layer_parameters(model: ModelConfig) -> int:
    """Number of weights of one layer: 12·d² in its six matrices, 9·d in their biases, 4·d in two norms."""
    return 12 * model.hidden_size**2 + 13 * model.hidden_size


def flops_per_token(recipe: Recipe) -> int:
    """Floating-point operations of forward and backward pass per token, without recomputation.

    There are 6 per weight that is multiplied: 12·L·d² + V·d weights, and those that project embeddings. The tied matrix
    counts once, as output layer. Attention needs 6·L·d·T: the causal mask leaves half of the full 12·L·d·T.
    """
    model = recipe.model
    layers, size, width = model.num_layers, model.hidden_size, model.embedding_width
    weights = 12 * layers * size**2 + model.vocab_size * width + (2 * width * size if width != size else 0)
    return 6 * weights + 6 * layers * size * recipe.data.seq_len
