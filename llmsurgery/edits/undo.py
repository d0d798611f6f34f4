"""Undo data: how to get the source back from a result, bit for bit, kept beside the result and apart from any patch.

One file: magic, compressed pieces, a JSON index, its length and SHA-256, magic again. A piece holds the rows of one
changed block. Stored entries are mapped to integers in the order of the numbers they stand for; the difference of old
and new, which is small where a weight moved a little, is folded to non-negative numbers and split into byte planes,
which Zstandard then compresses. The map is a bijection on bit patterns, so that every old byte comes back.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint.carry import permission_bits
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.delta import side_digests
from llmsurgery.edits.write import Stored, TensorChange
from llmsurgery.errors import DamagedError, InputError

if TYPE_CHECKING:
    import zstandard

NAME = ".llmsurgery/undo.bin"
FORMAT = 1
_MAGIC = b"LSUNDO\0\1"
_TAIL = struct.Struct("<Q32s8s")
_PIECE_BYTES = 4 << 20
_LARGEST_INDEX = 1 << 30

Bits = npt.NDArray[Any]


def _ordered(bits: Bits) -> Bits:
    """Map bit patterns of floats to integers in the order of their values; it undoes itself with `_unordered`."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits ^ top)


def _unordered(keys: Bits) -> Bits:
    top = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    return np.where(keys & top, keys ^ top, ~keys)


def _planes(old: Stored, new: Stored) -> bytes:
    first, second = (array.reshape(-1).view(f"<u{array.itemsize}") for array in (old, new))
    with np.errstate(over="ignore"):
        steps = _ordered(first) - _ordered(second)
        last = steps.dtype.type(8 * steps.itemsize - 1)
        folded = (steps << steps.dtype.type(1)) ^ (steps.dtype.type(0) - (steps >> last))
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, folded.itemsize).T).tobytes()


def _restore(planes: bytes, new: Stored) -> Stored:
    second = new.reshape(-1).view(f"<u{new.itemsize}")
    columns = np.frombuffer(planes, dtype=np.uint8).reshape(new.itemsize, -1).T
    folded = np.ascontiguousarray(columns).reshape(-1).view(second.dtype)
    one = folded.dtype.type(1)
    with np.errstate(over="ignore"):
        steps = (folded >> one) ^ (folded.dtype.type(0) - (folded & one))
        keys = _ordered(second) + steps
    return _unordered(keys).astype(second.dtype, copy=False).view(new.dtype).reshape(new.shape)


def _compressor() -> zstandard.ZstdCompressor:
    import zstandard

    return zstandard.ZstdCompressor(level=1)


