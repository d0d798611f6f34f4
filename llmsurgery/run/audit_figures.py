"""What both audits return, and how their scores are summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsFloat, cast

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Found(NamedTuple):
    """What an audit found; see `llmsurgery.run.audit.Audit`."""

    scores: Sequence[Mapping[str, object]]
    kept: Sequence[int]
    record: Mapping[str, object]
    series: Mapping[str, Sequence[float | None]]
    limit: float | None


def quantiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return some quantiles of the values that are there; None if none is."""
    import numpy as np

    known = [value for value in values if value is not None]
    if not known:
        return None
    return {f"{level:g}": float(value) for level, value in zip(LEVELS, np.quantile(known, LEVELS), strict=True)}


def mean_of(lines: Sequence[Mapping[str, object]], name: str) -> float:
    """Return the mean of one number of some rows, 0 without rows."""
    values = [float(cast(SupportsFloat, line[name])) for line in lines]
    return sum(values) / len(values) if values else 0.0
