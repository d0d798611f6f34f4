"""Clone one file as cheaply as the file system allows: shared blocks, a hard link, or a copy.

The source is only ever opened for reading, and the mode of a hard link is never touched, because both belong to the
source as well.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from llmsurgery.checkpoint.oserrors import reading, writing
from llmsurgery.checkpoint.paths import real_path
from llmsurgery.checkpoint.reader import opened
from llmsurgery.errors import DamagedError

# _IOW(0x94, 9, int), the same on every architecture that Linux btrfs and XFS run on but MIPS, PowerPC and SPARC,
# where the number is unknown to the kernel and the copy is made in the ordinary way.
_FICLONE = 0x40049409
_PIECE = 64 << 20
_BUFFER = 4 << 20

# Errors that say "not this way", as opposed to "not at all".
_NO_SHORTCUT = frozenset({
    errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF, errno.ETXTBSY,
})  # fmt: skip
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})


def clone_file(source: Path, target: Path, link: bool = False) -> str:
    """Clone a file to a new name.

    The permission bits of the source are kept, except that a private copy stays writable for its owner; whoever
    publishes it sets the final mode.

    Args:
        source: The file; a symbolic link is followed first.
        target: The new name, which must not exist.
        link: Where blocks cannot be shared, make a hard link instead of a copy. Falls back to a copy across file
            systems and where links are not allowed.

    Returns:
        "reflink", "link" or "copy": what was done.

    Raises:
        InputError: The source is missing or may not be read.
        ResourceError: The disk is full or the target cannot be written.
        DamagedError: The source is not a regular file, or shrinks while it is copied.
    """
    real = real_path(source)
    with opened(real) as (origin, size):
        method = _clone_private(origin, size, real, target, copying=not link)
        if method is None:
            if _link(real, target):
                return "link"
            method = _clone_private(origin, size, real, target, copying=True)
    return method or "copy"


def _clone_private(origin: int, size: int, real: Path, target: Path, copying: bool) -> str | None:
    """Make a file of its own that shares blocks with the source or holds a copy; None where neither was possible."""
    mode = stat.S_IMODE(os.fstat(origin).st_mode) & 0o777
    with writing(target):
        copy = create_private(target)
    method = None
    complete = False
    try:
        if _reflink(origin, copy, target):
            method = "reflink"
        elif copying:
            _copy(origin, copy, size, real, target)
            method = "copy"
        if method is not None:
            with writing(target):
                set_mode(copy, mode | stat.S_IWUSR)
            complete = True
    finally:
        os.close(copy)
        if not complete:
            target.unlink(missing_ok=True)
    return method


def can_reflink(source: Path, directory: Path) -> bool:
    """Tell whether files can share blocks between a source and a directory, by trying it on an empty name.

    Args:
        source: A file of the source.
        directory: A writable directory.

    Raises:
        InputError: The source is missing or may not be read.
        ResourceError: The directory cannot be written.
    """
    probe = directory / ".reflink-probe"
    with opened(real_path(source)) as (origin, _):
        with writing(probe):
            copy = create_private(probe)
        try:
            return _reflink(origin, copy, probe)
        finally:
            os.close(copy)
            probe.unlink(missing_ok=True)


def create_private(target: Path) -> int:
    """Create a file that must not exist and open it for writing.

    Args:
        target: Its path.

    Raises:
        OSError: It exists or cannot be written.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    # Readable by nobody else until the source's mode is set.
    return os.open(target, flags, 0o600)


def _reflink(origin: int, copy: int, target: Path) -> bool:
    with writing(target):
        try:
            fcntl.ioctl(copy, _FICLONE, origin)
        except OSError as error:
            if error.errno in _NO_SHORTCUT:
                return False
            raise
    return True


def _link(real: Path, target: Path) -> bool:
    with writing(target):
        try:
            os.link(real, target)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
    return True


def _copy(origin: int, copy: int, size: int, real: Path, target: Path) -> None:
    _advise(origin, 0, 0, "SEQUENTIAL")
    done = _copy_in_kernel(origin, copy, size, target)
    if done < size:
        done = _copy_through_buffer(origin, copy, done, size, real, target)
    if done < size:
        raise DamagedError(
            f"{str(real)!r} ends at byte {done} of {size}",
            "another program truncated it while it was copied",
            "run again when nothing writes to the source",
        )


def _copy_in_kernel(origin: int, copy: int, size: int, target: Path) -> int:
    """Copy without passing through this process; return how far that went."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    with writing(target):
        while done < size:
            try:
                count = os.copy_file_range(origin, copy, min(_PIECE, size - done), done, done)
            except OSError as error:
                if error.errno in _NO_SHORTCUT:
                    break
                raise
            if count == 0:
                # Some network and virtual file systems answer 0 instead of an error.
                break
            start_writing(copy, done, count)
            done += count
    return done


def _copy_through_buffer(origin: int, copy: int, start: int, size: int, real: Path, target: Path) -> int:
    done = start
    buffer = memoryview(bytearray(_BUFFER))
    while done < size:
        with reading(real):
            count = os.preadv(origin, [buffer[: min(_BUFFER, size - done)]], done)
        if count == 0:
            break
        write_at(copy, buffer[:count], done, target)
        start_writing(copy, done, count)
        done += count
    return done


def start_writing(copy: int, start: int, count: int) -> None:
    """Let the disk begin with what was just copied, so that the sync at the end finds little left to wait for.

    Args:
        copy: An open file.
        start: First byte.
        count: How many bytes.
    """
    # Linux starts to write such pages without waiting for them, and what is being written stays cached.
    _advise(copy, start, count, "DONTNEED")


def _advise(descriptor: int, start: int, count: int, advice: str) -> None:
    """Give the kernel a hint; where it takes none, nothing but time is lost."""
    code = getattr(os, f"POSIX_FADV_{advice}", None)
    if code is not None:
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, count, code)


def set_mode(path: int | Path, mode: int) -> None:
    """Set the permission bits of something this process created.

    Args:
        path: An open descriptor, or a directory.
        mode: The bits.

    Raises:
        OSError: The file system fails.
    """
    try:
        os.chmod(path, mode)  # noqa: PTH101 - a Path has no descriptor
    except OSError as error:
        # The owner is refused only where the file system keeps no such bits, as exFAT does.
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def write_at(descriptor: int, content: memoryview, offset: int, path: Path) -> None:
    """Write all of the content at an offset.

    Args:
        descriptor: An open file.
        content: The bytes.
        offset: Where they go.
        path: The file's name, for the message.

    Raises:
        ResourceError: The disk is full or fails.
    """
    done = 0
    while done < len(content):
        with writing(path):
            count = os.pwrite(descriptor, content[done : done + _PIECE], offset + done)
            if count == 0:
                raise OSError(errno.ENOSPC, "the file system accepts no more bytes")
        done += count
