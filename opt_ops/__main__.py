"""`python -m opt_ops` is `opt-ops`."""

from opt_ops.cli import main

main()
