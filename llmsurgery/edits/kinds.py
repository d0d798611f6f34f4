"""The edits: every method, closed form or trained, ends in a list of these and nothing else touches a checkpoint.

Names are the names stored on disk. Arrays are numpy arrays in float32 or better; they are combined with the stored
weights in float64 and rounded once to the stored dtype (`llmsurgery.edits.evaluate`).

Edits apply in the order of the list, and each one names a tensor as the edits before it left it: what changes values
after a `Slice` has the smaller shape, what follows a `Rename` uses the new name, and a name is free again once its
tensor was dropped or renamed. To drop block 4 of a model, drop its tensors, then rename those of block 5 to 4, 6 to 5,
and so on, and set the number of blocks with `Config`. However many edits a tensor gets, it is rounded once, at the end.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

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
    """Keep only some indices of one axis of a stored tensor; what is kept keeps its bytes.

    Attributes:
        name: Stored tensor name.
        axis: The axis, from 0.
        keep: Indices to keep, ascending and each once.
    """

    name: str
    axis: int
    keep: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drop:
    """Remove a stored tensor."""

    name: str


@dataclass(frozen=True, eq=False)
class Add:
    """Store a tensor that was not there, in the file of the tensors of its block.

    Attributes:
        name: Stored tensor name, which must be free.
        values: Its values.
        dtype: Stored dtype code; None takes the one that most of the checkpoint is stored in.
    """

    name: str
    values: Array
    dtype: str | None = None


@dataclass(frozen=True)
class Rename:
    """Store a tensor under another name, in the same file.

    Attributes:
        name: Stored tensor name.
        new: Its new name, which must be free: drop or rename what has it first.
    """

    name: str
    new: str


class Removed(enum.Enum):
    """What stands in the place of a value that is to be removed."""

    REMOVED = "removed"


REMOVED = Removed.REMOVED

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"
"""Any JSON value."""


@dataclass(frozen=True)
class Config:
    """Set or remove one value of a JSON side file.

    Attributes:
        path: The file and the keys that lead to the value, for example `("config.json", "eos_token_id")`.
        value: The value, or `REMOVED`.
    """

    path: tuple[str, ...]
    value: Json | Removed


@dataclass(frozen=True)
class File:
    """A file beside the weights."""

    path: str
    content: bytes


TensorEdit = LowRank | Replace | Mask | Sparse
"""The edits that change bytes of a stored tensor in place."""

StoredEdit = TensorEdit | Slice | Drop | Add | Rename
"""The edits of stored tensors."""

Edit = StoredEdit | Config | File
