"""The supervisor's eyes: what came through the ports since the last look, as events.

Each watcher has `observe(state)`, which yields observations and decides nothing. Silences are measured on this
life's own monotonic clock from the moment it began to watch: what happened before is unknown, not silence.
"""
