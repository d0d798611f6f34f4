"""Write a weight file anew: its header, and the bytes of the tensors that stay, streamed from their source."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmsurgery.checkpoint.clone import create_private, start_writing, write_at
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.layout import NewFile
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.reader import opened, read_into

_PIECE = 4 << 20


def rebuild_file(source: Checkpoint, new: NewFile, target: Path) -> int:
    """Write a weight file whose tensors are, or start from, those of a source.

    Memory is bounded by one piece, whatever the size of the file. Tensors that start from nothing read as zeros until
    they are written.

    Args:
        source: The checkpoint that holds the tensors.
        new: The file.
        target: Its path, which must not exist.

    Returns:
        Bytes written.

    Raises:
        ResourceError: The disk is full or the target cannot be written.
        DamagedError: A file of the source ends too early.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = create_private(target)
    try:
        with writing(target):
            os.fchmod(descriptor, stat.S_IRUSR | stat.S_IWUSR)
            os.ftruncate(descriptor, new.nbytes)
        write_at(descriptor, memoryview(new.prefix), 0, target)
        written = len(new.prefix)
        for path, start, end, position in _ranges(source, new):
            _copy(path, start, end, descriptor, position, target)
            written += end - start
    finally:
        os.close(descriptor)
    return written


def _ranges(source: Checkpoint, new: NewFile) -> list[tuple[Path, int, int, int]]:
    """Return (file, first byte, one past the last, place in the new file); neighbours that stay neighbours are one."""
    ranges: list[tuple[Path, int, int, int]] = []
    position = len(new.prefix)
    for slot in new.slots:
        if slot.whole and slot.place is not None:
            info = source.info(slot.place)
            if ranges and ranges[-1][0] == info.path and ranges[-1][2] == info.start and _end(ranges[-1]) == position:
                path, start, _, first = ranges.pop()
                ranges.append((path, start, info.end, first))
            else:
                ranges.append((info.path, info.start, info.end, position))
        position += slot.nbytes
    return ranges


def _end(found: tuple[Path, int, int, int]) -> int:
    _, start, end, position = found
    return position + end - start


def _copy(path: Path, start: int, end: int, descriptor: int, position: int, target: Path) -> None:
    buffer = memoryview(bytearray(min(_PIECE, end - start)))
    with opened(path) as (origin, _):
        for offset in range(start, end, _PIECE):
            piece = buffer[: min(_PIECE, end - offset)]
            read_into(origin, piece, offset, path)
            write_at(descriptor, piece, position + offset - start, target)
            start_writing(descriptor, position + offset - start, len(piece))
