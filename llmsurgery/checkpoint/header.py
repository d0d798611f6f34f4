"""Parse a safetensors header and check every byte range before anything is read through it.

Layout of a file: eight bytes with the header's length (unsigned, little-endian), the header (a JSON object, tensor
name -> dtype, shape, data_offsets), then the data, which the tensors cover without holes or overlaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from llmsurgery.checkpoint.dtypes import BITS, entry_bits
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.checkpoint.strict_json import MAX_BYTES, parse_object
from llmsurgery.errors import DamagedError

_LENGTH_BYTES = 8
# numpy 1.26 holds no more dimensions, and no tensor of a model comes near.
_MAX_DIMENSIONS = 32
_MAX_BITS = 1 << 63


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where and how one tensor is stored.

    Attributes:
        name: Stored name.
        dtype: safetensors dtype code.
        shape: Stored shape.
        path: The file that holds it.
        start: First byte in the file.
        end: One past its last byte in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.nbytes * 8 // BITS[self.dtype]

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar counts as one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows if self.rows else 0


@dataclass(frozen=True)
class Header:
    """The checked header of one safetensors file.

    Attributes:
        path: The file.
        tensors: Tensors by name, in the order of their data.
        metadata: The free text entries under `__metadata__`.
        data_start: First byte of the data.
        file_size: Bytes of the whole file.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_size: int


def _fail(path: Path, why: str, name: str | None = None) -> NoReturn:
    what = f"{str(path)!r} is damaged" if name is None else f"tensor {_short(name)} in {str(path)!r} is damaged"
    raise DamagedError(what, why, "fetch the file again, and compare its size and SHA-256 with the publisher's")


def read_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file; the data itself is not read.

    Args:
        path: The file.

    Returns:
        The header, every byte range of which lies inside the file.

    Raises:
        InputError: The file is missing or may not be read.
        DamagedError: The header or any entry of it is wrong, or the file is truncated or too long.
    """
    path = Path(path)
    with opened(path) as (descriptor, file_size):
        if file_size < _LENGTH_BYTES:
            _fail(path, f"it holds {file_size} bytes, fewer than the {_LENGTH_BYTES} of the header's length")
        prefix = bytearray(_LENGTH_BYTES)
        read_into(descriptor, memoryview(prefix), 0, path)
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_BYTES:
            _fail(path, f"its header claims {length} bytes, more than the {MAX_BYTES} the format allows")
        if length > file_size - _LENGTH_BYTES:
            _fail(path, f"its header claims {length} bytes, but only {file_size - _LENGTH_BYTES} follow")
        content = bytearray(length)
        read_into(descriptor, memoryview(content), _LENGTH_BYTES, path)
    return _parse(path, content, file_size)


def parse_header(path: Path, prefix: bytes, file_size: int) -> Header:
    """Check the header of a file that is to be written.

    Args:
        path: The file.
        prefix: Everything before its data, as `encode_header` returns it.
        file_size: Bytes of the whole file.

    Raises:
        DamagedError: The header or any entry of it is wrong.
    """
    if len(prefix) < _LENGTH_BYTES or struct.unpack("<Q", prefix[:_LENGTH_BYTES])[0] != len(prefix) - _LENGTH_BYTES:
        _fail(path, "its header has another length than it says")
    return _parse(path, prefix[_LENGTH_BYTES:], file_size)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return everything of a file that stands before its data.

    Args:
        tensors: Name, dtype code and shape of each tensor, in the order of the data.
        metadata: Free text entries; none are written where there are none.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, code, shape in tensors:
        end = position + prod(shape) * entry_bits(code) // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data begin at a multiple of eight, which is what every dtype needs.
    content += b" " * (-len(content) % _LENGTH_BYTES)
    return struct.pack("<Q", len(content)) + content


def _parse(path: Path, content: bytes | bytearray, file_size: int) -> Header:
    if content[:1] != b"{":
        _fail(path, "its header does not begin with a JSON object")
    entries = parse_object(content, path, "header")
    metadata = _check_metadata(path, entries.pop("__metadata__", None))
    data_start = _LENGTH_BYTES + len(content)
    tensors = [_check_entry(path, name, entry, data_start, file_size) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    _check_coverage(path, tensors, data_start, file_size)
    return Header(path, {info.name: info for info in tensors}, metadata, data_start, file_size)


def _check_metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _fail(path, "the entry __metadata__ of its header is not an object of texts")
    return dict(value)


def _is_count(value: object) -> bool:
    # bool is a subclass of int, and true is not a size.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_entry(path: Path, name: str, entry: object, data_start: int, file_size: int) -> TensorInfo:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        _fail(path, "its name is not valid Unicode", name)
    if not isinstance(entry, dict):
        _fail(path, "its header entry is not an object", name)
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in BITS:
        _fail(path, f"its dtype {_short(code)} is not one the format defines", name)
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        _fail(path, f"its shape {_short(shape)} is not a list of non-negative integers", name)
    if len(shape) > _MAX_DIMENSIONS:
        _fail(path, f"its shape has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        _fail(path, f"its data_offsets {_short(offsets)} are not two non-negative integers", name)
    begin, end = offsets
    if begin > end:
        _fail(path, f"its data ends at {_short(end)} before it begins at {_short(begin)}", name)
    available = file_size - data_start
    if end > available:
        why = f"its data ends at byte {_short(end)} of the data, but only {available} are there: the file is truncated"
        _fail(path, why, name)
    bits = _count_bits(path, name, code, shape)
    if bits != 8 * (end - begin):
        _fail(path, f"shape {_short(shape)} in {code} takes {bits} bits, but its range holds {end - begin} bytes", name)
    return TensorInfo(name, code, tuple(shape), path, data_start + begin, data_start + end)


def _count_bits(path: Path, name: str, code: str, shape: list[int]) -> int:
    bits = entry_bits(code)
    # Empty dimensions come last, so that a shape such as [2**62, 2**62, 0] does not pass as harmless.
    for length in sorted(shape, reverse=True):
        if length and bits * length >= _MAX_BITS:
            _fail(path, f"its shape {_short(shape)} is larger than any file", name)
        bits *= length
    return bits


def _short(value: object) -> str:
    """Quote a value of a hostile header without repeating megabytes of it or an integer too long to print."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "above 2**64"
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value[:8]) + (", ...]" if len(value) > 8 else "]")
    if isinstance(value, dict):
        return "{...}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_coverage(path: Path, tensors: list[TensorInfo], data_start: int, file_size: int) -> None:
    position = data_start
    for info in tensors:
        if info.start < position:
            _fail(path, f"its data begins {position - info.start} bytes inside another tensor's", info.name)
        if info.start > position:
            _fail(path, f"{info.start - position} bytes before its data belong to no tensor", info.name)
        position = info.end
    if position < file_size:
        _fail(path, f"{file_size - position} bytes at its end belong to no tensor")
