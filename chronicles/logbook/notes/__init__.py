"""Notes that people send each other: the progress note at a share of the work, and the handover to the next shift."""
