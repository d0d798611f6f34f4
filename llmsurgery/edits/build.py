"""Build a patch from a base, a result, and the low-rank factors that a run hands over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llmsurgery.checkpoint import ITEMSIZE, Checkpoint, encode, file_digest
from llmsurgery.checkpoint.carry import permission_bits
from llmsurgery.checkpoint.container import Part, write_container
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.edits.delta import FileDelta, Stored, as_bits, pair_blocks
from llmsurgery.edits.evaluate import exact_rows, round_rows
from llmsurgery.edits.indices import Flags, Sizes, encode_flags, encode_positions
from llmsurgery.edits.kinds import Array, LowRank
from llmsurgery.edits.patch import FACTORS_KEY, KEY, Exact, FilePatch, TensorPatch, encode_metadata

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
) -> str:
    """Write a patch that turns a base into a result.

    Args:
        stream: An empty seekable file.
        base: The base.
        result: The result; tensors not named are taken to be equal.
        names: Tensors that differ.
        factors: Low-rank terms of tensors that are nothing but base plus these terms, rounded once. They are checked:
            where they do not give the result, or take more room, another form is written.
        files: Side files that differ.
        provenance: What made the result.

    Returns:
        The patch's digest.
    """
    parts: list[Part] = []
    tensors: dict[str, TensorPatch] = {}
    for name in names:
        tensors[name] = _describe(base, result, name, factors.get(name, ()), parts)
    entries = [_file_patch(result, change, parts) for change in files]
    metadata = encode_metadata(file_digest(base.root / "config.json"), tensors, entries, provenance, KEY)
    return write_container(stream, parts, metadata)


def write_factors(stream: BinaryIO, factors: Mapping[str, Sequence[LowRank]], digests: Mapping[str, str]) -> None:
    """Write low-rank factors alone, so that a later `diff` can make a small patch.

    Args:
        stream: An empty seekable file.
        factors: Low-rank terms by stored name.
        digests: SHA-256 of each tensor in the result.
    """
    parts: list[Part] = []
    tensors = {}
    for name, terms in factors.items():
        pairs = _factor_parts(name, terms, parts)
        shape = (terms[0].u.shape[0], terms[0].v.shape[1])
        tensors[name] = TensorPatch(name, "F32", shape, "", digests[name], pairs)
    write_container(stream, parts, encode_metadata("", tensors, [], {}, FACTORS_KEY))


def _describe(
    base: Checkpoint, result: Checkpoint, name: str, terms: Sequence[LowRank], parts: list[Part]
) -> TensorPatch:
    info = base.info(name)
    # In float64 every entry is its own rounding boundary.
    usable = [t for t in terms if (t.u.shape[0], t.v.shape[1]) == info.shape] if info.dtype != "F64" else []
    survey = _survey(base, result, name, usable if len(usable) == len(terms) else [])
    item = ITEMSIZE[info.dtype]
    encoding, index_bytes = survey.sizes.best()
    sparse_bytes = index_bytes + (0 if survey.zeros_only else survey.sizes.count * item)
    factor_bytes = sum(array.size * _width(array) for term in usable for array in (term.u, term.v))
    done = partial(TensorPatch, name, info.dtype, info.shape, survey.before, survey.after)
    if survey.exceptions is not None:
        positions = np.concatenate([np.empty(0, dtype=np.int64), *survey.exceptions])
        # At most nine bytes for a position.
        if factor_bytes + positions.size * (item + 9) < min(info.nbytes, sparse_bytes):
            pairs = _factor_parts(name, usable, parts)
            exact = _exception_parts(name, info.dtype, info.size, positions, survey, parts)
            return done(pairs, exact)
    pairs_of = partial(pair_blocks, base, result, name)
    if info.nbytes <= sparse_bytes:
        values = f"{name}#values"
        parts.append(Part(values, info.dtype, info.shape, lambda: (new.tobytes() for _, _, _, new in pairs_of())))
        return done((), Exact("dense", None, values))
    at, values = f"{name}#at", f"{name}#values"
    parts.append(Part(at, "U8", (index_bytes,), lambda: encode_flags(encoding, _flags(pairs_of))))
    if survey.zeros_only:
        return done((), Exact(encoding, at, None))
    parts.append(Part(values, info.dtype, (survey.sizes.count,), lambda: _changed_values(pairs_of)))
    return done((), Exact(encoding, at, values))


_Pairs = Callable[[], Iterator[tuple[int, int, Stored, Stored]]]


def _flags(pairs: _Pairs) -> Iterator[Flags]:
    for _, _, old, new in pairs():
        yield as_bits(old) != as_bits(new)


def _changed_values(pairs: _Pairs) -> Iterator[bytes]:
    for _, _, old, new in pairs():
        yield new[as_bits(old) != as_bits(new)].tobytes()


def _survey(base: Checkpoint, result: Checkpoint, name: str, terms: Sequence[LowRank]) -> _Survey:
    survey = _Survey(exceptions=[] if terms else None)
    before, after = hashlib.sha256(), hashlib.sha256()
    info = base.info(name)
    width = info.size // info.rows if info.rows else 0
    for start, stop, old, new in pair_blocks(base, result, name):
        before.update(old.reshape(-1).view(np.uint8).data)
        after.update(new.reshape(-1).view(np.uint8).data)
        differing = as_bits(old) != as_bits(new)
        survey.sizes.add(differing)
        survey.zeros_only = survey.zeros_only and not as_bits(new)[differing].any()
        if survey.exceptions is not None:
            wrong = _wrong_or_close(terms, old, new, info.dtype, (start, stop), base, name)
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
    dtype: str,
    rows: tuple[int, int],
    base: Checkpoint,
    name: str,
) -> Flags:
    """Flag entries that the factors do not give, or might not give in another order of summation."""
    start, stop = rows
    info = base.info(name)
    plain = exact_rows((), old, info, start, stop)
    exact = exact_rows(terms, old, info, start, stop)
    # |w| + sum |u||v| bounds the error of any order; the product of norms bounds the sum.
    bound = np.abs(plain)
    for term in terms:
        left = np.sqrt(np.square(term.u[start:stop].astype(np.float64)).sum(axis=1))
        right = np.sqrt(np.square(term.v.astype(np.float64)).sum(axis=0))
        bound += left[:, None] * right[None, :]
    bound *= MARGIN
    below, above = as_bits(encode(exact - bound, dtype)), as_bits(encode(exact + bound, dtype))
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
