"""The command ``python -m trainer.burn_in``: test the arithmetic, the memory and the links of this rank's device.

Start one process per GPU, or a few on a host without GPUs. Each tests its own device and prints the result as a line of
JSON on stdout. Then it makes all-reduces in the groups that lines on stdin name, until stdin ends. docs/formats.md
describes the lines.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]  (no other place)

from trainer import device as device_settings

SEED = 1234
PATTERNS = (0, -1, 0x5555555555555555, -0x5555555555555556)  # all bits clear, all set, and every other bit
DRILLS = ("wrong-gemm", "bad-memory", "slow-link", "hang")


class DeviceUnderTest:
    """The device of this rank, with sizes for which a test takes about a second."""

    def __init__(self, local_rank: int) -> None:
        selected = device_settings.select(local_rank)
        self.cuda = selected.is_gpu
        self.at = selected.torch_device
        self.name = torch.cuda.get_device_name() if self.cuda else "cpu"
        # The uuid, as NVML has it: indices of NVML and CUDA differ where CUDA_VISIBLE_DEVICES is set.
        self.uuid = f"GPU-{torch.cuda.get_device_properties(self.at).uuid}" if self.cuda else None
        self.one = torch.ones(1, device=self.at)
        self.gemm_size = 4096 if self.cuda else 256
        self.link_bytes = (256 if self.cuda else 8) << 20
        self.reduce_bytes = (64 if self.cuda else 1) << 20
        self.memory_bytes = int(torch.cuda.mem_get_info()[0] * 0.8) if self.cuda else 32 << 20

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Seconds of one call: the median of several, after one that is not counted."""
        taken: list[float] = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return median(taken[1:])


def gemm(device: DeviceUnderTest, seconds: float, drill: bool = False) -> dict[str, Any]:
    """Multiply matrices with a known product repeatedly, and compare every bit.

    The elements are whole numbers of at most 8. So every partial sum is a whole number of at most 64 n. In float32 it
    is exact for n up to 2¹⁸, in any order of summation. The first product is checked on the CPU by its row and column
    sums, which are known without a multiplication of matrices. The products that follow are in bfloat16 and must equal
    the first one, rounded.

    Args:
        device: the device to test.
        seconds: how long to multiply.
        drill: whether to inject a wrong element.

    Returns:
        ``repeats``; ``wrong``, the number of wrong elements; ``tflops``, the median.
    """
    size = device.gemm_size
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.randint(-8, 9, (size, size), generator=generator).float() for _ in "ab")
    device_settings.sum_bf16_products_in_fp32()
    product = a.to(device.at) @ b.to(device.at)
    on_host, ones = product.cpu().double(), torch.ones(size, dtype=torch.float64)
    rows = on_host.sum(1) != a.double() @ (b.double() @ ones)
    columns = on_host.sum(0) != (ones @ a.double()) @ b.double()
    wrong = max(int(rows.sum()), int(columns.sum()))
    known, a, b = product.bfloat16(), a.to(device.at).bfloat16(), b.to(device.at).bfloat16()
    differing = torch.zeros((), dtype=torch.int64, device=device.at)
    batch, repeats, taken = (10 if device.cuda else 1), 0, list[float]()
    until = time.monotonic() + seconds
    while repeats == 0 or time.monotonic() < until:
        began = time.perf_counter()
        for _ in range(batch):
            again = a @ b
            if drill and repeats == 0:
                again[0, 0] = torch.nan
            differing += (again != known).sum()
        device.wait()
        taken.append((time.perf_counter() - began) / batch)
        repeats += batch
    return {"repeats": repeats, "wrong": wrong + int(differing), "tflops": 2 * size**3 / median(taken) / 1e12}


