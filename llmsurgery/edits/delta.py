"""What differs between two checkpoints: tensors in bounded memory, and side files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsurgery.checkpoint import FLOAT, Checkpoint, decode, file_digest
from llmsurgery.checkpoint.inventory import Inventory
from llmsurgery.edits.origin import Origin, Stored

CARDS = frozenset({"README.md"})
"""Side files that describe a checkpoint and are no part of what it computes."""


@dataclass(frozen=True)
class TensorDelta:
    """How one tensor differs.

    Attributes:
        name: Stored name.
        dtype: Stored dtype code.
        shape: Stored shape.
        entries: Number of entries.
        entries_changed: Entries whose bytes differ.
        change_squared: Squared Frobenius norm of the difference; NaN if a value is not finite, 0 for integers.
        before_squared: Squared Frobenius norm of the tensor before.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    entries_changed: int = 0
    change_squared: float = 0.0
    before_squared: float = 0.0


@dataclass(frozen=True)
class FileDelta:
    """How one side file differs.

    Attributes:
        path: Relative name.
        before: SHA-256 in the first checkpoint, None if it is not there.
        after: SHA-256 in the second, None if it is not there.
    """

    path: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        tensors: Every tensor that both hold in the same dtype and shape.
        only_before: Names that only the first holds.
        only_after: Names that only the second holds.
        reshaped: Names whose dtype or shape differ.
        files: Side files that differ.
    """

    tensors: list[TensorDelta]
    only_before: list[str]
    only_after: list[str]
    reshaped: list[str]
    files: list[FileDelta]

    @property
    def changed(self) -> list[TensorDelta]:
        """The tensors of which at least one byte differs."""
        return [tensor for tensor in self.tensors if tensor.entries_changed]

    @property
    def same_structure(self) -> bool:
        """Whether both hold the same tensors in the same dtypes and shapes."""
        return not (self.only_before or self.only_after or self.reshaped)


def as_bits(raw: Stored) -> Stored:
    """Return stored entries as unsigned integers of the same width."""
    return raw.view(f"<u{raw.dtype.itemsize}")


def pair_blocks(before: Checkpoint, after: Checkpoint, origin: Origin) -> Iterator[tuple[int, int, Stored, Stored]]:
    """Yield (first row, one past the last, old rows, new rows) of a tensor of the second and what it comes from."""
    for start, stop, old in origin.base_blocks(before):
        yield start, stop, old, after.read(origin.name, start, stop)


def compare(before: Checkpoint, after: Checkpoint, tick: Callable[[], object] = lambda: None) -> Difference:
    """Compare two checkpoints.

    Args:
        before: The first.
        after: The second.
        tick: Called once per tensor.

    Raises:
        DamagedError: A file ends too early.
    """
    tensors, reshaped = [], []
    for name, info in before.tensors.items():
        other = after.tensors.get(name)
        if other is None:
            continue
        if (info.dtype, info.shape) != (other.dtype, other.shape):
            reshaped.append(name)
        else:
            tensors.append(compare_tensor(before, after, name))
        tick()
    return Difference(
        tensors,
        [name for name in before.tensors if name not in after.tensors],
        [name for name in after.tensors if name not in before.tensors],
        reshaped,
        compare_files(before, after),
    )


def compare_tensor(before: Checkpoint, after: Checkpoint, name: str) -> TensorDelta:
    """Compare one tensor that both hold in the same dtype and shape."""
    info, other = before.info(name), after.info(name)
    count, change_squared, before_squared = 0, 0.0, 0.0
    # Hard-linked shards are one file.
    if not (info.path.samefile(other.path) and info.start == other.start):
        for _, _, old, new in pair_blocks(before, after, Origin.of(before, name)):
            differing = int(np.count_nonzero(as_bits(old) != as_bits(new)))
            if info.dtype in FLOAT:
                first = decode(old, info.dtype).astype(np.float64)
                before_squared += float(np.vdot(first, first))
                if differing:
                    first -= decode(new, info.dtype)
                    change_squared += float(np.vdot(first, first))
            count += differing
    return TensorDelta(name, info.dtype, info.shape, info.size, count, change_squared, before_squared)


def side_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files beside the weights that belong to a checkpoint: no index, card or record of a run."""
    weights = {*checkpoint.headers, checkpoint.index_file}
    files = Inventory.of(checkpoint).files
    return {name: path for name, path in files.items() if name not in weights and name not in CARDS}


def side_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 of every side file by name."""
    return {name: file_digest(path) for name, path in side_files(checkpoint).items()}


def compare_files(before: Checkpoint, after: Checkpoint) -> list[FileDelta]:
    """Return the side files that differ, by name."""
    first, second = side_digests(before), side_digests(after)
    names = sorted({*first, *second})
    return [FileDelta(n, first.get(n), second.get(n)) for n in names if first.get(n) != second.get(n)]
