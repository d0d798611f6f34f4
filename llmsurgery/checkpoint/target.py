"""Places on disk for an output: what may be replaced, one run per target, and the final exchange of names."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

from llmsurgery.checkpoint.inventory import STATE
from llmsurgery.checkpoint.oserrors import reading, writing
from llmsurgery.checkpoint.paths import contains, real_path
from llmsurgery.errors import ResourceError, UsageError

_OTHER_NAME = "choose another output with -o"
UNFINISHED = "go on from it with --resume, start anew with --force, or wait if that run still works"
"""What to do about an unfinished output."""


def check_relation(root: Path, files: Iterable[Path], out: Path) -> None:
    """Refuse an output that would change or delete the source, whatever --force says.

    Args:
        root: The source directory.
        files: The source's files, which may be links to other places.
        out: The output directory.

    Raises:
        UsageError: The output is the source, lies inside it or holds a part of it, or holds the current directory.
    """
    partial = partial_of(out)
    real_root = real_path(root)
    # The name itself is replaced, but what a link of that name leads to must not be the source either.
    places = {real_path(out.parent) / out.name, real_path(out), real_path(partial)}
    if any(contains(real_root, place) for place in places):
        raise UsageError(
            f"the output {str(out)!r} is the source or lies inside it", "a source is never changed", _OTHER_NAME
        )
    with reading(Path()):
        kept = (Path.cwd(), real_path(Path.home()))
    sources = {real_root, *(real_path(file).parent for file in files)}
    for place in places:
        if any(contains(place, source) for source in sources):
            raise UsageError(
                f"the source lies inside the output {str(out)!r}", "a source is never changed", _OTHER_NAME
            )
        if any(contains(place, keep) for keep in kept):
            raise UsageError(
                f"the output {str(out)!r} holds the current or the home directory", "it would be replaced", _OTHER_NAME
            )


def check_free(out: Path, force: bool) -> None:
    """Refuse an output that exists already.

    Args:
        out: The output directory.
        force: Whether an existing one may be replaced.

    Raises:
        UsageError: It exists and may not be replaced.
    """
    if not force and os.path.lexists(out):
        raise UsageError(
            f"the output {str(out)!r} exists", "nothing is overwritten unasked", f"{_OTHER_NAME}, or give --force"
        )


def partial_of(out: Path) -> Path:
    """Return the name under which an output is built."""
    return out.parent / (out.name + ".partial")


class Claim:
    """The directory in which one output is built, locked for one run.

    Args:
        out: The output directory.
        force: Remove what an earlier, dead run left there.
        resume: Take over what a dead run left there; only its `STATE` stays.

    Attributes:
        path: The directory under construction.
        state: Where a run keeps what it can go on from.

    Raises:
        UsageError: It exists, or another run is at work in it.
        ResourceError: It cannot be written.
    """

    def __init__(self, out: Path, force: bool, resume: bool = False) -> None:
        self.path = partial_of(out)
        self.state = self.path / STATE
        self._lock: int | None = take_over(self.path) if resume and _is_directory(self.path) else None
        if self._lock is None:
            self._lock = make_partial(self.path, force)
        elif not self.clear():
            self.release()
            raise _busy(self.path)

    @property
    def held(self) -> bool:
        """Whether the directory is still this run's."""
        return self._lock is not None

    def clear(self) -> bool:
        """Remove everything but the state; return whether the name still leads to this directory."""
        if self._lock is None or not is_same(self.path, self._lock):
            return False
        with writing(self.path):
            self.path.chmod(stat.S_IRWXU)
            for entry in list(self.path.iterdir()):
                if entry.name != STATE:
                    remove(entry)
        return True

    def discard(self) -> None:
        """Remove the directory and let go; nothing happens a second time."""
        if self._lock is None:
            return
        try:
            # Another run may own the name by now.
            if is_same(self.path, self._lock):
                remove(self.path)
        finally:
            self.release()

    def release(self) -> None:
        """Let go and leave what is there; nothing happens a second time."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def take_over(partial: Path) -> int:
    """Lock a directory that a dead run left.

    Returns:
        A descriptor that holds the lock; close it to let go.

    Raises:
        UsageError: The run is at work in it.
        ResourceError: It cannot be opened.
    """
    with writing(partial):
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not _lock(descriptor):
        os.close(descriptor)
        raise _busy(partial)
    return descriptor


def make_partial(partial: Path, force: bool) -> int:
    """Create the directory in which an output is built; its creation is the lock between runs.

    Args:
        partial: The directory.
        force: Remove what an earlier, dead run left there.

    Returns:
        A descriptor that holds the lock; close it to let go.

    Raises:
        UsageError: It exists, or another run is at work in it.
        ResourceError: It cannot be written.
    """
    parent = partial.parent
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the directory is not writable")
    if force and os.path.lexists(partial):
        _remove_stale(partial)
    try:
        with writing(partial):
            try:
                partial.mkdir(mode=0o700)
            except FileExistsError:
                raise UsageError(
                    f"{str(partial)!r} exists",
                    "another run is writing it, or an earlier one was interrupted",
                    UNFINISHED,
                ) from None
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if _lock(descriptor) and is_same(partial, descriptor):
            return descriptor
        os.close(descriptor)
    except FileNotFoundError:
        # Removed between its creation and its opening, by a run with --force that took it for a dead one's.
        pass
    raise _busy(partial)


def _busy(partial: Path) -> UsageError:
    return UsageError(f"another run is writing {str(partial)!r}", "two runs have the same output", _OTHER_NAME)


def _lock(descriptor: int) -> bool:
    """Lock a directory; the lock ends with the process, so that a dead run is told from a living one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Some network file systems lock nothing. The directory itself still keeps runs without --force apart.
        return True
    return True


