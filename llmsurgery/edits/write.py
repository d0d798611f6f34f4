"""Write edits into a publication block by block, hashing each changed tensor before and after."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint import FLOAT, Checkpoint, Publication, TensorInfo, decode, require_finite
from llmsurgery.edits.evaluate import evaluate_rows, require_fit
from llmsurgery.edits.kinds import TensorEdit
from llmsurgery.errors import NoEffectError

Stored = npt.NDArray[Any]
"""Rows as stored, of dtype `storage_dtype`."""

Compute = Callable[[Stored, int, int], Stored]
"""Takes old rows, first row and one past the last; returns the new rows."""

Sink = Callable[[str, int, Stored, Stored], None]
"""Takes stored name, first row, old rows and new rows of a block that changed."""


@dataclass(frozen=True)
class TensorChange:
    """What happened to one stored tensor.

    Attributes:
        name: Stored name.
        role: Role of the tensor, or "other".
        dtype: Stored dtype code.
        shape: Stored shape.
        entries: Number of entries.
        entries_changed: Number of entries whose bytes changed.
        norm_change: Frobenius norm of the change over the norm of the tensor before.
        sha256_before: Digest of the tensor's bytes in the source.
        sha256_after: Digest of its bytes in the result.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    entries_changed: int
    norm_change: float
    sha256_before: str
    sha256_after: str

    @property
    def changed(self) -> bool:
        """Whether any byte of the tensor changed."""
        return self.sha256_before != self.sha256_after


def group_edits(edits: Iterable[TensorEdit]) -> dict[str, list[TensorEdit]]:
    """Group edits by stored name, keeping their order."""
    groups: dict[str, list[TensorEdit]] = defaultdict(list)
    for edit in edits:
        groups[edit.name].append(edit)
    return dict(groups)


def change_tensor(
    checkpoint: Checkpoint,
    name: str,
    role: str,
    compute: Compute,
    sinks: Sequence[Sink],
) -> TensorChange:
    """Compute a tensor's new bytes block by block and hand the changed blocks on.

    Args:
        checkpoint: The source.
        name: Stored name.
        role: Its role, for the record.
        compute: Returns the new rows of a block.
        sinks: Receive every block in which a byte changed.

    Raises:
        DamagedError: The tensor holds NaN or Inf, or is missing.
    """
    info = checkpoint.info(name)
    before_digest, after_digest = hashlib.sha256(), hashlib.sha256()
    entries_changed = 0
    change_squared = before_squared = 0.0
    for start, stop in checkpoint.row_blocks(name):
        raw = checkpoint.read(name, start, stop)
        require_finite(raw, info.dtype, name, start)
        result = compute(raw, start, stop)
        before_digest.update(np.ascontiguousarray(raw).tobytes())
        after_digest.update(np.ascontiguousarray(result).tobytes())
        # Bytes, not values, decide: -0.0 against 0.0 is a change on disk.
        count = int(np.count_nonzero(raw.view(f"u{raw.itemsize}") != result.view(f"u{result.itemsize}")))
        if info.dtype in FLOAT:
            before = decode(raw, info.dtype).astype(np.float64)
            before_squared += float(np.vdot(before, before))
            if count:
                difference = decode(result, info.dtype).astype(np.float64) - before
                change_squared += float(np.vdot(difference, difference))
        if count:
            for sink in sinks:
                sink(name, start, raw, result)
            entries_changed += count
    return TensorChange(
        name=name,
        role=role,
        dtype=info.dtype,
        shape=info.shape,
        entries=info.size,
        entries_changed=entries_changed,
        norm_change=float(np.sqrt(change_squared / before_squared)) if before_squared else float(change_squared > 0),
        sha256_before=before_digest.hexdigest(),
        sha256_after=after_digest.hexdigest(),
    )


def patching(publication: Publication) -> Sink:
    """Return a sink that writes changed blocks into a publication."""

    def sink(name: str, start: int, raw: Stored, result: Stored) -> None:
        del raw
        publication.patch_rows(name, start, result)

    return sink


def write_edits(
    checkpoint: Checkpoint,
    publication: Publication | None,
    edits: Sequence[TensorEdit],
    role_of: Callable[[str], str],
    observe: Sink | None = None,
) -> list[TensorChange]:
    """Apply edits to the private copy inside a publication.

    Args:
        checkpoint: The source.
        publication: The open publication, whose `rewrite` named these tensors; None only measures what would change.
        edits: In-place tensor edits, in the order in which they apply.
        role_of: Maps a stored name to its role for the report.
        observe: Receives every changed block, old and new, for undo data.

    Returns:
        One record per edited tensor, in stored order of first edit.

    Raises:
        NoEffectError: There are no edits, or not one byte changed.
        DamagedError: A tensor that is read holds NaN or Inf, or is missing.
        DivergedError: An edit holds NaN or Inf or overflows.
    """
    sinks = [patching(publication)] if publication is not None else []
    sinks += [observe] if observe is not None else []
    changes = []
    for name, group in group_edits(edits).items():
        info = checkpoint.info(name)
        for edit in group:
            require_fit(edit, info)
        compute = partial(_compute, group, info)
        changes.append(change_tensor(checkpoint, name, role_of(name), compute, sinks))
    if not any(change.changed for change in changes):
        raise NoEffectError(
            f"no stored weight changed ({len(changes)} tensors were edited)",
            "every edit was zero after rounding to the stored dtype",
            "raise the step size or the number of steps (--set lr=..., --set max_steps=...)",
        )
    return changes


def _compute(edits: Sequence[TensorEdit], info: TensorInfo, raw: Stored, start: int, stop: int) -> Stored:
    return evaluate_rows(edits, raw, info, start, stop)
