"""Turn errors of the operating system into the toolkit's own, with a way out for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmsurgery.errors import DamagedError, InputError, ResourceError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
# These mean that the program passed nonsense: a bug must keep its traceback.
_BUGS = frozenset({errno.EBADF, errno.EINVAL, errno.EFAULT})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report failures of the block as a target that cannot be written.

    Args:
        path: The file or directory being written, for the message.

    Raises:
        ResourceError: The disk is full, or the target cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _BUGS or error.errno is None:
            raise
        if error.errno in _FULL:
            fix = "free some space, or choose a target on another disk with -o"
        elif error.errno in _REFUSED:
            fix = "choose a target directory that you may write to with -o"
        else:
            fix = "check the disk of the target, or choose another target with -o"
        raise ResourceError(f"cannot write {str(path)!r}", error.strerror or str(error), fix) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report failures of the block as an input that cannot be read.

    Args:
        path: The file or directory being read, for the message.

    Raises:
        InputError: The file is missing or may not be read.
        ResourceError: The process ran out of file descriptors or memory.
        DamagedError: The disk does not deliver the bytes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _BUGS or error.errno is None:
            raise
        what, why = f"cannot read {str(path)!r}", error.strerror or str(error)
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise ResourceError(what, why, "close other programs or raise the limit (ulimit -n)") from error
        if error.errno == errno.EIO:
            raise DamagedError(what, why, "check the disk, or fetch the checkpoint again") from error
        raise InputError(what, why, "check the path and its permissions") from error
