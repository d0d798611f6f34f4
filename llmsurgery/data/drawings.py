"""Pictures of one coloured shape, drawn from a few words and a seed: nothing of them has to be shipped.

A drawing is made with whole numbers and comparisons alone, so that it has the same pixels everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 30, 30), "green": (30, 150, 50), "blue": (40, 60, 210), "yellow": (230, 205, 40),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
GROUNDS = {"light": 225, "grey": 130, "dark": 25}
"""How light the ground is -> its level, give or take fifteen."""
SIZE = 32
"""Rows and columns of a drawing."""


@dataclass(frozen=True)
class Drawing:
    """What is drawn.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        ground: One of `GROUNDS`.
        seed: Where the shape stands, how large it is, and the exact level of the ground.
    """

    shape: str
    colour: str
    ground: str = "light"
    seed: int = 0

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the picture [rows, columns, red green blue]."""
        import numpy as np

        rng = random.Random(self.seed)
        radius = rng.randrange(7, 11)
        row, column = (rng.randrange(radius + 1, SIZE - radius - 1) for _ in range(2))
        level = GROUNDS[self.ground] + rng.randrange(-15, 16)
        down, right = np.mgrid[:SIZE, :SIZE]
        down, right = down - row, right - column
        if self.shape == "circle":
            inside = down * down + right * right <= radius * radius
        elif self.shape == "square":
            inside = np.maximum(np.abs(down), np.abs(right)) <= radius - 1
        else:
            # Its point is at the top; every second row is a column wider on both sides.
            inside = (np.abs(down) <= radius) & (2 * np.abs(right) <= down + radius)
        picture = np.full((SIZE, SIZE, 3), level, dtype=np.uint8)
        picture[inside] = COLOURS[self.colour]
        return picture


def parse_drawing(record: Mapping[str, object], where: str) -> Drawing:
    """Return the drawing that a record describes.

    Args:
        record: `shape`, `colour` and, if they are not "light" and 0, `ground` and `seed`.
        where: File and line, for messages.

    Raises:
        InputError: It describes none.
    """
    shape, colour = record.get("shape"), record.get("colour")
    ground, seed = record.get("ground", "light"), record.get("seed", 0)
    known = shape in SHAPES and colour in COLOURS and ground in GROUNDS
    if not known or not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(
            f"{where}: image describes no drawing",
            f"a drawing has a shape ({', '.join(SHAPES)}), a colour ({', '.join(COLOURS)}), a ground "
            f"({', '.join(GROUNDS)}) and a whole number as seed",
            "correct it, or give the path of a picture",
        )
    return Drawing(str(shape), str(colour), str(ground), seed)