def is_same(path: Path, descriptor: int) -> bool:
    """Tell whether a name still leads to the directory that a descriptor holds open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _remove_stale(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        with writing(partial):
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _lock(descriptor):
                raise _busy(partial)
            remove(partial)
        finally:
            os.close(descriptor)
    else:
        remove(partial)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; a missing one is fine.

    Args:
        path: What to remove. Links are removed, never followed.

    Raises:
        ResourceError: It cannot be removed.
    """
    with writing(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        for folder, _, _ in os.walk(path):
            # A directory that was read-only in the source refuses to lose its entries. Files need no such change.
            if not os.access(folder, os.W_OK | os.X_OK | os.R_OK):
                Path(folder).chmod(stat.S_IRWXU)
        shutil.rmtree(path)


def check_space(partial: Path, needed: int) -> None:
    """Refuse a run that would fill the disk, before it writes.

    Args:
        partial: The directory to be written.
        needed: Bytes that will be copied into it.

    Raises:
        ResourceError: The file system has less free space.
    """
    with writing(partial):
        free = shutil.disk_usage(partial).free
    if needed > free:
        raise ResourceError(
            f"the output needs {needed / 1e9:.2f} GB in {str(partial.parent)!r}, which has {free / 1e9:.2f} GB free",
            "the checkpoint would not fit on the disk",
            "free some space, choose another disk with -o, or give --link beside the source to copy less",
        )


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut.

    Args:
        path: The directory.

    Raises:
        ResourceError: The disk fails.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some file systems cannot sync a directory and say so.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(descriptor)


def move_into_place(partial: Path, out: Path, force: bool) -> Path | None:
    """Give a finished directory its final name.

    Args:
        partial: The finished directory.
        out: The final name.
        force: Whether an existing output is set aside.

    Returns:
        Where the old output lies now, to be removed; None if there was none.

    Raises:
        UsageError: The output exists and may not be replaced.
        ResourceError: The rename failed; the old output is back in its place.
    """
    check_free(out, force)
    aside: Path | None = None
    try:
        with writing(out):
            if os.path.lexists(out):
                aside = out.with_name(f"{out.name}.replaced-{secrets.token_hex(4)}")
                out.rename(aside)
            partial.rename(out)
    except BaseException:
        if aside is not None and os.path.lexists(aside) and not os.path.lexists(out):
            aside.rename(out)
        raise
    return aside
