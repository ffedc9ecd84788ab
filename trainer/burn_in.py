"""``python -m trainer.burn_in``: does this rank's device compute, remember and transfer what it should, and how fast?

One process for each GPU, or a few on a machine without. Each tests its own device, says what came of it as a line of
JSON on stdout, and then all-reduces with whomever lines on stdin name, until stdin ends. docs/formats.md has the lines.
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

SEED = 1234
PATTERNS = (0, -1, 0x5555555555555555, -0x5555555555555556)  # all bits clear, all set, and every other one
DRILLS = ("wrong-gemm", "bad-memory", "slow-link", "hang")


class Device:
    """Where this rank computes, with sizes that make a test take about a second."""

    def __init__(self, local_rank: int) -> None:
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        self.at = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.name = torch.cuda.get_device_name() if self.cuda else "cpu"
        # Cards are named as NVML names them: indices differ between the two where CUDA_VISIBLE_DEVICES is set.
        self.uuid = f"GPU-{torch.cuda.get_device_properties(self.at).uuid}" if self.cuda else None
        self.one = torch.ones(1, device=self.at)
        self.gemm_size = 4096 if self.cuda else 256
        self.link_bytes = (256 if self.cuda else 8) << 20
        self.reduce_bytes = (64 if self.cuda else 1) << 20
        self.memory_bytes = int(torch.cuda.mem_get_info()[0] * 0.8) if self.cuda else 32 << 20

    def wait(self) -> None:
        """Until all that was asked of it is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """Of one call, the median of several, after one that is not counted."""
        taken: list[float] = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return median(taken[1:])


def gemm(device: Device, seconds: float, drill: bool = False) -> dict[str, Any]:
    """Multiply matrices whose product is known, again and again, and compare every bit.

    The elements are whole numbers of at most 8, so every partial sum is one of at most 64 n, which float32 holds for
    any n up to 2¹⁸: the product is exact in whatever order it is summed. The first one is checked on the CPU by its row
    and column sums, which are known without multiplying; what follows, in bfloat16, must be that, rounded.

    Returns:
        ``repeats``; ``wrong``, elements that were not as known; ``tflops``, the median.
    """
    size = device.gemm_size
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.randint(-8, 9, (size, size), generator=generator).float() for _ in "ab")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
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


