"""The bytes that one rank keeps with FSDP2 and tensor parallelism. The policy and the plan both count with them.

P is the number of parameters, t = tp, and S = dp / replicas the ranks that share them. A rank's share is P / (t·S). An
update has its peak at one of these moments:

- **loss**: all layers have kept their activations, and the logits are there.
- **first**: the backward pass of the last layer. The logits are gone. Gradients of this layer and of the output layer
  come in addition.
- **end**: the end of the last backward pass. No activations are left. The gradients of the embeddings come, and then
  they are summed, too.

The gradients of earlier micro-batches are there at all of them. Those of the last one come while activations go.
"""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import ceil

from trainer.model import cost
from trainer.recipes import Recipe

GIB = 2**30

# The share of a GPU's memory for CUDA, NCCL and the fragments of the allocator. An assumption.
OVERHEAD = 0.08

MASTER, MOMENTS, GRADIENT, HALF = 4, 8, 4, 2  # bytes per parameter: fp32, 2 × fp32, fp32, bf16 or fp16


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes of one rank, by what they hold."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """The sum of all."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def on_gpu(
    recipe: Recipe, dp: int, *, reduces_each: bool, keeps_weights: bool, fused: AbstractSet[str] = frozenset()
) -> Needs:
    """What a rank keeps in the memory of its GPU at the peak of an update.

    The buffers are gathered weights, gradients on their way into the sum over ranks, and the logits. Where gathered
    weights are not kept, there are those of two layers, one of them prefetched, and the embeddings, which stay from the
    forward to the backward pass.

    Args:
        recipe: with ``parallel.tp`` and all other settings of the run.
        dp: number of data-parallel ranks.
        reduces_each: see :class:`trainer.parallel.policy.FsdpPolicy`.
        keeps_weights: see :class:`trainer.parallel.policy.FsdpPolicy`.
        fused: the ops that run as kernels (:mod:`trainer.kernels.choice`).
    """
    model, tp, shards = recipe.model, recipe.parallel.tp, dp // recipe.parallel.replicas
    whole = cost.parameters(model) / tp
    layer = cost.layer_parameters(model) / tp
    outside = whole - model.num_layers * layer
    tied = model.padded_vocab_size * model.embedding_width / tp
    share, kept_here = whole / shards, 0 if recipe.parallel.offload else 1
    half = 4 if recipe.precision == "fp32" else HALF
    weights = half * (whole if keeps_weights else 2 * layer + outside)
    several = micro_steps(recipe, dp) > 1
    before = (GRADIENT * share * kept_here if reduces_each else GRADIENT * whole) if several else 0
    kept = activations(recipe, fused)
    tokens = recipe.data.micro_batch * recipe.data.seq_len
    one = tokens * _layer(recipe, fused)
    # One layer's gradients on their way into the sum: its input, and its result if no earlier one takes it up.
    summed = GRADIENT * layer * (1 if several else 1 + 1 / shards)
    in_layer = max(_in_backward(recipe), half * layer - one, summed - keeps_weights * half * layer - one)
    # The gradients of the embeddings come last, and those of the tied matrix from two sides, which are added.
    at_end = share if several and reduces_each else share - outside / shards + (outside if several else 0)
    # Among ranks: what arrives of the next layer's weights, and the sum before, until its exchange is over.
    gathering, summing = (half * layer, GRADIENT * layer) if shards > 1 else (0, 0)
    at_loss = kept - (one if recipe.checkpoint_activations else 0)
    moments = [  # gradients, activations, buffers
        (before, at_loss, weights + gathering + logits(recipe, tokens, fused)),
        (before, kept, weights + gathering + summing + half * tied + in_layer),
        (GRADIENT * at_end * kept_here, 0.0, 2 * half * (outside + tied) + GRADIENT * layer),
        (GRADIENT * share * kept_here, 0.0, GRADIENT * outside),
    ]
    gradients, kept, buffers = max(moments, key=sum)
    return Needs(
        parameters=MASTER * share * kept_here,
        gradients=gradients,
        optimizer=MOMENTS * share * kept_here,
        activations=kept,
        buffers=buffers,
    )


def on_host(recipe: Recipe, dp: int) -> float:
    """Bytes of host memory for one rank: the staging copy of a checkpoint, and with offload all that is kept.

    The staging copy has weights and moments, 12 bytes for each parameter of the share. It is pinned for the life of the
    run (:mod:`trainer.checkpoint.staging`). Of ranks that hold the same share one has it; this counts their mean.
    """
    held = cost.parameters(recipe.model) / recipe.parallel.tp
    offloaded = (MASTER + GRADIENT + MOMENTS) * held * recipe.parallel.replicas / dp if recipe.parallel.offload else 0
    return offloaded + (MASTER + MOMENTS) * held / dp


def micro_steps(recipe: Recipe, dp: int) -> int:
    """Number of micro-batches in an update."""
    return ceil(ceil(recipe.data.global_batch / dp) / recipe.data.micro_batch)


def activations(recipe: Recipe, fused: AbstractSet[str] = frozenset()) -> float:
    """Bytes that the layers keep for the backward pass of one micro-batch.

    Each token and layer keeps 26·d bytes in half precision:

    - two inputs and two outputs of norms: 8·d;
    - queries, keys and values: 6·d;
    - the output of attention: 2·d;
    - the output of ReLU: 8·d;
    - two dropout masks of one byte each: 2·d. The kernel draws them again.

    Tensor and sequence parallelism divide them, all but the gathered outputs of the norms (4·d). With recomputation a
    layer keeps its two inputs, stream and branch (4·d), and one layer at a time has everything. A test compares this
    with what autograd saves.
    """
    model, tokens = recipe.model, recipe.data.micro_batch * recipe.data.seq_len
    layer = _layer(recipe, fused)
    if recipe.checkpoint_activations:
        inputs = (2 if model.norm == "pre" else 1) * _width(recipe) * model.hidden_size / recipe.parallel.tp
        return tokens * (model.num_layers * inputs + layer)
    return tokens * model.num_layers * layer


def _layer(recipe: Recipe, fused: AbstractSet[str]) -> float:
    """Bytes of activations of one token in one layer."""
    masks = 0 if "dropout_add_layer_norm" in fused or not recipe.model.dropout else 2
    halves = _width(recipe) * (10 / recipe.parallel.tp + 2)
    return recipe.model.hidden_size * (halves + masks / recipe.parallel.tp)


def _in_backward(recipe: Recipe) -> float:
    """Bytes of gradients of activations inside of one layer: those at both sides of ReLU, four times as wide."""
    tokens = recipe.data.micro_batch * recipe.data.seq_len
    return _width(recipe) * tokens * 8 * recipe.model.hidden_size / recipe.parallel.tp


def logits(recipe: Recipe, tokens: int, fused: AbstractSet[str] = frozenset()) -> float:
    """Bytes of the output layer on one rank.

    The kernel needs the logits alone: their gradient takes their place. Without it each word and token has fp32
    logarithms of probabilities, their gradient, and the gradient of the logits.
    """
    each = _width(recipe) if "cross_entropy" in fused else 3 * 4
    return tokens * recipe.model.padded_vocab_size / recipe.parallel.tp * each


def _width(recipe: Recipe) -> int:
    """Bytes of one activation."""
    return 4 if recipe.precision == "fp32" else HALF
