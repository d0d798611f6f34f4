"""Which layer's box tells forget rows from retain rows, and how large it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

ROUNDING = 1.01
"""Held-out keys lie on the border of the smallest box; another batch moves them by a rounding error."""


@dataclass(frozen=True)
class Choice:
    """A layer with the size of its box.

    Attributes:
        number: Place of the layer among the candidates.
        scale: c.
        recall: Share of the held-out forget rows in the box, None without such rows.
        false_alarms: Share of the retain rows in the box, None without such rows.
        margin: Distance of the nearest retain rows that must stay outside, over the border's; None without such rows.
    """

    number: int
    scale: float
    recall: float | None
    false_alarms: float | None
    margin: float | None


def smallest_scale(distances: Sequence[float], alpha_min: float, recall: float) -> float:
    """Return the smallest c whose box holds a share `recall` of keys.

    Args:
        distances: alpha of each key.
        alpha_min: alpha of the border for c = 1.
        recall: Share in [0, 1].
    """
    needed = max(1, math.ceil(recall * len(distances) - 1e-9))
    return sorted(distances)[needed - 1] / alpha_min


def choose_box(
    borders: Sequence[float],
    held: Sequence[Sequence[float]],
    retain: Sequence[Sequence[float]],
    scale: float | None,
    recall: float,
    false_alarms: float,
) -> Choice:
    """Choose layer and scale by what held-out rows say.

    Args:
        borders: alpha_min of each candidate layer.
        held: For each layer, alpha of each held-out forget row; empty rows if both choices are the user's.
        retain: For each layer, alpha of each retain row; empty rows without retain rows.
        scale: c; None: the smallest that holds a share `recall` of the held-out rows.
        recall: Share in [0, 1].
        false_alarms: Share of retain rows that a layer may catch.

    Returns:
        Of the layers within `false_alarms` the one with the largest margin; if none is, that with the fewest alarms.
        Without retain rows the last one.
    """
    choices = []
    for number, border in enumerate(borders):
        size = ROUNDING * smallest_scale(held[number], border, recall) if scale is None else scale
        limit = size * border
        alarms = margin = None
        if retain[number]:
            ordered = sorted(retain[number])
            alarms = sum(distance <= limit for distance in ordered) / len(ordered)
            first = min(len(ordered) - 1, int(false_alarms * len(ordered)))
            margin = ordered[first] / limit if limit else math.inf
        caught = sum(distance <= limit for distance in held[number]) / len(held[number]) if held[number] else None
        choices.append(Choice(number, size, caught, alarms, margin))
    if not retain[0]:
        return choices[-1]
    # Layers within the bound count as equal in it.
    return max(choices, key=lambda choice: (-max(choice.false_alarms or 0.0, false_alarms), choice.margin or 0.0))
