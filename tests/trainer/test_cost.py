import pytest
import torch

from trainer import recipes
from trainer.model import cost
from trainer.model.opt import OPT


# 6 · (12·L·d² + V·d) + 6·L·d·T, in 10⁹ per token.
@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("opt-125m", 0.85), ("opt-350m", 2.28), ("opt-1.3b", 8.47), ("opt-6.7b", 41.5), ("opt-175b", 1062)],
)
def test_operations_per_token_are_those_of_the_published_sizes(name: str, gigaflops: float) -> None:
    assert cost.flops_per_token(recipes.build(name)) / 1e9 == pytest.approx(gigaflops, rel=0.01)


@pytest.mark.parametrize("name", ["opt-tiny", "opt-125m", "opt-350m", "opt-1.3b"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = recipes.build(name).model
    with torch.device("meta"):
        model = OPT(config, seed=1)
    padding = (config.padded_vocab_size - config.vocab_size) * config.embedding_width
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters()) - padding


# The numbers of parameters that the released models have.
@pytest.mark.parametrize(
    ("name", "published"), [("opt-125m", 125_239_296), ("opt-350m", 331_196_416), ("opt-1.3b", 1_315_758_080)]
)
def test_parameters_are_those_of_the_released_models(name: str, published: int) -> None:
    assert cost.parameters(recipes.build(name).model) == published
