"""The command `opt-ops ckpt`."""
