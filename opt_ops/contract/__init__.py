"""What a trainer, a node and the supervisor agree on. Standard library only, so that any trainer can import it.

``docs/contract.md`` says what a trainer must and may do, with an example. In the order of use:

- ``options``: what a rank was started with. ``environment``: which rank it is.
- ``outside``, ``signals``, ``fence``, ``drills``: what it hears while it runs.
- ``run_folder``, ``telemetry``, ``phases``: what it reports.
- ``schedule``, ``learning_rate``, ``skip_windows``, ``data_since``: the learning rate and the data of an update.
- ``saving``, ``manifest``, ``files``: how it saves.
- ``membership``, ``replacing``: how ranks of a running attempt are replaced.
- ``errors``, ``exit_codes``, ``leaving``: how it ends.
"""

from opt_ops.contract.data_since import by_step
from opt_ops.contract.environment import Place, place_from_environment
from opt_ops.contract.errors import NotFiniteError, UserError, exit_code
from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.fence import SupersededError
from opt_ops.contract.leaving import leave, leaving_on_faults
from opt_ops.contract.manifest import (
    CheckpointError,
    Manifest,
    commit,
    committed,
    pin,
    read,
    remove,
    step_folder,
    verify,
    write_rank,
)
from opt_ops.contract.options import Options, parse
from opt_ops.contract.outside import Agreed, Outside
from opt_ops.contract.phases import PhaseName
from opt_ops.contract.run_folder import RunFolder, starting_point
from opt_ops.contract.saving import begin_save, header_of, save_alone
from opt_ops.contract.schedule import lr_of
from opt_ops.contract.skip_windows import batch_of, next_sample

DONE = ExitCode.DONE
UNFORESEEN = ExitCode.UNEXPECTED_ERROR
DAMAGED = ExitCode.CHECKPOINT_REFUSED
USER = ExitCode.USER_ERROR
NOT_FINITE = ExitCode.NOT_FINITE
SUPERSEDED = ExitCode.SUPERSEDED
OUT_OF_MEMORY = ExitCode.OUT_OF_MEMORY
CORRUPT_DATA = ExitCode.CORRUPT_DATA
LOSS_SCALE_FLOOR = ExitCode.LOSS_SCALE_FLOOR
PEER_CORRUPT_DATA = ExitCode.PEER_CORRUPT_DATA

__all__ = [
    "CORRUPT_DATA",
    "DAMAGED",
    "DONE",
    "LOSS_SCALE_FLOOR",
    "NOT_FINITE",
    "OUT_OF_MEMORY",
    "PEER_CORRUPT_DATA",
    "SUPERSEDED",
    "UNFORESEEN",
    "USER",
    "Agreed",
    "CheckpointError",
    "ExitCode",
    "Manifest",
    "NotFiniteError",
    "Options",
    "Outside",
    "PhaseName",
    "Place",
    "RunFolder",
    "SupersededError",
    "UserError",
    "batch_of",
    "begin_save",
    "by_step",
    "commit",
    "committed",
    "exit_code",
    "header_of",
    "leave",
    "leaving_on_faults",
    "lr_of",
    "next_sample",
    "parse",
    "pin",
    "place_from_environment",
    "read",
    "remove",
    "save_alone",
    "starting_point",
    "step_folder",
    "verify",
    "write_rank",
]
