"""The phases of an attempt, as ``phases.jsonl`` names them. A watcher needs them to tell a slow save from a hang."""

from enum import StrEnum


class PhaseName(StrEnum):
    """What rank 0 is doing."""

    START = "start"
    """Reads data and a checkpoint, builds the model, waits for the other ranks."""

    TOKENS = "tokens"
    """Turns text into tokens, or waits for the process that does. Written again while that progresses."""

    TRAINING = "training"
    """Runs updates."""

    EVALUATION = "evaluation"
    """Measures the loss on validation data."""

    SAVING = "saving"
    """Waits for the previous save and copies the state. Training is held up."""

    ENDING = "ending"
    """Waits for the save in flight after the last update."""
