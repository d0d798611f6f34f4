"""Arrays of edits that take less room than their values: packed masks, values in a stored dtype, and computed ones.

All stand where an edit has a numpy array: they have its shape and dtype, give rows as arrays, and become one in
`numpy.asarray`. Edits of every matrix of a model fit into memory this way, or lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint import decode, encode

Raw = npt.NDArray[Any]


class PackedMask:
    """Booleans of a matrix, one bit each.

    Args:
        bits: `numpy.packbits` of the rows [rows, ceil(columns / 8)], uint8.
        columns: Columns of the matrix.
    """

    ndim = 2
    dtype = np.dtype(np.bool_)

    def __init__(self, bits: npt.NDArray[np.uint8], columns: int) -> None:
        self.bits = bits
        self.shape = (bits.shape[0], columns)

    @classmethod
    def of(cls, mask: npt.NDArray[np.bool_]) -> PackedMask:
        """Pack a matrix of booleans."""
        return cls(np.packbits(mask, axis=1), mask.shape[1])

    def __getitem__(self, rows: slice) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self.bits[rows], axis=1, count=self.shape[1]).view(np.bool_)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Raw:
        return self[slice(None)].astype(dtype or self.dtype)


class StoredRows:
    """Values of a matrix as they will be stored; rows are decoded when they are read.

    Args:
        shape: Shape of the matrix.
        code: Stored dtype code.
        read: Returns stored entries of the rows from the first number to the one before the second.
    """

    ndim = 2

    def __init__(self, shape: tuple[int, ...], code: str, read: Callable[[int, int], Raw]) -> None:
        self.shape, self.code, self.read = shape, code, read
        self.dtype: np.dtype[Any] = np.dtype("f8" if code == "F64" else "f4")

    @classmethod
    def of(cls, values: Raw, code: str) -> StoredRows:
        """Round values to a stored dtype and hold them in memory."""
        raw = encode(values, code)
        return cls(values.shape, code, lambda start, stop: raw[start:stop])

    def raw(self) -> Raw:
        """Return all stored entries."""
        return self.read(0, self.shape[0])

    def __getitem__(self, rows: slice) -> Raw:
        start, stop, _ = rows.indices(self.shape[0])
        return decode(self.read(start, stop), self.code)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Raw:
        return self[slice(None)].astype(dtype or self.dtype)


class ComputedRows:
    """Values of a tensor that are computed when they are read, and not held.

    Args:
        shape: Shape of the tensor.
        compute: Returns all of it, fp32, the same whenever it is called. Rows are read in order, so it should hold its
            last result.
    """

    dtype: np.dtype[Any] = np.dtype("f4")

    def __init__(self, shape: tuple[int, ...], compute: Callable[[], Raw]) -> None:
        self.shape, self.compute = shape, compute
        self.ndim = len(shape)

    def __getitem__(self, rows: slice) -> Raw:
        return self.compute()[rows]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Raw:
        return self.compute().astype(dtype or self.dtype)
