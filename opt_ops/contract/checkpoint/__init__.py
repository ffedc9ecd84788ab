"""Checkpoints: folders, names of files, manifest, commit, verification. ``opt_ops.contract.manifest`` has all names."""
