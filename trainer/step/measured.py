"""What a step measures, and what follows from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opt_ops.contract.outside import Agreed
from trainer.step.checksums import ChecksumVerdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far the lineage has come.

    Attributes:
        step: updates so far.
        data_position: index of the sample after the last one that was trained on.
        tokens: tokens trained on.
    """

    step: int = 0
    data_position: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """An update with a loss and a gradient norm above both is out of band (:class:`trainer.step.guard.Guard`)."""

    loss: float
    gnorm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMeasurements:
    """What all ranks measured in one forward and backward pass, and what they read of their inputs.

    Attributes:
        loss: mean over the global batch, in nats per token.
        activation_norm: mean over tokens of the l2 norm of what leaves the last layer.
        gnorm: global l2 norm of the gradients of the mean loss, without the loss scale.
        divisor: what the gradients in the parameters are larger by.
        loss_scale: the loss scale of fp16; None in other precisions.
        block_gnorms: norm of the gradients of each block of the model.
        block_pnorms: norm of the parameters of each block; empty in most steps.
        block_unorms: norm of what the update before this step took from each block; empty in most steps.
        attention_logits: the largest of a sample, by layer; empty in most steps.
        outside: the sums of what the ranks have heard.
        save_due: whether a durable checkpoint is due.
        snapshot_due: whether a snapshot is due.
        busy_seconds: by rank; empty where it is not known.
        checksums: by rank; empty in most steps.
        usual: whether the update was queued, and the device found nothing that forbids it: then it is applied already.
    """

    loss: float
    activation_norm: float
    gnorm: float
    divisor: float = 1.0
    loss_scale: float | None = None
    block_gnorms: Mapping[str, float] = field(default_factory=dict)
    block_pnorms: Mapping[str, float] = field(default_factory=dict)
    block_unorms: Mapping[str, float] = field(default_factory=dict)
    attention_logits: Sequence[float] = ()
    outside: Sequence[float] = ()
    save_due: bool = False
    snapshot_due: bool = False
    busy_seconds: Sequence[float] = ()
    checksums: Sequence[Sequence[float]] = ()
    usual: bool = False

    @property
    def finite(self) -> bool:
        """Whether training can continue. In fp16 a lower loss scale answers gradients that overflow."""
        return math.isfinite(self.loss) and (math.isfinite(self.gnorm) or self.loss_scale is not None)

    @property
    def overflow(self) -> bool:
        """Whether the gradients were too large for fp16."""
        return self.loss_scale is not None and not math.isfinite(self.gnorm)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """The result of one step.

    Attributes:
        measured: by all ranks.
        agreed: what all ranks do, of what they have heard.
        progress: after the step.
        skipped: updates skipped so far.
        skip: why this update was skipped, if it was.
        bad_module: the module in which numbers first stopped being finite.
        verdict: the result of a comparison of checksums, in steps that made one.
        fault: the error that ends training, if there is one. Then the update was not applied.
    """

    measured: StepMeasurements
    agreed: Agreed
    progress: Progress
    skipped: int = 0
    skip: str | None = None
    bad_module: str | None = None
    verdict: ChecksumVerdict | None = None
    fault: Exception | None = None
