"""A simulated cluster, and replays on it. Only tests, benchmarks and three commands import this."""
