"""Pre-trains OPT language models with FSDP2 and tensor parallelism; knows nothing of who supervises it."""

__distribution__ = "opt-ops"  # other distributions have a package of this name too: `opt-ops doctor` reads this line
