"""How far two answers are apart as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the least number of tokens to insert, delete or replace that turns one sequence into the other."""
    wide = np.asarray(second, dtype=np.int64)
    steps = np.arange(len(wide) + 1)
    row = steps.copy()
    for count, token in enumerate(first, start=1):
        below = np.empty_like(row)
        below[0] = count
        np.minimum(row[1:] + 1, row[:-1] + (wide != token), out=below[1:])
        # Insertions run along the row: the least of below[k] + (j - k) over k <= j.
        row = np.minimum.accumulate(below - steps) + steps
    return int(row[-1])
