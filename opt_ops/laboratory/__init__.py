"""The simulated cluster and the replay. Imported by tests, benchmarks and three commands only."""
