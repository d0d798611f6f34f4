"""Write edits into a publication block by block, hashing each changed tensor before and after."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llmsurgery.checkpoint import Checkpoint, Publication, decode, require_finite
from llmsurgery.edits.evaluate import evaluate_rows, require_fit
from llmsurgery.edits.kinds import TensorEdit
from llmsurgery.errors import NoEffectError


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


def _change_tensor(
    checkpoint: Checkpoint, publication: Publication, name: str, edits: Sequence[TensorEdit], role: str
) -> TensorChange:
    info = checkpoint.info(name)
    for edit in edits:
        require_fit(edit, info)
    before_digest, after_digest = hashlib.sha256(), hashlib.sha256()
    entries_changed = 0
    change_squared = before_squared = 0.0
    for start, stop in checkpoint.row_blocks(name):
        raw = checkpoint.read(name, start, stop)
        require_finite(raw, info.dtype, name)
        result = evaluate_rows(edits, raw, info, start, stop)
        before_digest.update(np.ascontiguousarray(raw).tobytes())
        after_digest.update(np.ascontiguousarray(result).tobytes())
        # Bytes, not values, decide: -0.0 against 0.0 is a change on disk.
        changed = raw.view(f"u{raw.itemsize}") != result.view(f"u{result.itemsize}")
        count = int(np.count_nonzero(changed))
        before = decode(raw, info.dtype).astype(np.float64)
        before_squared += float(np.vdot(before, before))
        if count:
            difference = decode(result, info.dtype).astype(np.float64) - before
            change_squared += float(np.vdot(difference, difference))
            publication.patch_rows(name, start, result)
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


def write_edits(
    checkpoint: Checkpoint, publication: Publication, edits: Sequence[TensorEdit], role_of: Callable[[str], str]
) -> list[TensorChange]:
    """Apply edits to the private copy inside a publication.

    Args:
        checkpoint: The source.
        publication: The open publication, whose `rewrite` named these tensors.
        edits: In-place tensor edits, in the order in which they apply.
        role_of: Maps a stored name to its role for the report.

    Returns:
        One record per edited tensor, in stored order of first edit.

    Raises:
        NoEffectError: There are no edits, or not one byte changed.
        DamagedError: A tensor that is read holds NaN or Inf, or is missing.
        DivergedError: An edit holds NaN or Inf or overflows.
    """
    groups = group_edits(edits)
    changes = [_change_tensor(checkpoint, publication, name, group, role_of(name)) for name, group in groups.items()]
    if not any(change.changed for change in changes):
        raise NoEffectError(
            f"no stored weight changed ({len(changes)} tensors were edited)",
            "every edit was zero after rounding to the stored dtype",
            "raise the step size or the number of steps (--set lr=..., --set max_steps=...)",
        )
    return changes
