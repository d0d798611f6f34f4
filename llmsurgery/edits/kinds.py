"""The edits: every method, closed form or trained, ends in a list of these and nothing else touches a checkpoint.

Names are the names stored on disk. Arrays are numpy arrays in float32 or better; they are combined with the stored
weights in float64 and rounded once to the stored dtype (`llmsurgery.edits.evaluate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class LowRank:
    """W + u v for one stored matrix.

    Attributes:
        name: Stored tensor name.
        u: Left factor [rows, rank], in the orientation of the stored matrix, scale included.
        v: Right factor [rank, columns].
    """

    name: str
    u: Array
    v: Array


@dataclass(frozen=True, eq=False)
class Replace:
    """New values for one stored tensor of the same shape.

    Attributes:
        name: Stored tensor name.
        values: The new values, in the stored shape.
    """

    name: str
    values: Array


@dataclass(frozen=True, eq=False)
class Mask:
    """Zero the entries of one stored tensor where `keep` is False (same shape)."""

    name: str
    keep: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sparse:
    """New values for a few entries of one stored tensor, addressed by flat index in ascending order."""

    name: str
    indices: npt.NDArray[np.int64]
    values: Array


@dataclass(frozen=True, eq=False)
class Slice:
    """Keep only some indices of one axis of a stored tensor."""

    name: str
    axis: int
    keep: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drop:
    """Remove a stored tensor."""

    name: str


@dataclass(frozen=True, eq=False)
class Add:
    """Store a tensor that was not there."""

    name: str
    values: Array


@dataclass(frozen=True)
class Config:
    """Set one value of a JSON side file, for example `("config.json", "eos_token_id")`."""

    path: tuple[str, ...]
    value: str | int | float | bool | None


@dataclass(frozen=True)
class File:
    """A file beside the weights."""

    path: str
    content: bytes


TensorEdit = LowRank | Replace | Mask | Sparse
"""The edits that change bytes of a stored tensor in place."""

Edit = LowRank | Replace | Mask | Sparse | Slice | Drop | Add | Config | File
