"""The tests of a device: right on a good one, and every planted fault is counted."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from trainer import burn_in
from trainer.burn_in import DeviceUnderTest


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> DeviceUnderTest:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return DeviceUnderTest(0)


def test_products_of_whole_numbers_are_exact_and_repeat_bit_by_bit(
    device: DeviceUnderTest, monkeypatch: pytest.MonkeyPatch
):
    ticks = itertools.count()  # of a clock that does not depend on how busy this machine is
    clock = SimpleNamespace(monotonic=lambda: 0.01 * next(ticks), perf_counter=time.perf_counter)
    monkeypatch.setattr(burn_in, "time", clock)
    said = burn_in.gemm(device, 0.1)
    assert said["wrong"] == 0
    assert said["repeats"] > 1
    assert said["tflops"] > 0


def test_one_wrong_element_in_one_repetition_is_counted(device: DeviceUnderTest):
    assert burn_in.gemm(device, 0.1, drill=True)["wrong"] == 1


def test_a_first_product_that_is_wrong_is_not_taken_for_the_known_one(
    device: DeviceUnderTest, monkeypatch: pytest.MonkeyPatch
):
    right = torch.Tensor.__matmul__

    def spoiled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = right(a, b)
        if product.dim() == 2 and product.dtype == torch.float32:
            product[3, 4] += 1  # the same fault every time: repetition alone would not show it
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", spoiled)
    assert burn_in.gemm(device, 0.05)["wrong"] >= 1


def test_memory_gives_back_patterns_and_places(device: DeviceUnderTest):
    assert burn_in.memory(device, 1 << 20) == {"bytes": 1 << 20, "wrong": 0}
    assert burn_in.memory(device, 1 << 20, drill=True)["wrong"] == len(burn_in.PATTERNS)


def test_what_is_copied_comes_back(device: DeviceUnderTest):
    said = burn_in.host_link(device)
    assert said["wrong"] == 0
    assert min(said["to_gbs"], said["from_gbs"]) > 0
