"""Undo data -> the source's bytes, checked tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.edits.undo import Undo
from llmsurgery.errors import DamagedError

_BLOCK_BYTES = 4 << 20


def revert_tensors(
    undo: Undo, result: Checkpoint, publication: Publication, tick: Callable[[], object] = lambda: None
) -> None:
    """Restore every changed tensor inside a publication of the result.

    Args:
        undo: The undo data.
        result: The checkpoint to revert; the publication's source.
        publication: The open publication, whose `rewrite` named the changed tensors.
        tick: Called once per tensor.

    Raises:
        DamagedError: The result was changed since it was written, or the undo data are damaged.
    """
    for name in undo.tensors:
        _revert_tensor(undo, result, publication, name)
        tick()


def _revert_tensor(undo: Undo, result: Checkpoint, publication: Publication, name: str) -> None:
    entry, info = undo.tensors[name], result.info(name)
    before, after = hashlib.sha256(), hashlib.sha256()
    row = 0

    def skip(stop: int) -> None:
        """Hash rows that did not change."""
        step = max(1, _BLOCK_BYTES // max(1, info.row_nbytes))
        for first in range(row, stop, step):
            raw = result.read(name, first, min(first + step, stop)).reshape(-1).view(np.uint8)
            before.update(raw.data)
            after.update(raw.data)

    for start, rows, *place in entry["blocks"]:
        skip(start)
        new = result.read(name, start, start + rows)
        old = undo.old_rows(new, place)
        after.update(new.reshape(-1).view(np.uint8).data)
        before.update(old.reshape(-1).view(np.uint8).data)
        publication.patch_rows(name, start, old)
        row = start + rows
    skip(info.rows)
    if after.hexdigest() != entry["after"]:
        raise DamagedError(
            f"tensor {name!r} of {str(result.root)!r} was changed after it was written",
            "its SHA-256 is not the one that the run recorded, so that the way back is unknown",
            "use the source, or an unchanged copy of the result",
        )
    if before.hexdigest() != entry["before"]:
        raise DamagedError(
            f"the undo data of tensor {name!r} in {str(undo.path)!r} are damaged",
            "the restored bytes do not have the source's SHA-256",
            "restore the file from a copy, or use the source itself",
        )
