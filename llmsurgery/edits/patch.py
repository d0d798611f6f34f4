"""The patch file: what turns one base checkpoint into one result, forward only, in one sealed container.

A tensor is described by low-rank factors, evaluated by the same float64 routine that writes edits, and then by exact
entries in the stored dtype: all of them (dense), or some positions with their values, or some positions set to zero.
With factors, the exact entries are those whose float64 value lies so close to a rounding boundary that another order
of summation could round it the other way. The metadata are one JSON object:

    format      1, or 2 if names or shapes change
    base        {config_sha256}
    tensors     name -> {dtype, shape, before, after, factors: [[u, v], ...], exact: {encoding, at, values} or null}
                and where they are not those of the base: source, the name in it, null for a tensor that starts from
                zeros; base_shape and keep, axis -> bits of the indices that are kept
    gone        name -> digest of tensors of the base that nothing in the result comes from
    files       [{path, before, after, content, mode}]; before or after null: the file is not there
    provenance  the operations of the run that made the result, if there was one

`before` and `after` are SHA-256 digests; u, v, at, values, keep and content name parts of the container. Where the
tensors of the result lie is not told: it follows from the base and the names (`llmsurgery.checkpoint.layout`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llmsurgery.checkpoint import FLOAT, Header, TensorInfo, storage_dtype
from llmsurgery.checkpoint.container import PartReader, read_container
from llmsurgery.checkpoint.inventory import PRIVATE_NAMES
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.refuse import PICKLE_SUFFIXES
from llmsurgery.edits.indices import ENCODINGS
from llmsurgery.edits.kinds import LowRank
from llmsurgery.edits.origin import Moves, Origin
from llmsurgery.edits.patch_entries import FORMAT, KEY, MOVED_FORMAT, Exact, FilePatch, TensorPatch
from llmsurgery.errors import DamagedError, InputError

_FACTOR_DTYPES = ("F32", "F64")


@dataclass(frozen=True)
class Patch:
    """A patch file whose bytes and references have been checked.

    Attributes:
        path: The file.
        seal: SHA-256 over the file, as `llmsurgery.checkpoint.container` computes it.
        config_sha256: Digest of the base's config.json.
        tensors: Tensor changes by stored name.
        files: Side-file changes.
        provenance: Operations that made the result.
        parts: The container's entries.
        gone: Digests of the tensors of the base that nothing in the result comes from.
    """

    path: Path
    seal: str
    config_sha256: str
    tensors: dict[str, TensorPatch]
    files: list[FilePatch]
    provenance: dict[str, Any]
    parts: dict[str, TensorInfo] = field(repr=False)
    gone: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def low_rank(self, tensor: TensorPatch) -> list[LowRank]:
        """Read the factors of a tensor."""
        return [LowRank(tensor.name, self._matrix(u), self._matrix(v)) for u, v in tensor.factors]

    def reader(self, part: str) -> PartReader:
        """Return a reader of one part."""
        return PartReader(self.parts[part])

    def file_content(self, path: str) -> bytes | None:
        """Return the new content of a side file, None if the patch does not change it."""
        part = next((file.content for file in self.files if file.path == path), None)
        return None if part is None else bytes(self.reader(part).take(self.parts[part].nbytes))

    def moves(self) -> Moves:
        """Return how names and shapes change.

        Raises:
            DamagedError: Indices that are kept do not fit.
        """
        moved = [tensor for tensor in self.tensors.values() if not tensor.in_place]
        return Moves({tensor.name: self.origin(tensor) for tensor in moved}, tuple(self.gone))

    def origin(self, tensor: TensorPatch) -> Origin:
        """Return where a tensor comes from.

        Raises:
            DamagedError: Indices that are kept do not fit.
        """
        keep = {}
        for axis, part in tensor.keep:
            reader, length = self.reader(part), tensor.base_shape[axis]
            bits = np.frombuffer(reader.take(reader.left), dtype=np.uint8)
            keep[axis] = np.flatnonzero(np.unpackbits(bits)).astype(np.int64)
            if bits.size != -(-length // 8) or keep[axis].size != tensor.shape[axis] or keep[axis][-1] >= length:
                raise _broken(self.path, f"tensor {tensor.name!r}: what is kept of it does not fit")
        return Origin(tensor.name, tensor.dtype, tensor.shape, tensor.source, keep)

    def _matrix(self, part: str) -> np.ndarray[Any, Any]:
        info = self.parts[part]
        return np.frombuffer(self.reader(part).take(info.nbytes), dtype=storage_dtype(info.dtype)).reshape(info.shape)


def read_patch(path: Path | str, key: str = KEY) -> Patch:
    """Open a patch file: every byte is checked against its seal, every reference against its parts.

    Args:
        path: The file.
        key: Kind of container that is wanted.

    Raises:
        InputError: It is missing or no patch.
        DamagedError: It is damaged, or refers to what it does not hold.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{str(path)!r} is a directory, not a patch",
            "a patch is one file, as `llmsurgery diff -o` writes it",
            f"give the file, perhaps {str(path / 'patch.safetensors')!r}",
        )
    header = read_container(path) if path.exists() else None
    if header is None:
        raise InputError(f"the patch {str(path)!r} does not exist", "no such file", "check the path")
    text = header.metadata.get(key)
    if text is None:
        raise InputError(
            f"{str(path)!r} is not a patch",
            "it is a safetensors file of another program",
            "make a patch with `llmsurgery diff A B -o PATCH` or --save patch",
        )
    try:
        document = json.loads(text)
        if document["format"] not in (FORMAT, MOVED_FORMAT):
            raise InputError(
                f"{str(path)!r} has patch format {document['format']!r}",
                f"this version reads formats {FORMAT} and {MOVED_FORMAT}",
                "use the version of llmsurgery that wrote it",
            )
        tensors = {name: _tensor(header, name, entry) for name, entry in document["tensors"].items()}
        files = [_file(header, entry) for entry in document["files"]]
        config = str(document["base"]["config_sha256"])
        provenance = dict(document["provenance"])
        gone = {str(name): str(digest) for name, digest in document.get("gone", {}).items()}
        _check_sources(path, tensors, gone)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise _broken(path, f"its description is incomplete: {error!r}") from error
    return Patch(path, header.metadata["sha256"], config, tensors, files, provenance, header.tensors, gone)


