"""Write undo data while a result is written; `llmsurgery.edits.undo` describes the file."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from llmsurgery.checkpoint.carry import permission_bits
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.origin import Moves, Stored
from llmsurgery.edits.planes import to_planes
from llmsurgery.edits.undo import FORMAT, MAGIC, MOVED_FORMAT, TAIL
from llmsurgery.edits.write import TensorChange

if TYPE_CHECKING:
    import zstandard

_PIECE_BYTES = 4 << 20


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
        self.offset = stream.write(MAGIC)
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
        content = self._compressor.compress(to_planes(np.ascontiguousarray(old), np.ascontiguousarray(new)))
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
        tail = TAIL.pack(len(index), hashlib.sha256(index).digest(), MAGIC)
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