def memory(device: Device, size: int, drill: bool = False) -> dict[str, Any]:
    """Fill memory with patterns, and with each word's own place, and read it back.

    Args:
        device: Whose memory.
        size: How much of it, in bytes.
        drill: Whether to spoil a word.

    Returns:
        ``bytes``; ``wrong``, words that had changed.
    """
    block = torch.empty(size // 8, dtype=torch.int64, device=device.at)
    part = 1 << 25  # 256 MiB at a time: comparing needs room of its own
    wrong = torch.zeros((), dtype=torch.int64, device=device.at)
    for pattern in PATTERNS:
        block.fill_(pattern)
        if drill:
            block[-1] ^= 1
        for words in block.split(part):
            wrong += (words != pattern).sum()
    # All are written before one is read: a fault in addressing shows as another word's place.
    for start in range(0, len(block), part):
        block[start : start + part] = _places(block, start, part)
    for start in range(0, len(block), part):
        wrong += (block[start : start + part] != _places(block, start, part)).sum()
    return {"bytes": block.nbytes, "wrong": int(wrong)}


def _places(block: Tensor, start: int, part: int) -> Tensor:
    return torch.arange(start, min(start + part, len(block)), device=block.device)


def host_link(device: Device) -> dict[str, Any]:
    """Copy between host and device (without a GPU: within memory).

    Returns:
        ``to_gbs``, ``from_gbs``: GB/s, the median of five; ``wrong``, bytes that did not come back as they went.
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


def all_reduce(device: Device, group: Any, rank: int, ranks: int, drill: str | None = None) -> dict[str, Any]:
    """All-reduce whole numbers within a group, and check the sum.

    Returns:
        ``gbs``, the bus bandwidth as NCCL's tests state it, 2 (n − 1) ÷ n × bytes ÷ seconds, by the median of several,
        without a GPU by the fastest, as cores are shared; ``wrong``, elements of the last sum.
    """
    pattern = torch.arange(device.reduce_bytes // 4, device=device.at) % 251
    mine, buffer = (pattern + rank).float(), torch.empty(device.reduce_bytes // 4, device=device.at)
    taken: list[float] = []
    for _ in range(12 if device.cuda else 30):
        buffer.copy_(mine)
        group.allreduce([device.one]).wait()  # all begin together
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


def _meet(device: Device, store: Any, rank: int, ranks: int, patience: timedelta) -> Any:
    """A group for all-reduce. Not the default one: after a failure, torch would count it differently on each rank."""
    if not device.cuda:
        return dist.ProcessGroupGloo(store, rank, ranks, patience)  # pyright: ignore[reportPrivateImportUsage]
    options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
    options._timeout = patience  # noqa: SLF001  (as torch's own tests set it)
    return dist.ProcessGroupNCCL(store, rank, ranks, options)  # pyright: ignore[reportPrivateImportUsage]


class Rank:
    """This process: what it is called, and what it says."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = Device(options.local_rank)
        self._drill: str | None = options.drill if options.drill_node in (None, options.node) else None
        self._me = {"node": options.node, "local": options.local_rank}
        # Whoever is the first of its node keeps the meeting place of the groups that its node leads.
        leads = options.local_rank == 0
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if leads else None  # noqa: S104

    def run(self) -> None:
        """Test the device; then do what stdin says, until it ends."""
        self._say("device", self._try(self._test))
        for line in sys.stdin:
            order = json.loads(line)
            for group in order["groups"]:
                if self._options.node in group["nodes"]:
                    self._say("group", self._try(partial(self._group, group, order)), round=order["round"])

    def _test(self) -> dict[str, Any]:
        drill, device = self._drill, self._device
        size = self._options.memory_mib << 20 if self._options.memory_mib else device.memory_bytes
        found = {"memory": memory(device, size, drill == "bad-memory")}
        if device.cuda:
            torch.cuda.empty_cache()
        found["gemm"] = gemm(device, self._options.seconds, drill == "wrong-gemm")
        return found | {"link": host_link(device)}

    def _group(self, group: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
        if self._drill == "hang" and len(group["nodes"]) > 1:
            time.sleep(3600)
        per_node, nodes = order["ranks_per_node"], group["nodes"]
        rank, ranks = nodes.index(self._options.node) * per_node + self._options.local_rank, len(nodes) * per_node
        patience = timedelta(seconds=order["seconds"])
        store = TCPStore(group["address"], group["port"], is_master=False, timeout=patience)
        prefixed = PrefixStore(f"{order['round']}/{'+'.join(nodes)}", store)
        return all_reduce(self._device, _meet(self._device, prefixed, rank, ranks, patience), rank, ranks, self._drill)

    def _try(self, what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What came of it: a device that fails is a finding, and the rank goes on."""
        try:
            return what()
        except (RuntimeError, OSError, MemoryError) as error:  # torch's own errors are RuntimeErrors
            return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}

    def _say(self, kind: str, what: dict[str, Any], **more: Any) -> None:
        where = {"address": self._options.host, "port": self._store.port} if self._store is not None else {}
        told = {
            "kind": kind,
            **self._me,
            "device": self._device.name,
            "uuid": self._device.uuid,
            **where,
            **more,
            **what,
        }
        sys.stdout.write(json.dumps(told) + "\n")  # at once: under srun, ranks share it
        sys.stdout.flush()


def main() -> None:
    """Read the command line, then run."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.burn_in", description="Test this rank's device, then links."
    )
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    parser.add_argument("--node", default=node, help="default: $SLURMD_NODENAME, or the host's name")
    parser.add_argument("--local-rank", type=int, default=int(os.environ.get("SLURM_LOCALID", "0")))
    parser.add_argument("--host", default=socket.gethostname(), help="where other nodes find this one")
    parser.add_argument("--seconds", type=float, default=3.0, help="of multiplications")
    parser.add_argument("--memory-mib", type=int, default=0, help="to test; default: 80%% of what is free on a GPU, 32")
    parser.add_argument("--drill", choices=DRILLS, help="find a fault that is not there")
    parser.add_argument("--drill-node", help="on this node only")
    # A communicator that failed must raise here, not end the process: the rank is needed for the next round.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    Rank(parser.parse_args()).run()


if __name__ == "__main__":
    main()
