"""Work out, from headers alone, what a list of edits makes of every tensor it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np

from llmsurgery.checkpoint import FLOAT, Checkpoint
from llmsurgery.checkpoint.layout import Layout
from llmsurgery.edits.evaluate import require_shape
from llmsurgery.edits.kinds import Add, Array, Drop, Rename, Slice, StoredEdit, TensorEdit
from llmsurgery.edits.origin import Moves, Origin, compose
from llmsurgery.errors import SurgeryError

Step = TensorEdit | Slice


@dataclass(frozen=True, eq=False)
class Result:
    """A tensor of the result that edits name.

    Attributes:
        origin: Where it comes from.
        steps: What happens to its values, in order.
        values: What it starts from if it is new.
    """

    origin: Origin
    steps: tuple[Step, ...] = ()
    values: Array | None = None

    @property
    def written(self) -> bool:
        """Whether it is more than bytes of the source under some name."""
        return bool(self.steps) or self.values is not None


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What edits make of the tensors of a checkpoint.

    Attributes:
        results: Every tensor of the result that an edit names, by name in the result.
        moves: How names and shapes change.
        mentioned: Every name in the edits, in order of first mention.
        layout: Where the result's tensors lie; None if they lie where the source's do.
    """

    results: dict[str, Result]
    moves: Moves
    mentioned: tuple[str, ...]
    layout: Layout | None = field(repr=False)

    @property
    def rewrite(self) -> set[str]:
        """Names of the result's tensors that get new bytes."""
        return {name for name, result in self.results.items() if result.written}


def usual_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype code that most weights are stored in."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in FLOAT:
            counts[info.dtype] += info.size
    return max(counts, key=counts.__getitem__, default="F32")


def arrange(checkpoint: Checkpoint, edits: Sequence[StoredEdit]) -> Arrangement:
    """Follow edits through the names of a checkpoint, in the order of the list.

    Args:
        checkpoint: The source.
        edits: The edits.

    Raises:
        SurgeryError: An edit names a tensor that is not there any more or a name that is not free, or does not fit the
            tensor: a method's bug.
        DamagedError: The source lacks a tensor.
    """
    tensors: dict[str, Result] = {}
    mentioned: dict[str, None] = {}
    gone: set[str] = set()
    free: set[str] = set()

    def current(name: str) -> Result:
        if name in free:
            raise SurgeryError(f"edit of {name}: an earlier edit dropped or renamed it")
        return tensors.get(name) or Result(Origin.of(checkpoint, name))

    def require_free(name: str) -> None:
        if name in tensors or (name in checkpoint.tensors and name not in free):
            raise SurgeryError(f"a tensor {name} is there already")

    for edit in edits:
        name = edit.name
        mentioned.setdefault(name)
        if isinstance(edit, Add):
            require_free(name)
            tensors[name] = _added(checkpoint, edit)
            free.discard(name)
        elif isinstance(edit, Drop):
            source = current(name).origin.source
            gone |= set() if source is None else {source}
            tensors.pop(name, None)
            free.add(name)
        elif isinstance(edit, Rename):
            found = current(name)
            require_free(edit.new)
            mentioned.setdefault(edit.new)
            tensors.pop(name, None)
            free.add(name)
            tensors[edit.new] = replace(found, origin=replace(found.origin, name=edit.new))
            free.discard(edit.new)
        else:
            tensors[name] = _stepped(current(name), edit)
    origins = {name: result.origin for name, result in tensors.items() if not result.origin.in_place}
    moves = Moves(origins, tuple(name for name in checkpoint.tensors if name in gone))
    return Arrangement(tensors, moves, tuple(mentioned), moves.layout(checkpoint))


def _added(checkpoint: Checkpoint, edit: Add) -> Result:
    dtype = edit.dtype or usual_dtype(checkpoint)
    if dtype not in FLOAT:
        raise SurgeryError(f"tensor {edit.name} cannot be added in dtype {dtype}")
    origin = Origin(edit.name, dtype, edit.values.shape, None)
    require_shape(edit, origin)
    return Result(origin, values=edit.values)


def _stepped(result: Result, edit: Step) -> Result:
    origin = result.origin
    if not isinstance(edit, Slice):
        require_shape(edit, origin)
        return replace(result, steps=(*result.steps, edit))
    keep, axis = np.asarray(edit.keep), edit.axis
    if not 0 <= axis < len(origin.shape):
        _refuse(edit, f"axis {axis} is not one of its {len(origin.shape)}")
    length = origin.shape[axis]
    if keep.ndim != 1 or not keep.size or keep.dtype.kind not in "iu" or keep[0] < 0 or keep[-1] >= length:
        _refuse(edit, f"what is kept of axis {axis} are not indices below {length}")
    keep = keep.astype(np.int64)
    if (np.diff(keep) <= 0).any():
        _refuse(edit, f"what is kept of axis {axis} is not in ascending order")
    if keep.size == length:
        return result
    shape = (*origin.shape[:axis], keep.size, *origin.shape[axis + 1 :])
    kept = compose(origin.keep, axis, keep) if origin.source is not None else {}
    step = replace(edit, keep=keep)
    return replace(result, origin=replace(origin, shape=shape, keep=kept), steps=(*result.steps, step))


def _refuse(edit: Slice, why: str) -> NoReturn:
    raise SurgeryError(f"slice of {edit.name}: {why}")
