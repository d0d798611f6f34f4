"""Several patches on one base: where they meet, and the tensors that they make together.

Patches that touch different tensors add up in any order. On one tensor they do where both are low-rank (the terms are
summed and rounded once), where they set different entries, and where they make the same bytes. Anything else is a
conflict: the later patch would undo a part of the earlier one, and which is later is a choice for people to make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint import Checkpoint, Publication
from llmsurgery.edits.apply import PatchedRows, check_written, write_patch_files, write_patched
from llmsurgery.edits.delta import as_bits
from llmsurgery.edits.evaluate import evaluate_rows
from llmsurgery.edits.indices import FlagReader
from llmsurgery.edits.kinds import LowRank
from llmsurgery.edits.origin import Moves, Origin, Stored
from llmsurgery.edits.patch import Patch
from llmsurgery.edits.patch_entries import FilePatch, TensorPatch
from llmsurgery.edits.write import Sink, Streamed, TensorChange, gone_tensor, records_of, write_tensor

ADDITIVE, DISJOINT, EQUAL, CONFLICT, MOVED = "additive", "disjoint", "equal", "conflict", "moved"
"""How two patches meet: their low-rank terms add up; they set different entries; they make the same bytes; the later
one overwrites the earlier one; a name or shape changes, so that there is no order in which both make sense."""

_PIECE = 1 << 20


@dataclass(frozen=True)
class Overlap:
    """A tensor or file that two patches change.

    Attributes:
        name: Stored name of the tensor, or the file.
        kind: ADDITIVE, DISJOINT, EQUAL, CONFLICT or MOVED.
        first: Place of the earlier patch in the stack.
        second: Place of the later one.
        forms: What each does to it ("low-rank", "entries", "all entries", "file").
    """

    name: str
    kind: str
    first: int
    second: int
    forms: tuple[str, str]


def find_overlaps(patches: Sequence[Patch], base: Checkpoint) -> list[Overlap]:
    """Return everything that two of several patches change, in the order of the patches.

    Args:
        patches: The patches, all of them for the base.
        base: Their base.
    """
    found = []
    for (i, first), (j, second) in combinations(enumerate(patches), 2):
        touched = _touched(second)
        for name in (name for name in _touched(first) if name in touched):
            own, other = first.tensors.get(name), second.tensors.get(name)
            if own is None or other is None or not (own.in_place and other.in_place):
                found.append(Overlap(name, MOVED, i, j, ("name or shape", "name or shape")))
                continue
            forms = (_form(own), _form(other))
            found.append(Overlap(name, _meeting(first, second, own, other, base), i, j, forms))
        files = {file.path: file for file in second.files}
        for file in first.files:
            if (same := files.get(file.path)) is not None:
                kind = EQUAL if same.after == file.after else CONFLICT
                found.append(Overlap(file.path, kind, i, j, ("file", "file")))
    return found


def _touched(patch: Patch) -> dict[str, None]:
    names = dict.fromkeys(patch.gone)
    for tensor in patch.tensors.values():
        names |= {tensor.name: None} | ({tensor.source: None} if tensor.source is not None else {})
    return names


def _form(tensor: TensorPatch) -> str:
    if tensor.factors:
        return "low-rank"
    return "all entries" if tensor.exact is None or tensor.exact.at is None else "entries"


def _meeting(first: Patch, second: Patch, own: TensorPatch, other: TensorPatch, base: Checkpoint) -> str:
    if own.after == other.after:
        return EQUAL
    if own.factors and other.factors:
        sums = _is_sum(first, own, base) and _is_sum(second, other, base)
        return ADDITIVE if sums else CONFLICT
    if "entries" == _form(own) == _form(other):
        return DISJOINT if _are_disjoint(first, second, own, other) else CONFLICT
    return CONFLICT


def _is_sum(patch: Patch, tensor: TensorPatch, base: Checkpoint) -> bool:
    """Whether the entries listed beside the factors only settle how the sum is rounded."""
    if tensor.exact is None:
        return True
    rows, terms = PatchedRows(patch, tensor), patch.low_rank(tensor)
    for start, stop in base.row_blocks(tensor.name):
        raw = base.read(tensor.name, start, stop)
        listed, summed = rows.compute(raw, start, stop), evaluate_rows(terms, raw, rows.origin, start, stop)
        # Rounding a tie the other way moves an entry to its neighbour and no further.
        if np.abs(_ranks(listed) - _ranks(summed)).max(initial=0) > 1:
            return False
    return True


def _ranks(raw: Stored) -> npt.NDArray[np.int64]:
    """Return stored floats as integers in the order of their values: neighbours are one apart, both zeros are 0."""
    bits = as_bits(raw).astype(np.int64)
    sign = np.int64(1) << (8 * raw.itemsize - 1)
    return np.where(bits & sign, -(bits & ~sign), bits)


def _are_disjoint(first: Patch, second: Patch, own: TensorPatch, other: TensorPatch) -> bool:
    if own.exact is not None and other.exact is not None and own.exact.values is other.exact.values is None:
        # Both set entries to zero.
        return True
    size = prod(own.shape)
    readers = [
        FlagReader(tensor.exact.encoding, patch.reader(tensor.exact.at), size)
        for patch, tensor in ((first, own), (second, other))
        if tensor.exact is not None and tensor.exact.at is not None
    ]
    for start in range(0, size, _PIECE):
        one, two = (reader.take(min(_PIECE, size - start)) for reader in readers)
        if (one & two).any():
            return False
    return True


def stacked_moves(patches: Sequence[Patch]) -> Moves:
    """Return how names and shapes change; no two patches may move the same tensor."""
    moves = [patch.moves() for patch in patches]
    origins = {name: origin for one in moves for name, origin in one.origins.items()}
    return Moves(origins, tuple(name for one in moves for name in one.gone))


def stacked_factors(patches: Sequence[Patch]) -> dict[str, list[LowRank]]:
    """Return the low-rank terms of every tensor that is the base plus such terms and nothing else."""
    found: dict[str, list[LowRank]] = {}
    for name, touching in _by_tensor(patches).items():
        if all(tensor.factors for _, tensor in touching):
            found[name] = [term for patch, tensor in _distinct(touching) for term in patch.low_rank(tensor)]
    return found


def stacked_files(patches: Sequence[Patch]) -> dict[str, tuple[Patch, FilePatch]]:
    """Return the patch that has the last word on every side file."""
    return {file.path: (patch, file) for patch in patches for file in patch.files}


Touching = list[tuple[Patch, TensorPatch]]


def _by_tensor(patches: Sequence[Patch]) -> dict[str, Touching]:
    found: dict[str, Touching] = {}
    for patch in patches:
        for name, tensor in patch.tensors.items():
            found.setdefault(name, []).append((patch, tensor))
    return found


def _distinct(touching: Touching) -> Touching:
    """Return the patches of a tensor without those that make the same bytes as an earlier one."""
    return list({tensor.after: (patch, tensor) for patch, tensor in reversed(touching)}.values())[::-1]


def apply_stack(
    patches: Sequence[Patch],
    base: Checkpoint,
    publication: Publication,
    role_of: Callable[[str], str],
    observe: Sink | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[TensorChange]:
    """Apply several patches to the private copy inside a publication.

    Args:
        patches: The patches, whose base has been checked and whose overlaps were accepted; where they overlap, a later
            one sets its entries on top of what the earlier ones made.
        base: The source of the publication.
        publication: The open publication, whose `rewrite` and `layout` are those of all patches.
        role_of: Maps a stored name to its role for the report.
        observe: Receives every changed block, for undo data.
        tick: Called once per tensor.

    Raises:
        DamagedError: A tensor that one patch alone changes is not the one that it was made from.
    """
    moves, tensors = stacked_moves(patches), _by_tensor(patches)
    streamed: dict[str, Streamed] = {}
    for name, touching in tensors.items():
        distinct = _distinct(touching)
        if len(distinct) == 1:
            ((patch, tensor),) = distinct
            streamed[name] = write_patched(patch, tensor, base, publication, observe)
            check_written(patch, tensor, streamed[name])
        else:
            rows = _StackedRows(distinct, base)
            streamed[name] = write_tensor(base, rows.origin, rows.compute, publication, observe)
            rows.finish()
        tick()
    gone = {name: gone_tensor(base, name, observe) for name in moves.gone}
    every = [tensor for touching in tensors.values() for _, tensor in touching]
    names = {tensor.source or tensor.name: None for tensor in every} | dict.fromkeys(moves.gone)
    for patch, file in stacked_files(patches).values():
        write_patch_files(patch, [file], publication)
    return records_of(base, names | dict.fromkeys(tensors), moves, streamed, gone, role_of)


class _StackedRows:
    """Computes the rows of a tensor that several patches change, block by block."""

    def __init__(self, touching: Touching, base: Checkpoint) -> None:
        # What a patch lists beside its factors is right on the base alone, not on top of another change.
        self.parts = [
            patch.low_rank(tensor) if tensor.factors and _is_sum(patch, tensor, base) else PatchedRows(patch, tensor)
            for patch, tensor in touching
        ]
        self.origin = Origin.of(base, touching[0][1].name)
        if all(isinstance(part, list) for part in self.parts):
            self.parts = [[term for part in self.parts if isinstance(part, list) for term in part]]

    def compute(self, raw: Stored, start: int, stop: int) -> Stored:
        """Return the new rows of rows `start:stop`; must be called in order."""
        for part in self.parts:
            if isinstance(part, list):
                raw = evaluate_rows(part, raw, self.origin, start, stop)
            else:
                raw = part.compute(raw, start, stop)
        return raw

    def finish(self) -> None:
        """Check that the patches held no more than the tensor took."""
        for part in self.parts:
            if isinstance(part, PatchedRows):
                part.finish()


def conflicts(overlaps: Sequence[Overlap], allowed: bool) -> list[Overlap]:
    """Return the overlaps that stand in the way.

    Args:
        overlaps: All of them.
        allowed: Whether a later patch may overwrite an earlier one.
    """
    return [one for one in overlaps if one.kind == MOVED or (one.kind == CONFLICT and not allowed)]


def counts(overlaps: Sequence[Overlap]) -> Mapping[str, int]:
    """Return how many overlaps there are of each kind."""
    kinds = [one.kind for one in overlaps]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
