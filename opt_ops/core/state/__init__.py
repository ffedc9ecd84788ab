"""A lineage's state, which the journal's events are folded into, and the questions that are asked of it."""
