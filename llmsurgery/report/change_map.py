"""How much each role changed in each block: the records of a manifest's tensors as the cells of a map."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, HEAD_HEIGHT, CHARACTER = 22, 22, 108, 22, 6.6


@dataclass(frozen=True)
class Cell:
    """One role of one block.

    Attributes:
        x: Left edge, in units of the drawing.
        y: Upper edge.
        share: Darkness, 0 to 1.
        text: What a reader is told of it.
    """

    x: float
    y: float
    share: float
    text: str


@dataclass(frozen=True)
class ChangeMap:
    """A drawing of the change.

    Attributes:
        width: Width of the drawing.
        height: Height of the drawing.
        roles: (y of the baseline, role) of every row.
        columns: (x of the middle, block) of the columns that are labelled.
        cells: What is drawn.
        top: The largest relative norm, which is the darkest.
        outside: Whether the last column is what lies in no block.
        label_width: Room for the names of roles.
    """

    width: float
    height: float
    roles: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    cells: tuple[Cell, ...]
    top: float
    outside: bool
    label_width: float


def block_of(name: str) -> int | None:
    """Return the block of a stored name: the first part of it that is a number; None for what lies in no block."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def change_map(tensors: Mapping[str, Mapping[str, Any]]) -> ChangeMap | None:
    """Return the map of a manifest's tensors, None if no tensor changed.

    A cell is as dark as the square root of its relative norm over the largest one, so that small changes are seen
    beside large ones; of several tensors in a cell (experts) the largest counts.

    Args:
        tensors: Stored name -> record, as in a manifest.
    """
    groups: dict[tuple[str, int | None], list[tuple[str, Mapping[str, Any]]]] = {}
    for name, record in tensors.items():
        if record["sha256_before"] != record["sha256_after"]:
            groups.setdefault((record["role"], block_of(name)), []).append((name, record))
    if not groups:
        return None
    blocks = [block for _, block in groups if block is not None]
    outside = any(block is None for _, block in groups)
    columns: list[int | None] = [*range(min(blocks), max(blocks) + 1)] if blocks else []
    columns += [None] if outside else []
    roles = list(dict.fromkeys(role for role, _ in groups))
    label_width = max(LABEL_WIDTH, 12 + CHARACTER * max(map(len, roles)))
    top = max(norm(record) for members in groups.values() for _, record in members) or 1.0
    cells = []
    for (role, block), members in groups.items():
        largest = max(norm(record) for _, record in members)
        x = label_width + CELL_WIDTH * columns.index(block)
        y = HEAD_HEIGHT + CELL_HEIGHT * roles.index(role)
        cells.append(Cell(x, y, math.sqrt(min(1.0, largest / top)), _text(role, block, members, largest)))
    every = max(1, math.ceil(len(columns) / 32))
    return ChangeMap(
        label_width + CELL_WIDTH * len(columns) + 2,
        HEAD_HEIGHT + CELL_HEIGHT * len(roles) + 2,
        tuple((HEAD_HEIGHT + CELL_HEIGHT * (row + 0.68), role) for row, role in enumerate(roles)),
        tuple(
            (label_width + CELL_WIDTH * (place + 0.5), "–" if block is None else str(block))  # noqa: RUF001
            for place, block in enumerate(columns)
            if block is None or place % every == 0
        ),
        tuple(cells),
        top,
        outside,
        label_width,
    )


def norm(record: Mapping[str, Any]) -> float:
    """Return the relative norm of a tensor's change; 0 for one that could not be computed."""
    value = record["norm_change"]
    return float(value) if value is not None and math.isfinite(value) else 0.0


def _text(role: str, block: int | None, members: list[tuple[str, Mapping[str, Any]]], largest: float) -> str:
    place = "in no block" if block is None else f"block {block}"
    entries = sum(record["entries"] for _, record in members)
    changed = sum(record["entries_changed"] for _, record in members)
    share = f", {changed / entries:.1%} of the entries" if entries else ""
    count = f" (largest of {len(members)} tensors)" if len(members) > 1 else ""
    return f"{role}, {place}: relative norm {largest:.3g}{count}{share}"
