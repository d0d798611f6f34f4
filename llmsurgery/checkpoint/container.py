"""Write and check sealed containers: safetensors files of our own, with a digest over every byte of them.

The digest stands in the header's metadata. It is computed with its own 64 characters set to zeros, so that a change of
any byte of the file, header included, is found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

from llmsurgery.checkpoint.dtypes import ITEMSIZE
from llmsurgery.checkpoint.header import Header, TensorInfo, read_header
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.errors import DamagedError

SEAL = "sha256"
_BLANK = "0" * 64
_BLOCK = 4 << 20


@dataclass(frozen=True)
class Part:
    """One array of a container.

    Attributes:
        name: Its name, unique in the file.
        dtype: safetensors dtype code.
        shape: Shape.
        chunks: Returns the bytes piece by piece; called once, when the part is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


def write_container(stream: BinaryIO, parts: Sequence[Part], metadata: Mapping[str, str]) -> str:
    """Write a sealed container.

    Args:
        stream: An empty seekable file.
        parts: The arrays.
        metadata: Free text entries; the digest is added to them.

    Returns:
        The digest.

    Raises:
        ValueError: The chunks of a part do not add up to its size.
    """
    header: dict[str, object] = {"__metadata__": {**metadata, SEAL: _BLANK}}
    position = 0
    for part in parts:
        offsets = [position, position + part.nbytes]
        header[part.name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": offsets}
        position += part.nbytes
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    # The metadata come first and the digest last in them; what users can put into them stands before it.
    place = content.index(f'"{SEAL}":"{_BLANK}"}}'.encode()) + len(SEAL) + 4
    prefix = struct.pack("<Q", len(content)) + content
    digest = hashlib.sha256(prefix)
    stream.write(prefix)
    for part in parts:
        written = 0
        for chunk in part.chunks():
            digest.update(chunk)
            stream.write(chunk)
            written += len(chunk)
        if written != part.nbytes:
            raise ValueError(f"part {part.name!r} has {written} bytes, announced were {part.nbytes}")
    seal = digest.hexdigest()
    end = stream.tell()
    stream.seek(8 + place)
    stream.write(seal.encode())
    stream.seek(end)
    return seal


def read_container(path: Path) -> Header:
    """Read the header of a sealed container and check every byte of the file against its seal.

    Args:
        path: The file.

    Raises:
        InputError: It is missing or may not be read.
        DamagedError: It is no container, truncated, or differs from what was written.
    """
    header = read_header(path)
    seal = header.metadata.get(SEAL, "")
    with opened(path) as (descriptor, size):
        start = bytearray(min(header.data_start, size))
        read_into(descriptor, memoryview(start), 0, path)
        sealed = bytes(start).replace(seal.encode(), _BLANK.encode(), 1) if len(seal) == len(_BLANK) else b""
        digest = hashlib.sha256(sealed)
        buffer = memoryview(bytearray(_BLOCK))
        for offset in range(header.data_start, size, _BLOCK):
            piece = buffer[: min(_BLOCK, size - offset)]
            read_into(descriptor, piece, offset, path)
            digest.update(piece)
    if digest.hexdigest() != seal:
        raise DamagedError(
            f"{str(path)!r} is damaged",
            "its bytes differ from those that were written (SHA-256)",
            "fetch or make the file again",
        )
    return header


class PartReader:
    """Reads one array of a container front to back.

    Args:
        info: Its header entry.
    """

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self.position = info.start

    def take(self, count: int) -> bytearray:
        """Return the next bytes, fewer only at the end of the array.

        Args:
            count: How many.

        Raises:
            DamagedError: The file ends too early.
        """
        buffer = bytearray(max(0, min(count, self.info.end - self.position)))
        if buffer:
            with opened(self.info.path) as (descriptor, _):
                read_into(descriptor, memoryview(buffer), self.position, self.info.path)
            self.position += len(buffer)
        return buffer

    @property
    def left(self) -> int:
        """Bytes that were not taken yet."""
        return self.info.end - self.position