def _check_sources(path: Path, tensors: Mapping[str, TensorPatch], gone: Mapping[str, str]) -> None:
    used = [*gone, *(tensor.source for tensor in tensors.values() if tensor.source is not None)]
    if len(used) != len(set(used)):
        twice = next(name for name in used if used.count(name) > 1)
        raise _broken(path, f"two of its entries take tensor {twice!r} of the base")


def _broken(path: Path, why: str) -> DamagedError:
    return DamagedError(f"{str(path)!r} is damaged", why, "fetch or make the patch again")


def _refuse(header: Header, name: str, why: str) -> NoReturn:
    raise _broken(header.path, f"tensor {name!r}: {why}")


def _tensor(header: Header, name: str, entry: dict[str, Any]) -> TensorPatch:
    shape = tuple(int(side) for side in entry["shape"])
    size = int(np.prod(shape, dtype=object)) if shape else 1
    factors = tuple((str(u), str(v)) for u, v in entry["factors"])
    for u, v in factors:
        left, right = header.tensors[u], header.tensors[v]
        if {left.dtype, right.dtype} - set(_FACTOR_DTYPES) or entry["dtype"] not in FLOAT:
            _refuse(header, name, "its factors have no float dtype")
        if len(left.shape) != 2 or len(right.shape) != 2 or left.shape[1] != right.shape[0]:
            _refuse(header, name, "its factors do not fit together")
        if (left.shape[0], right.shape[1]) != shape:
            _refuse(header, name, "its factors do not fit its shape")
    exact = None
    if entry["exact"] is not None:
        exact = Exact(**entry["exact"])
        if exact.encoding not in (*ENCODINGS, "dense") or (exact.at is None) != (exact.encoding == "dense"):
            _refuse(header, name, "its entries are encoded in an unknown way")
        if exact.at is not None and header.tensors[exact.at].dtype != "U8":
            _refuse(header, name, "its positions are no bytes")
        if exact.values is None and exact.at is None:
            _refuse(header, name, "its values are missing")
        if exact.values is not None:
            values = header.tensors[exact.values]
            if values.dtype != entry["dtype"] or (exact.encoding == "dense" and values.size != size):
                _refuse(header, name, "its values do not fit")
    source = entry.get("source", name)
    before = None if source is None else str(entry["before"])
    done = partial(TensorPatch, name, str(entry["dtype"]), shape, before, str(entry["after"]), factors, exact, source)
    if "keep" not in entry:
        return done()
    base_shape, keep = tuple(int(side) for side in entry["base_shape"]), []
    for axis, part in entry["keep"].items():
        keep.append((int(axis), str(part)))
        if header.tensors[part].dtype != "U8" or not 0 <= int(axis) < len(base_shape):
            _refuse(header, name, "what is kept of it does not fit")
    cut = {axis for axis, _ in keep}
    stays = len(base_shape) == len(shape) and all(
        new < old if axis in cut else new == old for axis, (old, new) in enumerate(zip(base_shape, shape, strict=True))
    )
    if source is None or not keep or not stays or 0 in shape:
        _refuse(header, name, "what is kept of it does not fit")
    return done(base_shape, tuple(keep))


def _file(header: Header, entry: dict[str, Any]) -> FilePatch:
    path = inside_name(str(entry["path"]), f"the patch {str(header.path)!r}")
    # A patch must reach neither the weights past their hashes, nor records of earlier runs, nor hidden folders.
    weights = path.lower().endswith((".safetensors", ".safetensors.index.json", *PICKLE_SUFFIXES))
    # What a bundle adds in a folder of its own, such as an adapter; the base is checked for weights of that name.
    added = path.endswith(".safetensors") and "/" in path and entry["before"] is None
    if (weights and not added) or path == "surgery.json" or PRIVATE_NAMES & set(path.split("/")):
        raise _broken(header.path, f"it carries the file {path!r}, which a patch may not change")
    if entry["content"] is not None and header.tensors[entry["content"]].dtype != "U8":
        raise _broken(header.path, f"the content of {path!r} is no bytes")
    if (entry["content"] is None) != (entry["after"] is None):
        raise _broken(header.path, f"the content of {path!r} is missing")
    return FilePatch(path, entry["before"], entry["after"], entry["content"], int(entry["mode"]) & 0o777)
