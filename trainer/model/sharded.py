"""What a rank holds of a parameter. Layers compute with plain tensors, with tensor parallelism as without."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def own(parameter: Tensor, *, part_of_sequence: bool = False) -> Tensor:
    """This rank's part of ``parameter``, as a plain tensor with its gradient.

    Args:
        parameter: a plain tensor, or a DTensor over the tensor-parallel ranks.
        part_of_sequence: whether it meets only this rank's part of each sequence. Then its gradient is a part of a sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if part_of_sequence else parameter.placements)