def memory(device: DeviceUnderTest, size: int, drill: bool = False) -> dict[str, Any]:
    """Fill memory with patterns, then fill each word with its own address, and read all of it back.

    Args:
        device: the device to test.
        size: number of bytes to test.
        drill: whether to inject a wrong word.

    Returns:
        ``bytes``; ``wrong``, the number of words that changed.
    """
    block = torch.empty(size // 8, dtype=torch.int64, device=device.at)
    part = 1 << 25  # 256 MiB at a time, because the comparison needs memory, too
    wrong = torch.zeros((), dtype=torch.int64, device=device.at)
    for pattern in PATTERNS:
        block.fill_(pattern)
        if drill:
            block[-1] ^= 1
        for words in block.split(part):
            wrong += (words != pattern).sum()
    # All words are written before one is read: a fault in addressing shows as the address of another word.
    for start in range(0, len(block), part):
        block[start : start + part] = _places(block, start, part)
    for start in range(0, len(block), part):
        wrong += (block[start : start + part] != _places(block, start, part)).sum()
    return {"bytes": block.nbytes, "wrong": int(wrong)}


def _places(block: Tensor, start: int, part: int) -> Tensor:
    return torch.arange(start, min(start + part, len(block)), device=block.device)


def host_link(device: DeviceUnderTest) -> dict[str, Any]:
    """Copy between host and device. Without a GPU, copy within the memory of the host.

    Returns:
        ``to_gbs``, ``from_gbs``: GB/s, the median of five; ``wrong``, the number of words that changed.
    """
    words = device.link_bytes // 8
    sent = torch.arange(words, dtype=torch.int64)
    sent = sent.pin_memory() if device.cuda else sent
    there, back = torch.empty_like(sent, device=device.at), torch.empty_like(sent)
    back = back.pin_memory() if device.cuda else back
    to_seconds = device.seconds(lambda: there.copy_(sent, non_blocking=True), 5)
    from_seconds = device.seconds(lambda: back.copy_(there, non_blocking=True), 5)
    rate = device.link_bytes / 1e9
    return {"to_gbs": rate / to_seconds, "from_gbs": rate / from_seconds, "wrong": int((back != sent).sum())}


def all_reduce(device: DeviceUnderTest, group: Any, rank: int, ranks: int, drill: str | None = None) -> dict[str, Any]:
    """All-reduce whole numbers within a group, and check the sum.

    Args:
        device: the device to test.
        group: the process group.
        rank: this rank in the group.
        ranks: number of ranks in the group.
        drill: ``slow-link`` slows each all-reduce down.

    Returns:
        ``gbs``, the bus bandwidth as in NCCL's tests, 2 (n − 1) ÷ n × bytes ÷ seconds. It is the median of several
        all-reduces; without a GPU it is the fastest, because cores are shared. ``wrong``, the number of wrong elements
        in the last sum.
    """
    pattern = torch.arange(device.reduce_bytes // 4, device=device.at) % 251
    mine, buffer = (pattern + rank).float(), torch.empty(device.reduce_bytes // 4, device=device.at)
    taken: list[float] = []
    for _ in range(12 if device.cuda else 30):
        buffer.copy_(mine)
        group.allreduce([device.one]).wait()  # so that all ranks begin together
        device.wait()
        began = time.perf_counter()
        if drill == "slow-link":
            time.sleep(0.05)
        group.allreduce([buffer]).wait()
        device.wait()
        taken.append(time.perf_counter() - began)
    wrong = int((buffer != (pattern * ranks + ranks * (ranks - 1) // 2).float()).sum())
    seconds = median(taken[2:]) if device.cuda else min(taken[2:])
    return {"gbs": 2 * (ranks - 1) / ranks * device.reduce_bytes / seconds / 1e9, "wrong": wrong}


def _group(device: DeviceUnderTest, store: Any, rank: int, ranks: int, timeout: timedelta) -> Any:
    """A group for all-reduce. Not the default one: after a failure, torch would number it differently on each rank."""
    if not device.cuda:
        return dist.ProcessGroupGloo(store, rank, ranks, timeout)  # pyright: ignore[reportPrivateImportUsage]
    options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
    options._timeout = timeout  # noqa: SLF001  (as in torch's own tests)
    return dist.ProcessGroupNCCL(store, rank, ranks, options)  # pyright: ignore[reportPrivateImportUsage]


class BurnInRank:
    """One process of the burn-in: it runs the tests and prints their results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = DeviceUnderTest(options.local_rank)
        self._drill: str | None = options.drill if options.drill_node in (None, options.node) else None
        self._identity = {"node": options.node, "local": options.local_rank}
        # The first rank of a node holds the store where the groups that the node leads meet.
        leads = options.local_rank == 0
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if leads else None  # noqa: S104

    def run(self) -> None:
        """Test the device. Then test links as the lines on stdin say, until stdin ends."""
        self._print("device", self._try(self._test_device))
        for line in sys.stdin:
            order = json.loads(line)
            for group in order["groups"]:
                if self._options.node in group["nodes"]:
                    self._print("group", self._try(partial(self._test_links, group, order)), round=order["round"])

    def _test_device(self) -> dict[str, Any]:
        drill, device = self._drill, self._device
        size = self._options.memory_mib << 20 if self._options.memory_mib else device.memory_bytes
        found = {"memory": memory(device, size, drill == "bad-memory")}
        if device.cuda:
            torch.cuda.empty_cache()
        found["gemm"] = gemm(device, self._options.seconds, drill == "wrong-gemm")
        return found | {"link": host_link(device)}

    def _test_links(self, group: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
        if self._drill == "hang" and len(group["nodes"]) > 1:
            time.sleep(3600)
        per_node, nodes = order["ranks_per_node"], group["nodes"]
        rank, ranks = nodes.index(self._options.node) * per_node + self._options.local_rank, len(nodes) * per_node
        timeout = timedelta(seconds=order["seconds"])
        store = TCPStore(group["address"], group["port"], is_master=False, timeout=timeout)
        prefixed = PrefixStore(f"{order['round']}/{'+'.join(nodes)}", store)
        return all_reduce(self._device, _group(self._device, prefixed, rank, ranks, timeout), rank, ranks, self._drill)

    def _try(self, what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a test. A device that fails is a result, too: the rank continues."""
        try:
            return what()
        except (RuntimeError, OSError, MemoryError) as error:  # torch's own errors are RuntimeErrors
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}

    def _print(self, kind: str, result: dict[str, Any], **more: Any) -> None:
        where = {"address": self._options.host, "port": self._store.port} if self._store is not None else {}
        line = {
            "kind": kind,
            **self._identity,
            "device": self._device.name,
            "uuid": self._device.uuid,
            **where,
            **more,
            **result,
        }
        sys.stdout.write(json.dumps(line) + "\n")  # in one write: under srun, ranks share stdout
        sys.stdout.flush()


def main() -> None:
    """Read the command line, then run the tests."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.burn_in", description="Test the device of this rank, then the links between ranks."
    )
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    parser.add_argument(
        "--node", default=node, help="name of this node (default: $SLURMD_NODENAME, or the host's name)"
    )
    parser.add_argument(
        "--local-rank",
        type=int,
        default=int(os.environ.get("SLURM_LOCALID", "0")),
        help="number of this rank on its node (default: $SLURM_LOCALID, or 0)",
    )
    parser.add_argument("--host", default=socket.gethostname(), help="address of this node for other nodes")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to multiply (default: %(default)s)")
    parser.add_argument(
        "--memory-mib",
        type=int,
        default=0,
        help="how much memory to test (default: 80%% of the free memory of a GPU; 32 without a GPU)",
    )
    parser.add_argument("--drill", choices=DRILLS, help="inject this fault")
    parser.add_argument("--drill-node", help="inject it on this node only")
    # If a communicator fails, this rank must stay alive, because the next round needs it.
    device_settings.raise_communication_errors()
    BurnInRank(parser.parse_args()).run()


if __name__ == "__main__":
    main()
