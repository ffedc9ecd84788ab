"""Ports for programs that must be told theirs before they start."""

import random
import socket

# Below the kernel's ephemeral ports, and away from those of the test Slurm and of training (20000 to 32000).
PORTS = range(15000, 20000)

_claims: list[socket.socket] = []


def free_port() -> int:
    """A port that nobody listens on, and that no other process of tests is given while this one lives."""
    for port in random.sample(PORTS, len(PORTS)):
        claim, probe = socket.socket(socket.AF_UNIX), socket.socket()
        with probe:
            try:
                claim.bind(f"\0opt-ops-test-port-{port}")  # the kernel forgets it with this process
                probe.bind(("", port))
            except OSError:
                claim.close()
                continue
        _claims.append(claim)
        return port
    raise OSError(f"all ports from {PORTS.start} to {PORTS.stop} are in use")