class UndoWriter:
    """Collects undo data while a result is written.

    Args:
        stream: The empty file, open for writing.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.offset = stream.write(_MAGIC)
        self.blocks: dict[str, list[list[int]]] = {}
        self.files: list[dict[str, object]] = []
        self._compressor = _compressor()

    def add_rows(self, name: str, start: int, raw: Stored, result: Stored) -> None:
        """Keep the old rows of a block; rows that did not change cost nothing. Usable as a sink of the writer."""
        if not raw.ndim:
            self._add_piece(name, start, 1, raw, result)
            return
        step = max(1, _PIECE_BYTES // max(1, raw.nbytes // max(1, raw.shape[0])))
        for first in range(0, raw.shape[0], step):
            old, new = raw[first : first + step], result[first : first + step]
            if not np.array_equal(old.view(f"<u{old.itemsize}"), new.view(f"<u{new.itemsize}")):
                self._add_piece(name, start + first, old.shape[0], old, new)

    def _add_piece(self, name: str, start: int, rows: int, old: Stored, new: Stored) -> None:
        content = self._compressor.compress(_planes(np.ascontiguousarray(old), np.ascontiguousarray(new)))
        self.blocks.setdefault(name, []).append([start, rows, *self._write(content)])

    def _write(self, content: bytes) -> list[int]:
        """Write a piece and return where it lies: offset, length, CRC-32."""
        place = [self.offset, len(content), zlib.crc32(content)]
        self.offset += self.stream.write(content)
        return place

    def add_file(self, path: str, source: Path | None) -> None:
        """Keep a side file as it was before the run.

        Args:
            path: Its relative name.
            source: The file in the source, or None if it was not there.
        """
        if source is None:
            self.files.append({"path": path, "content": None})
            return
        content = source.read_bytes()
        place = self._write(self._compressor.compress(content))
        self.files.append({"path": path, "content": place, "bytes": len(content), "mode": permission_bits(source)})

    def finish(self, changes: Iterable[TensorChange], left_out: Iterable[str], beside: Mapping[str, str]) -> int:
        """Write the index.

        Args:
            changes: What the writer recorded.
            left_out: Files of the source that were not carried over into the result.
            beside: SHA-256 of the result's side files by name.

        Returns:
            Bytes of the whole file.
        """
        tensors = {
            change.name: {
                "dtype": change.dtype,
                "shape": list(change.shape),
                "before": change.sha256_before,
                "after": change.sha256_after,
                "blocks": self.blocks.get(change.name, []),
            }
            for change in changes
            if change.changed
        }
        document = {
            "format": FORMAT,
            "tensors": tensors,
            "files": self.files,
            "beside": dict(beside),
            "left_out": sorted(left_out),
        }
        index = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        tail = _TAIL.pack(len(index), hashlib.sha256(index).digest(), _MAGIC)
        return self.offset + self.stream.write(index) + self.stream.write(tail)


def _damaged(path: Path, why: str) -> DamagedError:
    return DamagedError(
        f"the undo data {str(path)!r} are damaged",
        why,
        "restore the directory from a copy; the source is the other way",
    )


@dataclass(frozen=True)
class OldFile:
    """A side file as it was in the source.

    Attributes:
        path: Relative name.
        content: Its bytes, None if it was not there.
        mode: Permission bits.
    """

    path: str
    content: bytes | None
    mode: int = 0o644


@dataclass(frozen=True)
class Undo:
    """Undo data whose index has been checked.

    Attributes:
        path: The file.
        tensors: Index entry of every changed tensor.
        beside: SHA-256 of the result's side files by name.
        left_out: Files of the source that the result does not have.
    """

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    beside: Mapping[str, str]
    left_out: tuple[str, ...]
    _files: list[dict[str, Any]] = field(repr=False)
    _end: int = 0

    def piece(self, place: Sequence[int], size: int) -> bytes:
        """Decompress one piece that must have a known size.

        Args:
            place: Offset, length and CRC-32.
            size: Bytes of the content.

        Raises:
            DamagedError: It has not.
        """
        import zstandard

        offset, length, checksum = place
        if not len(_MAGIC) <= offset <= offset + length <= self._end:
            raise _damaged(self.path, "a piece lies outside of the file")
        packed = bytearray(length)
        with opened(self.path) as (descriptor, _):
            read_into(descriptor, memoryview(packed), offset, self.path)
        # The compressed bytes themselves: some flips in them would not show in what they decompress to.
        if zlib.crc32(packed) != checksum:
            raise _damaged(self.path, f"the piece at byte {offset} has another checksum")
        try:
            # Checked first: a damaged frame must not decide how much memory is taken.
            if zstandard.frame_content_size(bytes(packed)) != size:
                raise _damaged(self.path, f"the piece at byte {offset} has another size than its index says")
            return zstandard.ZstdDecompressor().decompress(bytes(packed), max_output_size=size)
        except zstandard.ZstdError as error:
            raise _damaged(self.path, f"the piece at byte {offset} cannot be decompressed: {error}") from error

    def old_rows(self, new: Stored, place: Sequence[int]) -> Stored:
        """Return the old rows of one piece from the new ones."""
        return _restore(self.piece(place, new.nbytes), new)

    def files(self) -> list[OldFile]:
        """Return the side files as they were.

        Raises:
            DamagedError: A content is damaged.
        """
        result = []
        for entry in self._files:
            name, place = inside_name(entry["path"], "the undo data"), entry["content"]
            if place is None:
                result.append(OldFile(name, None))
            else:
                result.append(OldFile(name, self.piece(place, entry["bytes"]), int(entry["mode"])))
        return result


def read_undo(root: Path) -> Undo:
    """Open the undo data of a result.

    Args:
        root: The result's directory.

    Raises:
        InputError: There are none.
        DamagedError: They are damaged.
    """
    path = root / NAME
    if not path.is_file():
        raise InputError(
            f"there is nothing to revert in {str(root)!r}",
            f"it holds no undo data ({NAME}): it was made with --no-undo, or not by llmsurgery",
            "use the source itself, or the result of a run without --no-undo",
        )
    with opened(path) as (descriptor, size):
        if size < len(_MAGIC) + _TAIL.size:
            raise _damaged(path, "the file is truncated")
        head, tail = bytearray(len(_MAGIC)), bytearray(_TAIL.size)
        read_into(descriptor, memoryview(head), 0, path)
        read_into(descriptor, memoryview(tail), size - _TAIL.size, path)
        length, digest, magic = _TAIL.unpack(tail)
        end = size - _TAIL.size - length
        if magic != _MAGIC or head != _MAGIC or length > _LARGEST_INDEX or end < len(_MAGIC):
            raise _damaged(path, "its ends are not those of undo data: it is truncated or of another version")
        index = bytearray(length)
        read_into(descriptor, memoryview(index), end, path)
    if hashlib.sha256(index).digest() != digest:
        raise _damaged(path, "its index has another SHA-256")
    document = json.loads(index)
    return Undo(path, document["tensors"], document["beside"], tuple(document["left_out"]), document["files"], end)


def check_fit(undo: Undo, result: Checkpoint) -> None:
    """Refuse a result that is not the one that the undo data were made for, as far as small files and headers show it.

    Raises:
        DamagedError: A tensor is missing or of another dtype or shape, or a side file was changed.
    """
    changed = None
    for name, entry in undo.tensors.items():
        info = result.info(name)
        if (info.dtype, list(info.shape)) != (entry["dtype"], entry["shape"]):
            changed = f"tensor {name!r} has another dtype or shape"
    present = side_digests(result)
    for name, digest in undo.beside.items():
        if present.get(name) != digest:
            changed = f"{name} differs" if name in present else f"{name} is missing"
    if changed is not None:
        raise DamagedError(
            f"{str(result.root)!r} was changed after it was written: {changed}",
            "undo data lead back from exactly what the run wrote",
            "use the source, or an unchanged copy of the result",
        )
