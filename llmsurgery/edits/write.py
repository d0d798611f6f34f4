"""Write edits into a publication block by block, hashing each changed tensor before and after."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from llmsurgery.checkpoint import FLOAT, Checkpoint, Publication, decode, require_finite, tensor_digest
from llmsurgery.edits.arrange import Result, arrange
from llmsurgery.edits.evaluate import edit_values, require_finite_edit, round_rows, round_values
from llmsurgery.edits.kinds import Slice, StoredEdit
from llmsurgery.edits.origin import Moves, Origin, Stored, blank_blocks, blank_rows, kept_rows, take
from llmsurgery.errors import NoEffectError

Compute = Callable[[Stored, int, int], Stored]
"""Takes old rows, first row and one past the last in the source; returns the new rows that come from them."""

Sink = Callable[[str, int, Stored, Stored], None]
"""Takes name in the source, first row, old rows, and what the result says of them: new rows, zeros where cut off."""


@dataclass(frozen=True)
class TensorChange:
    """What happened to the tensor of one stored name.

    Attributes:
        name: Stored name.
        role: Role of the tensor, or "other".
        dtype: Stored dtype code.
        shape: Stored shape; that in the source if the result has no such tensor.
        entries: Number of entries.
        entries_changed: Number of entries whose bytes changed, against the tensor it comes from; what a slice cuts off
            counts as set to zero, a new or dropped tensor counts as a whole.
        norm_change: Frobenius norm of that change over the norm of the tensor before.
        sha256_before: Digest of the bytes of this name in the source; None if there were none.
        sha256_after: Digest of the bytes of this name in the result; None if there are none.
        source: Name in the source of the tensor that it comes from, if that is another.
        shape_before: Shape of that tensor, if that is another.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    entries_changed: int
    norm_change: float
    sha256_before: str | None
    sha256_after: str | None
    source: str | None = None
    shape_before: tuple[int, ...] | None = None

    @property
    def changed(self) -> bool:
        """Whether any byte of the tensor changed."""
        return self.sha256_before != self.sha256_after


@dataclass(frozen=True)
class Streamed:
    """What was seen while a tensor was written.

    Attributes:
        before: Digest of the tensor that it comes from.
        after: Digest of the new one.
        entries_changed: As in `TensorChange`.
        norm_change: As in `TensorChange`.
    """

    before: str
    after: str
    entries_changed: int = 0
    norm_change: float = 0.0


def group_edits(edits: Iterable[StoredEdit]) -> dict[str, list[StoredEdit]]:
    """Group edits by stored name, keeping their order."""
    groups: dict[str, list[StoredEdit]] = defaultdict(list)
    for edit in edits:
        groups[edit.name].append(edit)
    return dict(groups)


def write_tensor(
    checkpoint: Checkpoint,
    origin: Origin,
    compute: Compute,
    publication: Publication | None,
    observe: Sink | None = None,
) -> Streamed:
    """Compute a tensor's new bytes block by block and write those that are not there yet.

    Args:
        checkpoint: The source.
        origin: Where the tensor comes from.
        compute: Returns the new rows that come from a block; for a tensor without source it is given zeros.
        publication: The open publication; None only measures.
        observe: Receives every block of the source in which a byte changed.

    Raises:
        DamagedError: The source tensor holds NaN or Inf, or is missing.
    """
    before_digest, after_digest = hashlib.sha256(), hashlib.sha256()
    entries_changed = 0
    change_squared = before_squared = 0.0
    shape = origin.shape if origin.source is None else checkpoint.info(origin.source).shape
    for start, raw in _blocks(checkpoint, origin):
        rows = raw.shape[0] if raw.ndim else 1
        new = compute(raw, start, start + rows)
        before_digest.update(np.ascontiguousarray(raw).tobytes())
        after_digest.update(np.ascontiguousarray(new).tobytes())
        result = origin.spread(new, rows, start, shape)
        # Bytes, not values, decide: -0.0 against 0.0 is a change on disk.
        count = int(np.count_nonzero(raw.view(f"u{raw.itemsize}") != result.view(f"u{result.itemsize}")))
        if origin.dtype in FLOAT:
            before = decode(raw, origin.dtype).astype(np.float64)
            before_squared += float(np.vdot(before, before))
            if count:
                difference = decode(result, origin.dtype).astype(np.float64) - before
                change_squared += float(np.vdot(difference, difference))
        if publication is not None and new.size and (count or origin.keep):
            publication.patch_rows(origin.name, origin.rows(start, start + rows)[0], new)
        if observe is not None and count and origin.source is not None:
            observe(origin.source, start, raw, result)
        entries_changed += count
    norm = float(np.sqrt(change_squared / before_squared)) if before_squared else float(change_squared > 0)
    return Streamed(before_digest.hexdigest(), after_digest.hexdigest(), entries_changed, norm)


def _blocks(checkpoint: Checkpoint, origin: Origin) -> Iterator[tuple[int, Stored]]:
    if origin.source is None:
        for start, stop in blank_blocks(origin.shape):
            yield start, blank_rows(origin, start, stop)
        return
    for start, stop in checkpoint.row_blocks(origin.source):
        raw = checkpoint.read(origin.source, start, stop)
        require_finite(raw, origin.dtype, origin.source, start)
        yield start, raw


def moved_tensor(checkpoint: Checkpoint, source: str) -> Streamed:
    """Return the record of a tensor that keeps its bytes under another name."""
    info = checkpoint.info(source)
    digest = tensor_digest(info.path, info.start, info.end)
    return Streamed(digest, digest)


