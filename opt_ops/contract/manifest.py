"""The manifest of a checkpoint: which rank wrote which bytes. The commit marker is written after it.

A folder of shards is a checkpoint only if it has the marker. The supervisor verifies checkpoints with this module and
needs no torch for that.

The order of the writes makes it safe. Each rank hashes the files that it wrote and reports them in ``rank-NNNN.json``.
When all reports are there, rank 0 merges them into ``manifest.json``. Then it writes ``COMMITTED``, which holds the
SHA-256 of the manifest. A crash at any point leaves a folder without marker.

A durable checkpoint, ``step-…``, holds its shards, in subfolders if the trainer writes any. A snapshot,
``snapshot-…``, lies beside it and holds only the manifest. Its shards are on the disks of the nodes that the manifest
names, each on two.

The parts are in ``opt_ops/contract/checkpoint``; here are the names that others use.
"""

from opt_ops.contract.checkpoint.commit import commit, write_rank, written_by
from opt_ops.contract.checkpoint.file_names import require_names
from opt_ops.contract.checkpoint.folders import (
    MANIFEST,
    MARKER,
    CheckpointError,
    CheckpointKind,
    committed,
    earlier,
    folders,
    folders_of,
    pin,
    pinned,
    rank_file,
    remove,
    snapshot_folder,
    step_folder,
    unpin,
)
from opt_ops.contract.checkpoint.manifest_file import VERSION, Manifest, digest, parse
from opt_ops.contract.checkpoint.reading import damage, read, verify
from opt_ops.contract.checkpoint.staleness import all_skipped

__all__ = [
    "MANIFEST",
    "MARKER",
    "VERSION",
    "CheckpointError",
    "CheckpointKind",
    "Manifest",
    "all_skipped",
    "commit",
    "committed",
    "damage",
    "digest",
    "earlier",
    "folders",
    "folders_of",
    "parse",
    "pin",
    "pinned",
    "rank_file",
    "read",
    "remove",
    "require_names",
    "snapshot_folder",
    "step_folder",
    "unpin",
    "verify",
    "write_rank",
    "written_by",
]
