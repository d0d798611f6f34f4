"""Undo data -> the source's bytes, checked tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np

from llmsurgery.checkpoint import ITEMSIZE, Checkpoint, Publication
from llmsurgery.checkpoint.header import parse_header
from llmsurgery.checkpoint.layout import Layout, NewFile, Slot, with_files
from llmsurgery.edits.origin import Origin, Stored, blank_rows
from llmsurgery.edits.undo import Undo
from llmsurgery.errors import DamagedError

_BLOCK_BYTES = 4 << 20


def revert_layout(undo: Undo, result: Checkpoint) -> Layout | None:
    """Return where the source's tensors lie; None if they lie where the result's do.

    Args:
        undo: The undo data.
        result: The checkpoint to revert.

    Raises:
        DamagedError: The undo data are damaged, or are not those of this result.
    """
    if not undo.weights:
        return None
    files = {}
    for file, entry in undo.weights.items():
        prefix = undo.prefix(file)
        slots = []
        for name, info in parse_header(Path(file), prefix, int(entry["file_bytes"])).tensors.items():
            place: str | None = name
            if name in undo.tensors:
                origin = undo.origin(name, result)
                place = origin.name if origin is not None and not origin.keep else None
            if place is not None and (result.info(place).dtype, result.info(place).shape) != (info.dtype, info.shape):
                raise _changed(result, place)
            slots.append(Slot(name, info.dtype, info.shape, place, place is not None))
        files[file] = NewFile(prefix, tuple(slots), int(entry["mode"]))
    return with_files(result, files, (), None)


def revert_tensors(
    undo: Undo, result: Checkpoint, publication: Publication, tick: Callable[[], object] = lambda: None
) -> None:
    """Restore every changed tensor inside a publication of the result.

    Args:
        undo: The undo data.
        result: The checkpoint to revert; the publication's source.
        publication: The open publication, whose `rewrite` named the changed tensors and whose `layout` is that of
            `revert_layout`.
        tick: Called once per tensor.

    Raises:
        DamagedError: The result was changed since it was written, or the undo data are damaged.
    """
    for name in undo.tensors:
        _revert_tensor(undo, result, publication, name)
        tick()


def _revert_tensor(undo: Undo, result: Checkpoint, publication: Publication, name: str) -> None:
    entry, origin = undo.tensors[name], undo.origin(name, result)
    shape = tuple(int(length) for length in entry["shape"])
    before, after = hashlib.sha256(), hashlib.sha256()
    # What lies in the publication already needs no second writing where it did not change.
    written = origin is not None and not origin.keep
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK_BYTES // max(1, ITEMSIZE[entry["dtype"]] * prod(shape[1:])))
    row = 0

    def current(first: int, last: int) -> Stored:
        """Read what the result says of some rows of the source: what is not in it counts as zeros."""
        if origin is None:
            return blank_rows(Origin(name, entry["dtype"], shape, None), first, last)
        new = result.read(origin.name, *origin.rows(first, last))
        after.update(new.reshape(-1).view(np.uint8).data)
        return origin.spread(new, last - first, first, shape)

    def restore(first: int, old: Stored, changed: bool) -> None:
        before.update(old.reshape(-1).view(np.uint8).data)
        if changed or not written:
            publication.patch_rows(name, first, old)

    for start, count, *place in [*entry["blocks"], (rows, 0)]:
        for first in range(row, start, step):
            restore(first, current(first, min(first + step, start)), False)
        if count:
            restore(start, undo.old_rows(current(start, start + count), place), True)
        row = start + count
    if entry["after"] is not None and after.hexdigest() != entry["after"]:
        raise _changed(result, name if origin is None else origin.name)
    if before.hexdigest() != entry["before"]:
        raise DamagedError(
            f"the undo data of tensor {name!r} in {str(undo.path)!r} are damaged",
            "the restored bytes do not have the source's SHA-256",
            "restore the file from a copy, or use the source itself",
        )


def _changed(result: Checkpoint, name: str) -> DamagedError:
    return DamagedError(
        f"tensor {name!r} of {str(result.root)!r} was changed after it was written",
        "its SHA-256 is not the one that the run recorded, so that the way back is unknown",
        "use the source, or an unchanged copy of the result",
    )
