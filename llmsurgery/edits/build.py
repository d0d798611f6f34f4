"""Build a patch from a base, a result, and the low-rank factors that a run hands over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmsurgery.checkpoint import ITEMSIZE, Checkpoint, encode, file_digest, tensor_digest
from llmsurgery.checkpoint.carry import permission_bits
from llmsurgery.checkpoint.container import Part, write_container
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.delta import FileDelta, as_bits, pair_blocks
from llmsurgery.edits.evaluate import exact_rows, round_rows
from llmsurgery.edits.indices import Flags, Sizes, encode_flags, encode_positions
from llmsurgery.edits.kinds import Array, LowRank
from llmsurgery.edits.origin import Moves, Origin, Stored
from llmsurgery.edits.patch_entries import FACTORS_KEY, KEY, Exact, FilePatch, TensorPatch, encode_metadata

MARGIN = 1e-12
"""Distance to a rounding boundary, relative to the terms of the sum, within which an entry is listed."""

# More exceptions than this speak for another form; they are held in memory.
_MOST_EXCEPTIONS = 1 << 20
_PIECE = 4 << 20


@dataclass
class _Survey:
    """One pass over a changed tensor: digests, sizes of every form, exceptions to its factors."""

    before: str = ""
    after: str = ""
    sizes: Sizes = field(default_factory=Sizes)
    zeros_only: bool = True
    exceptions: list[np.ndarray[tuple[int], np.dtype[np.int64]]] | None = None
    exception_values: list[Stored] = field(default_factory=list)


def write_patch(
    stream: BinaryIO,
    base: Checkpoint,
    result: Checkpoint,
    names: Iterable[str],
    factors: Mapping[str, Sequence[LowRank]],
    files: Sequence[FileDelta],
    provenance: Mapping[str, object],
    moves: Moves | None = None,
) -> str:
    """Write a patch that turns a base into a result.

    Args:
        stream: An empty seekable file.
        base: The base.
        result: The result; tensors not named are taken to be equal.
        names: Tensors that differ; those that only the base holds are passed over.
        factors: Low-rank terms of tensors that are nothing but base plus these terms, rounded once. They are checked:
            where they do not give the result, or take more room, another form is written.
        files: Side files that differ.
        provenance: What made the result.
        moves: How the names and shapes of the result follow from those of the base, where they differ.

    Returns:
        The patch's digest.
    """
    parts: list[Part] = []
    tensors: dict[str, TensorPatch] = {}
    moves = moves or Moves()
    for name in dict.fromkeys([*names, *moves.origins]):
        if name in result.tensors:
            tensors[name] = _describe(base, result, moves.origin(base, name), factors.get(name, ()), parts)
    gone = {name: tensor_digest(i.path, i.start, i.end) for name in moves.gone for i in [base.info(name)]}
    entries = [_file_patch(result, change, parts) for change in files]
    metadata = encode_metadata(file_digest(base.root / "config.json"), tensors, entries, provenance, KEY, gone)
    return write_container(stream, parts, metadata)


def write_factors(
    stream: BinaryIO,
    factors: Mapping[str, Sequence[LowRank]],
    digests: Mapping[str, str],
    origins: Mapping[str, tuple[Origin, tuple[int, ...]]] | None = None,
) -> None:
    """Write low-rank factors and origins alone, so that a later `diff` can make a small patch.

    Args:
        stream: An empty seekable file.
        factors: Low-rank terms by stored name.
        digests: SHA-256 of each tensor in the result.
        origins: Where tensors come from that have another name or shape than in the source, and their shape there.
    """
    parts: list[Part] = []
    tensors = {}
    for name, (origin, shape) in (origins or {}).items():
        pairs = _factor_parts(name, factors.get(name, ()), parts)
        tensors[name] = TensorPatch(
            name, origin.dtype, origin.shape, "", digests[name], pairs, None, origin.source, shape,
            _keep_parts(origin, shape, parts),
        )  # fmt: skip
    for name, terms in factors.items():
        if name not in tensors:
            pairs = _factor_parts(name, terms, parts)
            shape = (terms[0].u.shape[0], terms[0].v.shape[1])
            tensors[name] = TensorPatch(name, "F32", shape, "", digests[name], pairs)
    write_container(stream, parts, encode_metadata("", tensors, [], {}, FACTORS_KEY))


def _keep_parts(origin: Origin, shape: tuple[int, ...], parts: list[Part]) -> tuple[tuple[int, str], ...]:
    """Write which indices are kept, one bit for each, and the same bits only once."""
    result = []
    for axis, indices in sorted(origin.keep.items()):
        flags = np.zeros(shape[axis], dtype=np.bool_)
        flags[indices] = True
        content = np.packbits(flags).tobytes()
        # Three matrices of an MLP lose the same neurons.
        label = f"keep#{hashlib.sha256(content).hexdigest()}"
        if all(part.name != label for part in parts):
            parts.append(Part(label, "U8", (len(content),), partial(iter, [content])))
        result.append((axis, label))
    return tuple(result)


def _describe(
    base: Checkpoint, result: Checkpoint, origin: Origin, terms: Sequence[LowRank], parts: list[Part]
) -> TensorPatch:
    name, size = origin.name, prod(origin.shape)
    nbytes = size * ITEMSIZE[origin.dtype]
    # In float64 every entry is its own rounding boundary.
    usable = [t for t in terms if (t.u.shape[0], t.v.shape[1]) == origin.shape] if origin.dtype != "F64" else []
    survey = _survey(base, result, origin, usable if len(usable) == len(terms) else [])
    item = ITEMSIZE[origin.dtype]
    encoding, index_bytes = survey.sizes.best()
    sparse_bytes = index_bytes + (0 if survey.zeros_only else survey.sizes.count * item)
    factor_bytes = sum(array.size * _width(array) for term in usable for array in (term.u, term.v))
    shape = origin.shape
    before: str | None = survey.before if origin.source is not None else None
    if origin.source is not None and origin.keep:
        info = base.info(origin.source)
        before, shape = tensor_digest(info.path, info.start, info.end), info.shape
    keep = _keep_parts(origin, shape, parts)

    def done(pairs: tuple[tuple[str, str], ...], exact: Exact | None) -> TensorPatch:
        return TensorPatch(
            name, origin.dtype, origin.shape, before, survey.after, pairs, exact, origin.source, shape, keep
        )  # fmt: skip

    if not survey.sizes.count and not origin.in_place:
        return done((), None)
    if survey.exceptions is not None:
        positions = np.concatenate([np.empty(0, dtype=np.int64), *survey.exceptions])
        # At most nine bytes for a position.
        if factor_bytes + positions.size * (item + 9) < min(nbytes, sparse_bytes):
            pairs = _factor_parts(name, usable, parts)
            exact = _exception_parts(name, origin.dtype, size, positions, survey, parts)
            return done(pairs, exact)
    pairs_of = partial(pair_blocks, base, result, origin)
    if nbytes <= sparse_bytes:
        values = f"{name}#values"
        parts.append(Part(values, origin.dtype, origin.shape, lambda: (new.tobytes() for _, _, _, new in pairs_of())))
        return done((), Exact("dense", None, values))
    at, values = f"{name}#at", f"{name}#values"
    parts.append(Part(at, "U8", (index_bytes,), lambda: encode_flags(encoding, _flags(pairs_of))))
    if survey.zeros_only:
        return done((), Exact(encoding, at, None))
    parts.append(Part(values, origin.dtype, (survey.sizes.count,), lambda: _changed_values(pairs_of)))
    return done((), Exact(encoding, at, values))


_Pairs = Callable[[], Iterator[tuple[int, int, Stored, Stored]]]


def _flags(pairs: _Pairs) -> Iterator[Flags]:
    for _, _, old, new in pairs():
        yield as_bits(old) != as_bits(new)


def _changed_values(pairs: _Pairs) -> Iterator[bytes]:
    for _, _, old, new in pairs():
        yield new[as_bits(old) != as_bits(new)].tobytes()


def _survey(base: Checkpoint, result: Checkpoint, origin: Origin, terms: Sequence[LowRank]) -> _Survey:
    survey = _Survey(exceptions=[] if terms else None)
    before, after = hashlib.sha256(), hashlib.sha256()
    width = prod(origin.shape[1:])
    for start, stop, old, new in pair_blocks(base, result, origin):
        before.update(old.reshape(-1).view(np.uint8).data)
        after.update(new.reshape(-1).view(np.uint8).data)
        differing = as_bits(old) != as_bits(new)
        survey.sizes.add(differing)
        survey.zeros_only = survey.zeros_only and not as_bits(new)[differing].any()
        if survey.exceptions is not None:
            wrong = _wrong_or_close(terms, old, new, origin, (start, stop))
            positions = np.flatnonzero(wrong)
            survey.exceptions.append(positions + start * width)
            survey.exception_values.append(new.reshape(-1)[positions])
            if sum(block.size for block in survey.exceptions) > _MOST_EXCEPTIONS:
                survey.exceptions, survey.exception_values = None, []
    survey.before, survey.after = before.hexdigest(), after.hexdigest()
    return survey


def _wrong_or_close(
    terms: Sequence[LowRank],
    old: Stored,
    new: Stored,
    info: Origin,
    rows: tuple[int, int],
) -> Flags:
    """Flag entries that the factors do not give, or might not give in another order of summation."""
    start, stop = rows
    plain = exact_rows((), old, info, start, stop)
    exact = exact_rows(terms, old, info, start, stop)
    # |w| + sum |u||v| bounds the error of any order; the product of norms bounds the sum.
    bound = np.abs(plain)
    for term in terms:
        left = np.sqrt(np.square(term.u[start:stop].astype(np.float64)).sum(axis=1))
        right = np.sqrt(np.square(term.v.astype(np.float64)).sum(axis=0))
        bound += left[:, None] * right[None, :]
    bound *= MARGIN
    below, above = (as_bits(encode(exact + shift, info.dtype)) for shift in (-bound, bound))
    return np.asarray((below != above) | (as_bits(round_rows(exact, old, info)) != as_bits(new)))


def _width(array: Array) -> int:
    return 4 if array.dtype == np.float32 or bool((array.astype(np.float32) == array).all()) else 8


def _factor_parts(name: str, terms: Sequence[LowRank], parts: list[Part]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for number, term in enumerate(terms):
        labels = []
        for side, array in (("u", term.u), ("v", term.v)):
            code, kind = ("F32", "<f4") if _width(array) == 4 else ("F64", "<f8")
            content = np.ascontiguousarray(array, dtype=kind).tobytes()
            labels.append(f"{name}#{number}.{side}")
            parts.append(Part(labels[-1], code, array.shape, partial(iter, [content])))
        pairs.append((labels[0], labels[1]))
    return tuple(pairs)


def _exception_parts(
    name: str, dtype: str, entries: int, positions: np.ndarray[tuple[int], np.dtype[np.int64]], survey: _Survey,
    parts: list[Part],
) -> Exact | None:  # fmt: skip
    if not positions.size:
        return None
    content = encode_positions(positions)
    values = np.concatenate(survey.exception_values)
    parts.append(Part(f"{name}#at", "U8", (len(content),), partial(iter, [content])))
    parts.append(Part(f"{name}#values", dtype, (values.size,), partial(iter, [values.tobytes()])))
    return Exact("gaps", f"{name}#at", f"{name}#values")


def _file_patch(result: Checkpoint, change: FileDelta, parts: list[Part]) -> FilePatch:
    if change.after is None:
        return FilePatch(change.path, change.before, None, None)
    path = result.root / change.path
    label = f"file#{change.path}"
    parts.append(Part(label, "U8", (path.stat().st_size,), partial(_file_chunks, path)))
    return FilePatch(change.path, change.before, change.after, label, permission_bits(path))


def _file_chunks(path: Path) -> Iterator[bytes]:
    with opened(path) as (descriptor, size):
        for offset in range(0, size, _PIECE):
            piece = bytearray(min(_PIECE, size - offset))
            read_into(descriptor, memoryview(piece), offset, path)
            yield bytes(piece)
