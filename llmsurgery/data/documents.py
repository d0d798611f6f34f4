"""YAML and JSON written by hand or by others: bounded in length, depth and in what aliases make of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import yaml

MAX_YAML = 1 << 18
"""Characters. A parser in Python reads so many in two seconds, and a recipe is a hundred times shorter."""
MAX_JSON = 100_000_000
_MAX_DEPTH = 50
_MAX_VALUES = 100_000


def parse_yaml(text: str) -> object:
    """Parse YAML.

    Aliases may be used, but not so that a short text stands for a large document, or for one without an end.

    Args:
        text: The text.

    Raises:
        ValueError: It is not YAML, or out of bounds; the message is one line.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_YAML} are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _count_values(node, {}, 0)
            value: object = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    # Besides ValueError, what the constructors of dates, numbers and keys raise.
    except (RecursionError, OverflowError, TypeError, LookupError, AttributeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(reason or type(error).__name__) from error
    return value


def parse_json(text: str) -> object:
    """Parse JSON that holds no text longer or nested deeper than any of ours.

    Args:
        text: The text.

    Raises:
        ValueError: It is not JSON, or out of bounds; the message is one line.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_JSON} are read")
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: list[object] = [value]
    for _ in range(_MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [one for parts in inner for one in parts]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _count_values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for once every alias is written out."""
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias refers to what it is a part of")
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node.value, list) else []
    count = 1
    for part in parts:
        for child in part if isinstance(part, tuple) else (part,):
            count += _count_values(child, known, depth + 1)
    if count > _MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {_MAX_VALUES} values")
    known[id(node)] = count
    return count
