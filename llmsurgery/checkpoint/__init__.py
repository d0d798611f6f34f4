"""The byte layer: read safetensors checkpoints and publish edited copies; it knows nothing of models."""

from llmsurgery.checkpoint.clone import clone_file
from llmsurgery.checkpoint.digest import file_digest, tensor_digest
from llmsurgery.checkpoint.dtypes import FLOAT, ITEMSIZE, decode, encode, storage_dtype
from llmsurgery.checkpoint.header import Header, TensorInfo, read_header
from llmsurgery.checkpoint.index import Checkpoint, require_finite
from llmsurgery.checkpoint.writer import Publication

__all__ = [
    "FLOAT",
    "ITEMSIZE",
    "Checkpoint",
    "Header",
    "Publication",
    "TensorInfo",
    "clone_file",
    "decode",
    "encode",
    "file_digest",
    "read_header",
    "require_finite",
    "storage_dtype",
    "tensor_digest",
]
