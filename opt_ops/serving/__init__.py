"""Serve a checkpoint: an engine in a process group of its own, and a proxy that knows which keys the engine honours."""
