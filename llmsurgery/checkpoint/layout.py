"""Where the tensors of a result lie when it holds other tensors than its source, and the headers that say so.

Files whose tensors stay what they are keep their bytes. In a file that changes, tensors keep their order; one that is
new follows what shares most of its name, if that is in the same block, and otherwise the last tensor of the last file.
The rule depends on the source and on the set of tensors alone, so that a patch leads to the bytes of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from llmsurgery.checkpoint.dtypes import ITEMSIZE
from llmsurgery.checkpoint.header import TensorInfo, encode_header, parse_header
from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.json_text import dump_like
from llmsurgery.checkpoint.strict_json import parse_object
from llmsurgery.errors import SurgeryError


@dataclass(frozen=True)
class Slot:
    """One tensor of a result.

    Attributes:
        name: Name in the result.
        dtype: Stored dtype code.
        shape: Stored shape.
        place: Tensor of the source whose place it takes; None for one that finds a new place.
        whole: Whether it starts from that tensor's bytes as they are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: str | None
    whole: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class NewFile:
    """A weight file that is written anew.

    Attributes:
        prefix: Everything before the data: length and header.
        slots: Its tensors in the order of their data.
        mode: Permission bits; those of the source's file of that name by default.
    """

    prefix: bytes
    slots: tuple[Slot, ...]
    mode: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.prefix) + sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a result lies.

    Attributes:
        tensors: Every tensor by name; its path is relative to the result.
        files: Weight files that are written anew; all others are the source's.
        removed: Weight files of the source that the result does not have.
        index: New content of the index, None where the source's stays or there is none.
    """

    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, NewFile] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    index: bytes | None = None

    def file_of(self, name: str) -> str:
        """Return the relative name of the file that holds a tensor."""
        return self.tensors[name].path.as_posix()

    @classmethod
    def of(cls, source: Checkpoint) -> Layout:
        """Return the layout of a result that holds the tensors of its source."""
        return cls(_places(source, source.headers))


def _places(source: Checkpoint, files: Iterable[str]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, info.dtype, info.shape, Path(file), info.start, info.end)
        for file in files
        for name, info in source.headers[file].tensors.items()
    }


def with_files(source: Checkpoint, files: Mapping[str, NewFile], removed: Iterable[str], index: bytes | None) -> Layout:
    """Return the layout of a result some of whose weight files are written anew.

    Args:
        source: The source.
        files: These files.
        removed: Weight files of the source that the result does not have.
        index: New content of the index, if it changes.

    Raises:
        DamagedError: A prefix does not announce the tensors of its file.
    """
    removed = frozenset(removed)
    tensors = _places(source, (file for file in source.headers if file not in files and file not in removed))
    for file, new in files.items():
        tensors |= parse_header(Path(file), new.prefix, new.nbytes).tensors
    return Layout(tensors, files, removed, index)


def rearrange(source: Checkpoint, slots: Sequence[Slot]) -> Layout:
    """Find a place for every tensor of a result.

    Args:
        source: The source.
        slots: Every tensor of the result, in any order.

    Raises:
        SurgeryError: There is none: a method dropped a whole model.
    """
    if not slots:
        raise SurgeryError(f"no tensor of {str(source.root)!r} is left")
    taken = {slot.place: slot for slot in slots if slot.place is not None}
    old = {file: [taken[name] for name in header.tensors if name in taken] for file, header in source.headers.items()}
    members = _insert(old, sorted((slot for slot in slots if slot.place is None), key=lambda slot: _natural(slot.name)))
    files: dict[str, NewFile] = {}
    removed = []
    for file, header in source.headers.items():
        found = members[file]
        if not found:
            removed.append(file)
        elif [(slot.name, slot.place, slot.whole) for slot in found] != [(name, name, True) for name in header.tensors]:
            found = _aligned(found)
            files[file] = NewFile(encode_header([(s.name, s.dtype, s.shape) for s in found], header.metadata),
                                  tuple(found))  # fmt: skip
    index = _index(source, members) if source.index_file is not None and (files or removed) else None
    return with_files(source, files, removed, index)


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """Order numbers in names by their value."""
    return tuple((text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name))


def _insert(old: Mapping[str, list[Slot]], new: Sequence[Slot]) -> dict[str, list[Slot]]:
    """Put new tensors behind their neighbours."""
    last: dict[tuple[str, ...], str] = {}
    for found in old.values():
        for slot in found:
            parts = slot.name.split(".")
            last |= {tuple(parts[:count]): slot.name for count in range(1, len(parts))}
    end = next((found[-1].name for found in reversed(list(old.values())) if found), None)
    behind: dict[str | None, list[Slot]] = {}
    for slot in new:
        parts = slot.name.split(".")
        # A neighbour shares at least the block, or in the absence of blocks the module.
        block = next((number + 1 for number, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
        prefixes = (tuple(parts[:count]) for count in range(len(parts) - 1, block - 1, -1))
        behind.setdefault(next((last[prefix] for prefix in prefixes if prefix in last), end), []).append(slot)
    result = {
        file: [one for slot in found for one in (slot, *behind.get(slot.name, ()))] for file, found in old.items()
    }
    if end is None:
        # Nothing of the source is left; what is new goes into its last file.
        result[next(reversed(result))] = list(new)
    return result


def _aligned(slots: list[Slot]) -> list[Slot]:
    """Keep the order, unless a tensor would begin where loaders cannot look at it without a copy."""
    position = 0
    for slot in slots:
        if position % ITEMSIZE[slot.dtype]:
            return sorted(slots, key=lambda slot: -ITEMSIZE[slot.dtype])
        position += slot.nbytes
    return slots


def _index(source: Checkpoint, members: Mapping[str, Sequence[Slot]]) -> bytes:
    """Return the index for other members, with sizes that are theirs; all else in it stays."""
    path = source.root / str(source.index_file)
    before = path.read_bytes()
    document = parse_object(before, path, "index")
    old: dict[str, str] = document["weight_map"]
    places = {
        slot.name: file for file, found in members.items() for slot in found if slot.place is None or slot.place in old
    }
    renamed = {slot.place: slot.name for found in members.values() for slot in found if slot.place is not None}
    names = [renamed[name] for name in old if name in renamed]
    names += [name for name in places if name not in set(names)]
    if list(old) == sorted(old):
        names.sort()
    document["weight_map"] = {name: places[name] for name in names}
    slots = [slot for found in members.values() for slot in found]
    sizes = {"total_size": lambda slot: slot.nbytes, "total_parameters": lambda slot: prod(slot.shape)}
    metadata = document.get("metadata")
    if isinstance(metadata, dict):
        for key, size in sizes.items():
            if key in metadata or key == "total_size":
                metadata[key] = sum(map(size, slots))
    return dump_like(before, document)