def gone_tensor(checkpoint: Checkpoint, source: str, observe: Sink | None) -> str:
    """Return the digest of a tensor that the result lacks, after showing all of it to an observer."""
    digest = hashlib.sha256()
    for start, stop in checkpoint.row_blocks(source):
        raw = checkpoint.read(source, start, stop)
        digest.update(raw.reshape(-1).view(np.uint8).data)
        if observe is not None:
            observe(source, start, raw, np.zeros_like(raw))
    return digest.hexdigest()


def records_of(
    checkpoint: Checkpoint,
    names: Iterable[str],
    moves: Moves,
    streamed: Mapping[str, Streamed],
    gone: Mapping[str, str],
    role_of: Callable[[str], str],
) -> list[TensorChange]:
    """Return one record per name.

    Args:
        checkpoint: The source.
        names: Names in the source or in the result; those in neither are left out.
        moves: How names and shapes changed.
        streamed: What was seen, by name in the result.
        gone: Digests of the tensors that the result lacks, by name in the source.
        role_of: Maps a stored name to its role.
    """
    digests = {**gone, **{s: seen.before for n, seen in streamed.items() if (s := moves.origin(checkpoint, n).source)}}
    records = []
    for name in names:
        seen, old = streamed.get(name), checkpoint.tensors.get(name)
        before = digests[name] if old is not None else None
        if seen is not None:
            origin = moves.origin(checkpoint, name)
            start = checkpoint.tensors.get(origin.source or name)
            records.append(TensorChange(
                name=name,
                role=role_of(name),
                dtype=origin.dtype,
                shape=origin.shape,
                entries=prod(origin.shape),
                entries_changed=seen.entries_changed if origin.source is not None else prod(origin.shape),
                norm_change=seen.norm_change if origin.source is not None else 1.0,
                sha256_before=before,
                sha256_after=seen.after,
                source=origin.source if origin.source != name else None,
                shape_before=start.shape if start is not None and start.shape != origin.shape else None,
            ))  # fmt: skip
        elif old is not None:
            records.append(
                TensorChange(name, role_of(name), old.dtype, old.shape, old.size, old.size, 1.0, before, None)
            )
    return records


def write_edits(
    checkpoint: Checkpoint,
    publication: Publication | None,
    edits: Sequence[StoredEdit],
    role_of: Callable[[str], str],
    observe: Sink | None = None,
    beside: bool = False,
) -> list[TensorChange]:
    """Apply edits to the private copy inside a publication.

    Args:
        checkpoint: The source.
        publication: The open publication, whose `rewrite` and `layout` are those of `arrange`; None only measures what
            would change.
        edits: Edits of stored tensors, in the order in which they apply.
        role_of: Maps a stored name to its role for the report.
        observe: Receives every changed block of the source, for undo data.
        beside: Whether files beside the weights change, so that it is no failure if no weight does.

    Returns:
        One record per edited name, in stored order of first edit.

    Raises:
        NoEffectError: There are no edits, or not one byte changed.
        DamagedError: A tensor that is read holds NaN or Inf, or is missing.
        DivergedError: An edit holds NaN or Inf or overflows.
    """
    for edit in edits:
        require_finite_edit(edit)
    arrangement = arrange(checkpoint, edits)
    streamed = {
        name: _write(checkpoint, result, publication, observe) for name, result in arrangement.results.items()
    }  # fmt: skip
    gone = {name: gone_tensor(checkpoint, name, observe) for name in arrangement.moves.gone}
    changes = records_of(checkpoint, arrangement.mentioned, arrangement.moves, streamed, gone, role_of)
    if not beside and not any(change.changed for change in changes):
        raise NoEffectError(
            f"no stored weight changed ({len(changes)} tensors were edited)",
            "every edit was zero after rounding to the stored dtype",
            "raise the step size or the number of steps (--set lr=..., --set max_steps=...)",
        )
    return changes


def _write(
    checkpoint: Checkpoint, result: Result, publication: Publication | None, observe: Sink | None
) -> Streamed:  # fmt: skip
    source = result.origin.source
    if source is not None and not result.written:
        return moved_tensor(checkpoint, source)
    if source is None:
        new = _new_values(result)
        compute: Compute = lambda raw, start, stop: new[start:stop] if new.ndim else new  # noqa: E731
    else:
        compute = partial(_compute, result, checkpoint.info(source).shape)
    return write_tensor(checkpoint, result.origin, compute, publication, observe)


def _new_values(result: Result) -> Stored:
    """Return a new tensor as stored."""
    values = np.array(result.values, dtype=np.float64)
    values, _, _ = _steps(result, values, values.shape, 0, values.shape[0] if values.ndim else 1)
    return round_values(values, result.origin.dtype, result.origin.name)


def _compute(result: Result, shape: tuple[int, ...], raw: Stored, start: int, stop: int) -> Stored:
    origin = result.origin
    kept = origin.take(raw, start)
    if not kept.size or all(isinstance(step, Slice) for step in result.steps):
        return kept
    values = decode(raw, origin.dtype).astype(np.float64)
    values, _, _ = _steps(result, values, shape, start, stop)
    return round_rows(values, kept, origin)


def _steps(
    result: Result, values: Stored, shape: tuple[int, ...], start: int, stop: int
) -> tuple[Stored, int, int]:  # fmt: skip
    """Take rows `start:stop` of a tensor of some shape through edits and slices, in float64."""
    for step in result.steps:
        if isinstance(step, Slice):
            values = take(values, {step.axis: step.keep}, start)
            shape = (*shape[: step.axis], step.keep.size, *shape[step.axis + 1 :])
            if step.axis == 0:
                start, stop = kept_rows(step.keep, start, stop)
        elif stop > start:
            values = edit_values([step], values, shape, start, stop)
    return values, start, stop
