"""Check a target before any long work, so that a run does not fail at its end for a reason known at its start."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.inventory import Inventory
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.target import UNFINISHED, check_free, check_relation, partial_of
from llmsurgery.errors import UsageError


def check_target(source: Checkpoint, out: Path, force: bool, resume: bool = False) -> None:
    """Refuse an output that could not be published, without creating anything.

    Args:
        source: The checkpoint to copy.
        out: The output directory.
        force: Whether an existing output may be replaced.
        resume: Whether an unfinished output may be taken over.

    Raises:
        UsageError: The output or its partial directory exists, or overlaps the source.
        ResourceError: The place cannot be written.
    """
    out = out if out.name not in ("", "..") else out.resolve()
    check_relation(source.root, Inventory.of(source).files.values(), out)
    check_free(out, force)
    partial = partial_of(out)
    if not (force or resume) and os.path.lexists(partial):
        raise UsageError(
            f"{str(partial)!r} exists",
            "another run is writing it, or an earlier one was interrupted",
            UNFINISHED,
        )
    parent = out.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    with writing(parent):
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the directory is not writable")
