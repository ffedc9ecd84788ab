"""A cluster in virtual time behind the real ports: nodes, a queue, agents, a trainer, checkpoints, and what goes wrong.

The supervisor, the core, the playbooks and the journal run on it unchanged and know nothing of it. `World` is the
cluster; it lives on when a supervisor dies. `World.ports` gives one life of the daemon its hands and eyes, and `run`
drives a supervisor through virtual time. One seed, one history: nothing here reads a clock or draws a random number.
"""

from opt_ops.laboratory.simulated import faults
from opt_ops.laboratory.simulated.costs import Costs, Physics
from opt_ops.laboratory.simulated.drive import run
from opt_ops.laboratory.simulated.world import World

__all__ = ["Costs", "Physics", "World", "faults", "run"]
