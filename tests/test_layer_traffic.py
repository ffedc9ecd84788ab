"""What a layer moves, counted: the goals of the fused ops, and that the count itself is right."""

import pytest
import torch

from benchmarks import layer_traffic
from benchmarks.layer_traffic import Count


def test_the_count_is_that_of_operations_whose_traffic_is_known() -> None:
    with torch.device("meta"):
        x, weight = torch.empty(4, 8), torch.empty(16, 8)
        with Count() as one:
            x.add(x).relu_()
        with Count() as products:
            (x @ weight.t()).view(2, 32)
        with Count() as broadcast:
            x.mul(x[:1].expand(4, 8))
    assert (one.bytes, one.kernels) == (4 * 32 * (2 + 1 + 1 + 1), 2)
    assert (products.bytes, products.kernels) == (0, 1), "the bytes of products do not count, and views cost nothing"
    assert broadcast.bytes == 4 * (32 + 8 + 32), "what is expanded is read once"


def test_a_layer_with_kernels_moves_what_it_must_and_no_more() -> None:
    forward, backward = layer_traffic.layer("ours, kernels=on")
    assert forward.widths <= 20
    assert forward.kernels <= 14
    assert backward.widths <= 36


@pytest.mark.parametrize("peer", ["plain OPT", "Hugging Face"])
def test_it_moves_less_than_its_peers(peer: str) -> None:
    (our_forward, our_backward), (forward, backward) = (
        layer_traffic.layer(name) for name in ("ours, kernels=on", peer)
    )
    assert our_forward.widths < forward.widths
    assert our_forward.kernels < forward.kernels
    assert our_backward.widths < backward.widths
