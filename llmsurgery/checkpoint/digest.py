"""SHA-256 of tensors and files, in bounded memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmsurgery.checkpoint.reader import opened, read_into

_BLOCK = 1 << 20


def _digest(descriptor: int, start: int, end: int, path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_BLOCK, max(0, end - start))))
    for offset in range(start, end, _BLOCK):
        piece = buffer[: min(_BLOCK, end - offset)]
        read_into(descriptor, piece, offset, path)
        digest.update(piece)
    return digest.hexdigest()


def tensor_digest(path: Path | str, start: int, end: int) -> str:
    """Return the SHA-256 of a byte range of a file, as a hexadecimal text.

    Args:
        path: The file.
        start: First byte.
        end: One past the last byte.

    Raises:
        InputError: The file is missing or may not be read.
        DamagedError: The file ends before the range does.
    """
    path = Path(path)
    with opened(path) as (descriptor, _):
        return _digest(descriptor, start, end, path)


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a whole file, as a hexadecimal text.

    Args:
        path: The file.

    Raises:
        InputError: The file is missing or may not be read.
        DamagedError: It is not a regular file, or shrinks while it is read.
    """
    path = Path(path)
    with opened(path) as (descriptor, size):
        return _digest(descriptor, 0, size, path)
