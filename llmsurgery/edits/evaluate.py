"""One routine that turns edits into stored values: float64 arithmetic, rounded once to nearest even.

The writer and anything that later applies a patch call the same function, so that both end in the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint import decode, encode
from llmsurgery.edits.kinds import (
    Add,
    Array,
    Config,
    Drop,
    Edit,
    File,
    LowRank,
    Mask,
    Rename,
    Replace,
    Sparse,
    StoredEdit,
    TensorEdit,
)
from llmsurgery.errors import DivergedError, SurgeryError


class Described(Protocol):
    """What is known of a tensor without its values: a header entry, or the origin of a tensor on its way."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def dtype(self) -> str:
        """Stored dtype code."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""


def require_fit(edit: TensorEdit | Add, info: Described) -> None:
    """Check that an edit has the shape of its tensor and finite values.

    Raises:
        SurgeryError: The shapes disagree: a method built a wrong edit, which is a bug.
        DivergedError: A factor or value holds NaN or Inf.
    """
    require_shape(edit, info)
    require_finite_edit(edit)


def require_shape(edit: TensorEdit | Add, info: Described) -> None:
    """Check that an edit has the shape of its tensor.

    Raises:
        SurgeryError: The shapes disagree: a method built a wrong edit, which is a bug.
    """
    if isinstance(edit, LowRank):
        if edit.u.ndim != 2 or edit.v.ndim != 2:
            raise SurgeryError(f"edit of {edit.name}: low-rank factors must be matrices")
        shape: tuple[int, ...] = (edit.u.shape[0], edit.v.shape[1])
        fits = shape == info.shape and edit.u.shape[1] == edit.v.shape[0]
    elif isinstance(edit, Sparse):
        shape = edit.indices.shape
        ascending = bool((np.diff(edit.indices) > 0).all()) if edit.indices.ndim == 1 else False
        inside = ascending and (not edit.indices.size or 0 <= edit.indices[0] <= edit.indices[-1] < prod(info.shape))
        fits = bool(inside) and edit.values.shape == shape
    elif isinstance(edit, Mask):
        shape = edit.keep.shape
        fits = shape == info.shape and edit.keep.dtype == np.bool_
    else:
        shape = edit.values.shape
        fits = shape == info.shape
    if not fits:
        raise SurgeryError(f"edit of {edit.name}: shape {shape} does not fit the stored shape {info.shape}")


def require_finite_edit(edit: StoredEdit) -> None:
    """Check that an edit has finite values.

    Raises:
        DivergedError: A factor or value holds NaN or Inf.
    """
    arrays: list[Array] = []
    if isinstance(edit, LowRank):
        arrays = [edit.u, edit.v]
    elif isinstance(edit, Replace | Sparse | Add):
        arrays = [edit.values]
    if not all(np.isfinite(array).all() for array in arrays):
        raise DivergedError(
            f"edit of {edit.name} holds NaN or Inf",
            "the method diverged before its result could be written",
            "lower the step size (--set lr=...) or train fewer steps",
        )


def exact_rows(
    edits: Sequence[TensorEdit], raw: npt.NDArray[np.generic], info: Described, start: int, stop: int
) -> npt.NDArray[np.float64]:
    """Return rows `start:stop` of an edited tensor in float64, before the one rounding.

    Args:
        edits: The edits of this tensor, applied in order.
        raw: Rows `start:stop` as stored, [stop - start, ...].
        info: The tensor's name, dtype and shape.
        start: First row.
        stop: One past the last row.
    """
    return edit_values(edits, decode(raw, info.dtype).astype(np.float64), info.shape, start, stop)


def edit_values(
    edits: Sequence[TensorEdit], values: npt.NDArray[np.float64], shape: tuple[int, ...], start: int, stop: int
) -> npt.NDArray[np.float64]:
    """Apply edits to float64 values.

    Args:
        edits: In-place edits of one tensor, applied in order.
        values: Rows `start:stop` of the tensor, [stop - start, ...]; may be changed.
        shape: Shape of the whole tensor.
        start: First row.
        stop: One past the last row.
    """
    for edit in edits:
        if isinstance(edit, LowRank):
            values = values + edit.u[start:stop].astype(np.float64) @ edit.v.astype(np.float64)
        elif isinstance(edit, Mask):
            # A product would leave negative zeros behind.
            values = np.where(_rows(edit.keep, start, stop), values, 0.0)
        elif isinstance(edit, Sparse):
            width = prod(shape[1:])
            first, last = np.searchsorted(edit.indices, [start * width, stop * width])
            # Only then is the flat form a view.
            values = values if values.flags.c_contiguous else values.copy(order="C")
            values.reshape(-1)[edit.indices[first:last] - start * width] = edit.values[first:last]
        else:
            values = _rows(edit.values, start, stop).astype(np.float64)
    return values


def _rows(array: npt.NDArray[Any], start: int, stop: int) -> npt.NDArray[Any]:
    return array[start:stop] if array.ndim else array


def evaluate_rows(
    edits: Sequence[TensorEdit], raw: npt.NDArray[np.generic], info: Described, start: int, stop: int
) -> npt.NDArray[np.generic]:
    """Return rows `start:stop` of an edited tensor in its stored dtype.

    Args:
        edits: The edits of this tensor, applied in order; they are summed before the one rounding.
        raw: Rows `start:stop` as stored, [stop - start, ...].
        info: The tensor's name, dtype and shape.
        start: First row.
        stop: One past the last row.

    Raises:
        DivergedError: The result does not fit the stored dtype (overflow).
    """
    return round_rows(exact_rows(edits, raw, info, start, stop), raw, info)


def round_values(values: npt.NDArray[np.float64], dtype: str, name: str) -> npt.NDArray[np.generic]:
    """Round values once, to nearest even, to a stored dtype.

    Args:
        values: The values.
        dtype: Stored dtype code.
        name: Name of the tensor, for the message.

    Raises:
        DivergedError: A value does not fit the dtype (overflow).
    """
    with np.errstate(over="ignore"):
        result = encode(values, dtype)
    if not np.isfinite(decode(result, dtype)).all():
        raise DivergedError(
            f"edit of {name} overflows its stored dtype {dtype}",
            "a value became NaN or Inf when it was rounded",
            "lower the step size (--set lr=...) or train fewer steps",
        )
    return result


def round_rows(
    values: npt.NDArray[np.float64], raw: npt.NDArray[np.generic], info: Described
) -> npt.NDArray[np.generic]:  # fmt: skip
    """Round rows once, to nearest even, to the stored dtype; an entry whose value stays keeps its bits.

    Args:
        values: The new values.
        raw: The same rows as stored.
        info: The tensor's name, dtype and shape.

    Raises:
        DivergedError: A value does not fit the stored dtype (overflow).
    """
    before = decode(raw, info.dtype)
    result = round_values(values, info.dtype, info.name)
    after = decode(result, info.dtype)
    # -0.0 + 0.0 is +0.0: an entry whose value did not move keeps its bits, so that it counts as unchanged.
    return np.where(after == before, raw, result)


def tensor_edits(edits: Sequence[Edit]) -> list[StoredEdit]:
    """Return the edits of stored tensors; refuse those that are written beside the weights.

    Raises:
        SurgeryError: An edit of another kind, or two that replace one tensor: a method's bug.
    """
    result: list[StoredEdit] = []
    replaced: set[str] = set()
    for edit in edits:
        if isinstance(edit, Config | File):
            raise SurgeryError(f"edits of kind {type(edit).__name__} are not written into weights")
        if isinstance(edit, Replace):
            if edit.name in replaced:
                raise SurgeryError(f"tensor {edit.name} is replaced twice")
            replaced.add(edit.name)
        elif isinstance(edit, Add | Drop | Rename):
            # The name stands for another tensor from here on.
            replaced -= {edit.name, edit.new if isinstance(edit, Rename) else edit.name}
        result.append(edit)
    return result
