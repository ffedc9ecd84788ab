"""A cluster in virtual time behind the real ports: nodes, a queue, agents, a trainer, checkpoints, and faults.

The supervisor, the core, the playbooks and the journal run on it unchanged. `World` is the cluster; it survives the
supervisor. `ports.ports` connects one daemon process to it, and `run` drives a supervisor through virtual time. The
same seed gives the same history: nothing here reads a clock or uses a random generator.
"""

from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.costs import Costs, Physics
from opt_ops.laboratory.simulated.drive import run
from opt_ops.laboratory.simulated.world import World

__all__ = ["Costs", "Physics", "World", "faults", "run"]
