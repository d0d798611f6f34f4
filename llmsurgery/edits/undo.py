"""Undo data: how to get the source back from a result, bit for bit, kept beside the result and apart from any patch.

One file: magic, compressed pieces, a JSON index, its length and SHA-256, magic again. A piece holds the rows of one
changed block: the way back from the new entries (`llmsurgery.edits.planes`), compressed by Zstandard.

Tensors are listed under the source's names. One that has another name in the result, or of which the result holds only
a part, says so (`now`, null for one that is gone, and `keep`, the indices of each axis that was cut); what was cut off
is told apart from zeros. Weight files that hold other tensors than the source's are listed with the source's header.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.delta import side_digests
from llmsurgery.edits.origin import Origin, Stored
from llmsurgery.edits.planes import from_planes
from llmsurgery.errors import DamagedError, InputError

NAME = ".llmsurgery/undo.bin"
FORMAT = 1
MOVED_FORMAT = 2
"""Of undo data that lead back to other names, shapes or headers."""

MAGIC = b"LSUNDO\0\1"
TAIL = struct.Struct("<Q32s8s")
_LARGEST_INDEX = 1 << 30


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
        if not len(MAGIC) <= offset <= offset + length <= self._end:
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
        return from_planes(self.piece(place, new.nbytes), new)

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
        if size < len(MAGIC) + TAIL.size:
            raise _damaged(path, "the file is truncated")
        head, tail = bytearray(len(MAGIC)), bytearray(TAIL.size)
        read_into(descriptor, memoryview(head), 0, path)
        read_into(descriptor, memoryview(tail), size - TAIL.size, path)
        length, digest, magic = TAIL.unpack(tail)
        end = size - TAIL.size - length
        if magic != MAGIC or head != MAGIC or length > _LARGEST_INDEX or end < len(MAGIC):
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
