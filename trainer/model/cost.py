"""What a model costs by its shape alone: weights, and operations per token."""

from trainer.recipes import ModelConfig, Recipe


def parameters(model: ModelConfig) -> int:
    """Weights of the published model, norms and biases included; rows that pad the vocabulary are not."""
    size, width = model.hidden_size, model.embedding_width
    embeddings = model.vocab_size * width + (model.max_positions + 2) * size  # two rows of positions are unused
    projections = 2 * width * size if width != size else 0
    final_norm = 2 * size if model.norm == "pre" else 0
    return embeddings + projections + final_norm + model.num_layers * layer_parameters(model)


def layer_parameters(model: ModelConfig) -> int:
    """Weights of one layer: 12·d² in its six matrices, 9·d in their biases, 4·d in two norms."""
    return 12 * model.hidden_size**2 + 13 * model.hidden_size


def flops_per_token(recipe: Recipe) -> int:
    """Floating-point operations of forward and backward pass per token.

    6 per weight that is multiplied, 12·L·d² + V·d of them (the tied matrix counts once, as output layer; so do
    projections of embeddings), and 6·L·d·T for attention, of which the causal mask leaves half of the full 12·L·d·T.
    Recomputation does not count.
    """
    model = recipe.model
    layers, size, width = model.num_layers, model.hidden_size, model.embedding_width
    weights = 12 * layers * size**2 + model.vocab_size * width + (2 * width * size if width != size else 0)
    return 6 * weights + 6 * layers * size * recipe.data.seq_len
