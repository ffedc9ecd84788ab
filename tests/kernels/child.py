"""The process that :mod:`tests.kernels.harness` starts: ``python -m tests.kernels.child MODULE FILE_DESCRIPTOR``."""

import sys
from multiprocessing.connection import Connection

from tests.kernels.harness import serve

serve(sys.argv[1], Connection(int(sys.argv[2])))
