"""Undo data: how to get the source back from a result, bit for bit, kept beside the result and apart from any patch.

One file: magic, compressed pieces, a JSON index, its length and SHA-256, magic again. A piece holds the rows of one
changed block. Stored entries are mapped to integers in the order of the numbers they stand for; the difference of old
and new, which is small where a weight moved a little, is folded to non-negative numbers and split into byte planes,
which Zstandard then compresses. The map is a bijection on bit patterns, so that every old byte comes back.

Tensors are listed under the source's names. One that has another name in the result, or of which the result holds only
a part, says so (`now`, null for one that is gone, and `keep`, the indices of each axis that was cut); what was cut off
is told apart from zeros. Weight files that hold other tensors than the source's are listed with the source's header.
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
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.delta import side_digests
from llmsurgery.edits.origin import Moves, Origin, Stored
from llmsurgery.edits.write import TensorChange
from llmsurgery.errors import DamagedError, InputError

if TYPE_CHECKING:
    import zstandard

NAME = ".llmsurgery/undo.bin"
FORMAT = 1
MOVED_FORMAT = 2
"""Of undo data that lead back to other names, shapes or headers."""

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
        source: The checkpoint to lead back to.
    """

    def __init__(self, stream: BinaryIO, source: Checkpoint) -> None:
        self.stream = stream
        self.source = source
        self.offset = stream.write(_MAGIC)
        self.blocks: dict[str, list[list[int]]] = {}
        self.files: list[dict[str, object]] = []
        self.weights: dict[str, dict[str, object]] = {}
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
        self.files.append({"path": path, **self._content(source.read_bytes()), "mode": permission_bits(source)})

    def add_layout(self, layout: Layout) -> None:
        """Keep the headers of weight files that the result holds anew or not at all, and the index.

        Args:
            layout: Where the tensors of the result lie.
        """
        source = self.source
        for file in [*layout.files, *sorted(layout.removed)]:
            path, header = source.root / file, source.headers[file]
            with opened(path) as (descriptor, _):
                prefix = bytearray(header.data_start)
                read_into(descriptor, memoryview(prefix), 0, path)
            self.weights[file] = {
                **self._content(bytes(prefix)), "mode": permission_bits(path), "file_bytes": header.file_size
            }  # fmt: skip
        if layout.index is not None and source.index_file is not None:
            self.add_file(source.index_file, source.root / source.index_file)

    def _content(self, content: bytes) -> dict[str, object]:
        return {"content": self._write(self._compressor.compress(content)), "bytes": len(content)}

    def finish(
        self,
        changes: Iterable[TensorChange],
        left_out: Iterable[str],
        beside: Mapping[str, str],
        moves: Moves | None = None,
    ) -> int:
        """Write the index.

        Args:
            changes: What the writer recorded.
            left_out: Files of the source that were not carried over into the result.
            beside: SHA-256 of the result's side files by name.
            moves: How names and shapes changed.

        Returns:
            Bytes of the whole file.
        """
        tensors = self._tensors({change.name: change for change in changes}, moves or Moves())
        document: dict[str, object] = {
            "format": FORMAT,
            "tensors": tensors,
            "files": self.files,
            "beside": dict(beside),
            "left_out": sorted(left_out),
        }
        if self.weights:
            document |= {"format": MOVED_FORMAT, "weights": self.weights}
        index = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        tail = _TAIL.pack(len(index), hashlib.sha256(index).digest(), _MAGIC)
        return self.offset + self.stream.write(index) + self.stream.write(tail)

    def _tensors(self, changes: Mapping[str, TensorChange], moves: Moves) -> dict[str, dict[str, object]]:
        """Return the entries of all tensors of the source that are not in the result as they were."""
        moved = {origin.source: origin for origin in moves.origins.values() if origin.source is not None}
        tensors: dict[str, dict[str, object]] = {}
        for name, change in changes.items():
            stays = name not in moved and name not in moves.gone
            # What is no tensor of the source needs no way back, nor does what nothing happened to.
            if change.sha256_before is None or (stays and not change.changed):
                continue
            origin = moved.get(name)
            after = changes[origin.name].sha256_after if origin else change.sha256_after if stays else None
            info = self.source.info(name)
            tensors[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "before": change.sha256_before,
                "after": after,
                "blocks": self.blocks.get(name, []),
            }
            if not stays:
                tensors[name]["now"] = origin.name if origin else None
            if origin and origin.keep:
                tensors[name]["keep"] = {
                    str(axis): self._content(indices.astype("<i8").tobytes()) for axis, indices in origin.keep.items()
                }
        return tensors


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
        weights: Index entry of every weight file whose header is not the source's.
    """

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    beside: Mapping[str, str]
    left_out: tuple[str, ...]
    weights: Mapping[str, Mapping[str, Any]]
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

    def now(self, name: str) -> str | None:
        """Return the name in the result of a changed tensor of the source, None if it is gone."""
        found = self.tensors[name].get("now", name)
        return None if found is None else str(found)

    def origin(self, name: str, result: Checkpoint) -> Origin | None:
        """Return what the result says of a changed tensor of the source; None if it is gone.

        Raises:
            DamagedError: The indices do not fit the shapes.
        """
        entry, now = self.tensors[name], self.now(name)
        if now is None:
            return None
        info, keep = result.info(now), {}
        for axis, place in entry.get("keep", {}).items():
            indices = np.frombuffer(self.piece(place["content"], place["bytes"]), dtype="<i8")
            number, shape = int(axis), entry["shape"]
            fits = 0 <= number < len(shape) and bool(indices.size) and bool((np.diff(indices) > 0).all())
            if not fits or indices[0] < 0 or indices[-1] >= shape[number]:
                raise _damaged(self.path, f"what was kept of tensor {name!r} does not fit its shape")
            keep[number] = indices
        shape = tuple(keep[axis].size if axis in keep else length for axis, length in enumerate(entry["shape"]))
        if (info.dtype, info.shape) != (entry["dtype"], shape):
            raise _damaged(self.path, f"tensor {now!r} of the result has another dtype or shape than they say")
        return Origin(now, info.dtype, info.shape, name, keep)

    def prefix(self, file: str) -> bytes:
        """Return everything that stood before the data of a weight file in the source."""
        return self.piece(self.weights[file]["content"], self.weights[file]["bytes"])

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
    if document["format"] not in (FORMAT, MOVED_FORMAT):
        raise InputError(
            f"{str(path)!r} has format {document['format']!r}",
            f"this version reads formats {FORMAT} and {MOVED_FORMAT}",
            "use the version of llmsurgery that wrote it",
        )
    weights = {inside_name(name, "the undo data"): entry for name, entry in document.get("weights", {}).items()}
    return Undo(
        path, document["tensors"], document["beside"], tuple(document["left_out"]), weights, document["files"], end
    )


def check_fit(undo: Undo, result: Checkpoint) -> None:
    """Refuse a result that is not the one that the undo data were made for, as far as small files and headers show it.

    Raises:
        DamagedError: A tensor is missing or of another dtype or shape, or a side file was changed.
    """
    changed = None
    for name, entry in undo.tensors.items():
        now = undo.now(name)
        if now is None or entry.get("keep"):
            continue
        info = result.info(now)
        if (info.dtype, list(info.shape)) != (entry["dtype"], entry["shape"]):
            changed = f"tensor {now!r} has another dtype or shape"
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
