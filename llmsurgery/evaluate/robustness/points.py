"""Points of an attack on the edited model beside the same points on source and control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsurgery.evaluate.intervals import Draw
from llmsurgery.evaluate.robustness.base import Point, Trial
from llmsurgery.evaluate.robustness.control import gain
from llmsurgery.evaluate.scores import PerRow

SMALLEST_GAP = 0.05
UTILITY_LOSS = 0.2


def recovery(before: float, after: float, source: float) -> float | None:
    """Return (Ka - Ku) / (K0 - Ku), None where nothing was unlearned."""
    gap = source - before
    return None if gap < SMALLEST_GAP else (after - before) / gap


def excess(after: float, control_after: float, source: float, control: float) -> float | None:
    """Return (Ka - Kna) / (K0 - Kn), None where the control knows as much as the source."""
    gap = source - control
    return None if gap < SMALLEST_GAP else (after - control_after) / gap


def mean_of(values: PerRow, rows: Sequence[str]) -> float:
    """Return the mean score of some rows, 0 of none."""
    return float(np.mean([values[row] for row in rows])) if rows else 0.0


@dataclass(frozen=True)
class Scored:
    """A point with its means over known rows.

    Attributes:
        point: The point on the edited model.
        rows: Known rows that it scores.
        before: Mean score of the edited model on them.
        after: The same after the attack.
        source: That of the source.
        source_after: That of the source after the attack, None where it was not attacked.
        control: That of the control model, None without one.
        control_after: That of the control model after the attack.
        gained: What the attack added to the control rows, None without any.
        valid: Whether the model still works.
    """

    point: Point
    rows: list[str]
    before: float
    after: float
    source: float
    source_after: float | None
    control: float | None
    control_after: float | None
    gained: float | None
    valid: bool

    @property
    def recovery(self) -> float | None:
        """Share of what was forgotten that came back."""
        return recovery(self.before, self.after, self.source)

    @property
    def control_gain(self) -> float | None:
        """What the control rows gained, in the unit of recovery."""
        return None if self.gained is None else recovery(0.0, self.gained, self.source - self.before)

    @property
    def excess(self) -> float | None:
        """Lead over the control model, or without one over the gain of the control rows."""
        if self.control is not None:
            if self.control_after is None:
                return None
            return excess(self.after, self.control_after, self.source, self.control)
        if self.control_gain is None or self.recovery is None:
            return None
        return self.recovery - self.control_gain

    def record(self) -> dict[str, object]:
        """Return JSON values for the report."""
        return {
            "label": self.point.label,
            "n": len(self.rows),
            "before": self.before,
            "after": self.after,
            "source_after": self.source_after,
            "control_after": self.control_after,
            "recovery": self.recovery,
            "excess": self.excess,
            "control_gain": self.control_gain,
            "utility": self.point.utility,
            "valid": self.valid,
            "counts": self.point.counts,
            **({"detail": dict(self.point.detail)} if self.point.detail else {}),
        }


@dataclass(frozen=True)
class Trials:
    """One attack on the three models.

    Attributes:
        edited: On the edited model.
        source: On the source.
        control: On a model that never saw the forget rows, or None.
        unknown: Control rows that the source does not know.
    """

    edited: Trial
    source: Trial
    control: Trial | None
    unknown: Sequence[str] = ()

    def telling(self, known: float, only_told: bool) -> list[str]:
        """Return the rows that the source knows, that every model has, and that the control does not know by itself."""
        aside = {} if self.control is None else self.control.before
        return [
            row
            for row, value in self.source.before.items()
            if value >= known
            and row in self.edited.before
            and (self.control is None or row in aside)
            and not (only_told and aside.get(row, -1.0) >= known)
        ]

    def scored(self, point: Point, telling: Sequence[str]) -> Scored:
        """Return a point of the edited model with its means over those of the telling rows that it scores."""
        edited, source, control = self.edited, self.source, self.control
        same = next((one for one in source.points if one.label == point.label), None)
        other = None if control is None else next((one for one in control.points if one.label == point.label), None)
        rows = [row for row in telling if row in point.scores and (other is None or row in other.scores)]
        kept = None if edited.utility is None else (1 - UTILITY_LOSS) * edited.utility
        return Scored(
            point,
            rows,
            mean_of(edited.before, rows),
            mean_of(point.scores, rows),
            mean_of(source.before, rows),
            None if same is None else mean_of(same.scores, [row for row in rows if row in same.scores]),
            None if control is None else mean_of(control.before, rows),
            None if other is None else mean_of(other.scores, rows),
            gain(point, edited, self.unknown) if self.unknown else None,
            point.utility is None or kept is None or point.utility >= kept,
        )

    def resampled(self, name: str, one: Scored, draw: Draw) -> float:
        """Compute recovery, excess or control_gain of a point once more, on resampled rows."""
        chosen = [one.rows[i] for i in draw(len(one.rows))]
        after, source = mean_of(one.point.scores, chosen), mean_of(self.source.before, chosen)
        before = mean_of(self.edited.before, chosen)
        if name == "recovery":
            value = recovery(before, after, source)
        elif name == "excess" and self.control is not None:
            same = next(point for point in self.control.points if point.label == one.point.label)
            value = excess(after, mean_of(same.scores, chosen), source, mean_of(self.control.before, chosen))
        else:
            added = gain(one.point, self.edited, [self.unknown[i] for i in draw(len(self.unknown))])
            value = recovery(0.0, added if name == "control_gain" else after - before - added, source - before)
        return float("nan") if value is None else value
