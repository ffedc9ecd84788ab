"""Pre-trains OPT language models with FSDP2 and tensor parallelism; knows nothing of who supervises it."""
