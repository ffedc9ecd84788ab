"""A reader for torch.distributed.checkpoint that does not run code from a checkpoint's index."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from opt_ops.contract.manifest import CheckpointError

# The classes in an index: names, sizes, types, and which bytes of which file.
_KNOWN = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.serialization": {"_get_layout"},
}


class CheckpointReader(FileSystemReader):
    """Reads checkpoints from untrusted sources. torch reads shards with ``weights_only``, but the index is a pickle."""

    def read_metadata(self, *_args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            CheckpointError: the index calls something that an index does not need, or cannot be read.
        """
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            try:
                metadata = _Index(file).load()
            except pickle.UnpicklingError as error:
                raise CheckpointError(Path(self.path), f".metadata was not read: {error}") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which an index does not need")
        return super().find_class(module, name)
