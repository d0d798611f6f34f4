"""JSON objects from files of unknown origin: bounded, no duplicate keys where they would hide data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.errors import DamagedError

# The safetensors format allows no larger header, and no configuration comes near it.
MAX_BYTES = 100_000_000


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_object(content: bytes, path: Path, part: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object.

    Args:
        content: The bytes.
        path: The file they come from, for the message.
        part: What they are, for the message, such as "header".
        strict: Refuse duplicate keys, NaN and Infinity.

    Raises:
        DamagedError: The bytes are not UTF-8, not JSON, or not an object.
    """
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
    return parse_object(bytes(content), path, part, strict=strict)
