"""The supervisor's options and signals of this process. Import it first of all: it imports no torch.

With the import, the options leave ``sys.argv``, so that a script's own parser works, and the process reacts to signals
as the contract says, also while torch is imported. Without ``--run-dir``, only ``--set`` and ``--recipe`` are taken,
and signals do what Python lets them do.
"""

import sys

from opt_ops.contract.options import Options, take
from opt_ops.contract.signals import Signals

OPTIONS: Options = take()
SIGNALS: Signals | None = Signals() if OPTIONS.supervised else None

if not OPTIONS.supervised:
    sys.argv[1:] = OPTIONS.rest
