"""Write a JSON file anew in the manner in which it was written before."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

_INDENTS: tuple[int | str | None, ...] = (2, 4, "\t", 1, 3, None)


def dump_like(before: bytes, value: object) -> bytes:
    """Return a value as JSON text, with the indentation, escapes and last line break of an earlier text.

    Args:
        before: The earlier text; where no usual manner of writing gives it, and where it is empty, two spaces indent.
        value: JSON values; keys stay in their order.

    Raises:
        ValueError: The value cannot be written as JSON.
    """
    text = before.decode("utf-8", "replace")
    end = "\n" if text.endswith("\n") or not text else ""
    options: list[dict[str, Any]] = [
        {"indent": indent, "ensure_ascii": ascii_only} for indent, ascii_only in product(_INDENTS, (False, True))
    ]
    chosen = options[0]
    if text:
        parsed = json.loads(text)
        chosen = next((option for option in options if json.dumps(parsed, **option) == text.rstrip()), chosen)
    return (json.dumps(value, **chosen) + end).encode()
