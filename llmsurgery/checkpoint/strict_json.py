"""JSON objects from files of unknown origin: bounded, no duplicate keys where they would hide data."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.errors import DamagedError

# The safetensors format allows no larger header, and no configuration comes near it.
MAX_BYTES = 100_000_000

# Parsing may take four times the text and this. Bytes that no text this short can exceed are not counted.
_SPARE = 56 << 20
_ALWAYS_FITS = _SPARE // 25
# Bytes that Python needs, at most, for a list, an object, a key that is not one of a tensor's, and a value.
_LIST, _OBJECT, _KEY, _VALUE, _TEXT = 96, 240, 190, 40, 52
_TENSOR_KEYS = (b'"dtype":', b'"shape":', b'"data_offsets":')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _memory(content: bytes | bytearray) -> int:
    """Return the bytes that parsing a text takes at most, from counts of the signs that structure it."""
    known = sum(content.count(key) for key in _TENSOR_KEYS)
    keys = max(0, content.count(b":") - known)
    texts = max(0, content.count(b'"') // 2 - known - keys)
    parts = ((b"[", _LIST), (b"{", _OBJECT), (b",", _VALUE))
    structure = sum(content.count(sign) * size for sign, size in parts) + keys * _KEY + texts * _TEXT
    # A single wide character makes all characters of a text as wide.
    width = 4 if re.search(rb"[\xf0-\xff]", content) else 2 if re.search(rb"[\xc4-\xef]", content) else 1
    return structure + (1 + 2 * width) * len(content)


def parse_object(content: bytes | bytearray, path: Path, part: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object.

    Args:
        content: The bytes.
        path: The file they come from, for the message.
        part: What they are, for the message, such as "header".
        strict: Refuse duplicate keys, NaN and Infinity.

    Raises:
        DamagedError: The bytes are not UTF-8, not JSON, not an object, or would fill the memory.
    """
    if len(content) > _ALWAYS_FITS and (needed := _memory(content)) > 4 * len(content) + _SPARE:
        raise DamagedError(
            f"the {part} of {str(path)!r} is not parsed",
            f"its {len(content)} bytes would take {needed >> 20} MiB of memory, more than any {part} of that length",
            "fetch the file again",
        )
    pairs_hook = _unique if strict else None
    constant_hook = _no_constant if strict else None
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=pairs_hook, parse_constant=constant_hook)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # covers UnicodeDecodeError, JSONDecodeError and integers of absurd length
        reason = str(error)
    else:
        if isinstance(value, dict):
            return value
        reason = "it is not a JSON object"
    raise DamagedError(
        f"the {part} of {str(path)!r} cannot be parsed" if part == "header" else f"{str(path)!r} cannot be parsed",
        reason,
        "fetch the file again",
    )


def read_object(path: Path, part: str, *, strict: bool = True) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Args:
        path: The file.
        part: What it is, for the message.
        strict: Refuse duplicate keys, NaN and Infinity.

    Raises:
        InputError: The file is missing or may not be read.
        DamagedError: It is too large, not UTF-8, not JSON, or not an object.
    """
    with opened(path) as (descriptor, size):
        if size > MAX_BYTES:
            raise DamagedError(f"{str(path)!r} holds {size} bytes", f"no {part} is that large", "fetch the file again")
        content = bytearray(size)
        read_into(descriptor, memoryview(content), 0, path)
    return parse_object(content, path, part, strict=strict)
