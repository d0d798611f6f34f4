"""Names of files inside a checkpoint directory, and where paths really lead."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from llmsurgery.errors import DamagedError

_MAX_PART = 255
_MAX_NAME = 2000


def inside_name(name: str, origin: str) -> str:
    """Return a relative file name in its plain form, after checking that it stays inside the directory.

    Args:
        name: The name as found in an index or a patch.
        origin: Where it was found, for the message.

    Raises:
        DamagedError: The name is empty, too long, absolute, climbs with `..`, or uses backslashes, drives or control
            bytes.
    """
    windows = PureWindowsPath(name)
    parts = PurePosixPath(name).parts
    bad = (
        not parts
        or name.endswith("/")
        or "\\" in name
        or "\0" in name
        or ".." in parts
        or parts[0].startswith("/")
        or bool(windows.drive)
        or not _storable(name)
    )
    if bad:
        raise DamagedError(
            f"{origin} names the file {name[:200]!r}",
            "a file of a checkpoint must lie inside its directory",
            "do not use this checkpoint unless you trust its origin; fetch it again",
        )
    return str(PurePosixPath(*parts))


def _storable(name: str) -> bool:
    """Whether a file system can hold a name: what is longer than it allows raises errors wherever it is looked up."""
    try:
        parts = [len(part.encode("utf-8")) for part in name.split("/")]
    except UnicodeEncodeError:
        return False
    return max(parts) <= _MAX_PART and sum(parts) <= _MAX_NAME


def real_path(path: Path) -> Path:
    """Return the absolute path with every symbolic link followed; missing parts are kept as they are.

    Unlike `Path.resolve` it behaves the same in every supported Python when links form a loop.
    """
    return Path(os.path.realpath(path))


def contains(outer: Path, inner: Path) -> bool:
    """Tell whether a path is a directory or lies inside it, by identity and not by spelling.

    Args:
        outer: The directory, already resolved by `real_path`.
        inner: The path that may lie in it, already resolved.
    """
    return any(_same(outer, candidate) for candidate in (inner, *inner.parents))


def _same(first: Path, second: Path) -> bool:
    if first == second:
        return True
    try:
        return first.samefile(second)
    except OSError:
        return False
