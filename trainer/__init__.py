"""Pre-train OPT language models with FSDP2 and tensor parallelism. Runs with or without a supervisor."""

__distribution__ = "opt-ops"  # other distributions also have a package of this name: `opt-ops doctor` reads this line
