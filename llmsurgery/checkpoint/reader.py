"""Bounded reads at byte offsets, without mapping files into memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsurgery.checkpoint.oserrors import reading
from llmsurgery.errors import DamagedError

# Linux moves at most 2 GiB in one call; smaller pieces also let an interrupt through.
_PIECE = 64 << 20


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file read-only and yield its descriptor and size.

    Args:
        path: The file; symbolic links are followed.

    Raises:
        InputError: The file is missing or may not be read.
        DamagedError: It is a directory, a pipe or a device.
    """
    with reading(path):
        # Without O_NONBLOCK a named pipe in place of a file would wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(
                f"{str(path)!r} is not a regular file", "a directory, pipe or device lies in its place", "replace it"
            )
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer with the bytes at an offset.

    Args:
        descriptor: An open file.
        buffer: Writable bytes; its length says how many are read.
        offset: Where to start in the file.
        path: The file's name, for the message.

    Raises:
        DamagedError: The file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        with reading(path):
            count = os.preadv(descriptor, [buffer[done : done + _PIECE]], offset + done)
        if count == 0:
            raise DamagedError(
                f"{str(path)!r} ends at byte {offset + done}, expected {len(buffer) - done} more bytes",
                "the file is truncated or is being changed by another program",
                "fetch the file again",
            )
        done += count
