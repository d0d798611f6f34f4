"""The way back from new stored entries to old ones, in a form that compresses well.

Stored entries are mapped to integers in the order of the numbers they stand for; the difference of old and new, which
is small where a weight moved a little, is folded to non-negative numbers and split into byte planes. The map is a
bijection on bit patterns, so that every old byte comes back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.edits.origin import Stored

Bits = npt.NDArray[Any]


def _ordered(bits: Bits) -> Bits:
    """Map bit patterns of floats to integers in the order of their values; it undoes itself with `_unordered`."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits ^ top)


def _unordered(keys: Bits) -> Bits:
    top = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    return np.where(keys & top, keys ^ top, ~keys)


def to_planes(old: Stored, new: Stored) -> bytes:
    """Return the way back from new stored entries to old ones, as byte planes that compress well."""
    first, second = (array.reshape(-1).view(f"<u{array.itemsize}") for array in (old, new))
    with np.errstate(over="ignore"):
        steps = _ordered(first) - _ordered(second)
        last = steps.dtype.type(8 * steps.itemsize - 1)
        folded = (steps << steps.dtype.type(1)) ^ (steps.dtype.type(0) - (steps >> last))
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, folded.itemsize).T).tobytes()


def from_planes(planes: bytes, new: Stored) -> Stored:
    """Return the old stored entries that byte planes lead back to."""
    second = new.reshape(-1).view(f"<u{new.itemsize}")
    columns = np.frombuffer(planes, dtype=np.uint8).reshape(new.itemsize, -1).T
    folded = np.ascontiguousarray(columns).reshape(-1).view(second.dtype)
    one = folded.dtype.type(1)
    with np.errstate(over="ignore"):
        steps = (folded >> one) ^ (folded.dtype.type(0) - (folded & one))
        keys = _ordered(second) + steps
    return _unordered(keys).astype(second.dtype, copy=False).view(new.dtype).reshape(new.shape)
