"""Where a tensor of a result comes from: which tensor of the source, and which part of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint import Checkpoint, storage_dtype
from llmsurgery.checkpoint.layout import Layout, Slot, rearrange

Stored = npt.NDArray[Any]
"""Rows as stored, of dtype `storage_dtype`."""

Indices = npt.NDArray[np.int64]

_BLOCK_ENTRIES = 1 << 18


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a tensor of a result comes from.

    Attributes:
        name: Name in the result.
        dtype: Stored dtype code.
        shape: Stored shape in the result.
        source: Name in the source; None for a tensor that starts from zeros.
        keep: Axis -> ascending indices that are kept of the source's; all of an axis that is not named.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None
    keep: Mapping[int, Indices] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> Origin:
        """Return the origin of a tensor that keeps name and shape."""
        info = checkpoint.info(name)
        return cls(name, info.dtype, info.shape, name)

    @property
    def in_place(self) -> bool:
        """Whether it has name and shape of its source."""
        return self.source == self.name and not self.keep

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """Return which rows of the result come from rows `start:stop` of the source."""
        return kept_rows(self.keep.get(0), start, stop)

    def take(self, raw: Stored, start: int) -> Stored:
        """Return what is kept of some rows of the source.

        Args:
            raw: Rows of the source from `start` on.
            start: The first of them.
        """
        return take(raw, self.keep, start)

    def spread(self, kept: Stored, rows: int, start: int, shape: tuple[int, ...]) -> Stored:
        """Return rows of the source's shape that hold what the result kept of them, and zeros.

        Args:
            kept: The result's rows that come from them.
            rows: How many rows.
            start: The first of them in the source.
            shape: The source's shape.
        """
        if not self.keep:
            return kept
        whole = np.zeros((rows, *shape[1:]), dtype=kept.dtype)
        at = [self.keep.get(axis, np.arange(length)) for axis, length in enumerate((rows, *shape[1:]))]
        if 0 in self.keep:
            first, last = self.rows(start, start + rows)
            at[0] = self.keep[0][first:last] - start
        whole[np.ix_(*at)] = kept
        return whole

    def base_blocks(self, checkpoint: Checkpoint) -> Iterator[tuple[int, int, Stored]]:
        """Yield (first row, one past the last, rows) of what the result starts from, in the result's shape."""
        if self.source is None:
            for first, last in blank_blocks(self.shape):
                yield first, last, blank_rows(self, first, last)
            return
        for start, stop in checkpoint.row_blocks(self.source):
            first, last = self.rows(start, stop)
            if last > first:
                yield first, last, self.take(checkpoint.read(self.source, start, stop), start)


def kept_rows(keep: Indices | None, start: int, stop: int) -> tuple[int, int]:
    """Return the places in `keep` of the indices `start:stop`."""
    if keep is None:
        return start, stop
    first, last = np.searchsorted(keep, [start, stop])
    return int(first), int(last)


def take(rows: Stored, keep: Mapping[int, Indices], start: int) -> Stored:
    """Return what is kept of rows that begin at `start`, contiguous in memory."""
    for axis, indices in keep.items():
        if axis == 0:
            first, last = kept_rows(indices, start, start + rows.shape[0])
            indices = indices[first:last] - start
        rows = np.take(rows, indices, axis)
    return rows


def blank_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Split a tensor of some shape into row ranges of bounded size."""
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK_ENTRIES // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def blank_rows(origin: Origin, start: int, stop: int) -> Stored:
    """Return rows of zeros of a tensor of a result."""
    shape = (stop - start, *origin.shape[1:]) if origin.shape else ()
    return np.zeros(shape, dtype=storage_dtype(origin.dtype))


def compose(keep: Mapping[int, Indices], axis: int, indices: Indices) -> dict[int, Indices]:
    """Return what is kept of a source when indices of what was kept of it are kept."""
    return {**keep, axis: keep[axis][indices] if axis in keep else indices}


@dataclass(frozen=True)
class Moves:
    """How the tensors of a result follow from those of its source.

    Attributes:
        origins: Every tensor of the result that has another name, shape or dtype than its source, or none.
        gone: Every tensor of the source that no tensor of the result comes from.
    """

    origins: Mapping[str, Origin] = field(default_factory=dict)
    gone: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.origins or self.gone)

    def origin(self, checkpoint: Checkpoint, name: str) -> Origin:
        """Return the origin of any tensor of the result."""
        return self.origins.get(name) or Origin.of(checkpoint, name)

    def names(self, source: Iterable[str]) -> set[str]:
        """Return the names of all tensors of the result."""
        left = {*self.gone, *(origin.source for origin in self.origins.values())}
        return {*(name for name in source if name not in left), *self.origins}

    def layout(self, checkpoint: Checkpoint) -> Layout | None:
        """Return where the tensors of the result lie; None if they lie where the source's do."""
        if not self:
            return None
        slots = []
        for name in self.names(checkpoint.tensors):
            origin = self.origin(checkpoint, name)
            slots.append(
                Slot(name, origin.dtype, origin.shape, origin.source, origin.source is not None and not origin.keep)
            )
        return rearrange(checkpoint, slots)
