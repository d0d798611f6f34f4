"""Control rows: what an attack adds to answers that the source never knew.

A model that never saw the forget rows is the best control, and where there is none, as for a pretrained model's own
knowledge, rows of the same form that the source does not know can stand for it (`--control`). The edited model is
scored on them before and after the very same attack, Kc and Kca; with K0 and Ku the scores of the forget rows on the
source and on the edited model, and recovery as in `verdict`:

    control_gain = (Kca - Kc) / (K0 - Ku)
    excess       = recovery - control_gain

Nobody trains on control rows, and they are scored on the edited model alone, not on one that never knew the forget
rows: what the attack teaches about the form of answers shows in both, what it uncovers in the forget rows alone. Rows
that the source scores as known are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.robustness.base import Point, Trial


def unknown_rows(edited: Trial, source: Trial, known: float) -> list[str]:
    """Return the control rows that the source scores below `known`."""
    return [row for row in edited.control if source.control.get(row, 1.0) < known]


def gain(point: Point, edited: Trial, rows: Sequence[str]) -> float:
    """Return what the attack adds to the mean score of control rows.

    Args:
        point: Scores after the attack on the edited model.
        edited: Its scores before.
        rows: Control rows, at least one.
    """
    return fmean(point.control[row] - edited.control[row] for row in rows)


def control_record(
    rows: Sequence[str], edited: Trial, source: Trial, point: Point | None
) -> dict[str, object] | None:  # fmt: skip
    """Return mean scores of the control rows for the report, None where none are given.

    Args:
        rows: Control rows that count.
        edited: The attack on the edited model.
        source: The attack on the source.
        point: The point that decides.
    """
    if not edited.control:
        return None
    counted: dict[str, object] = {"n": len(rows), "left_out": len(edited.control) - len(rows)}
    if rows:
        counted["source"] = fmean(source.control[row] for row in rows)
        counted["before"] = fmean(edited.control[row] for row in rows)
        counted["after"] = None if point is None else fmean(point.control[row] for row in rows)
    return counted


def check_control(rows: Mapping[str, Sequence[Row]]) -> None:
    """Refuse control rows that ask what forget or retain rows ask: the attack trains on these.

    Raises:
        InputError: Says how many.
    """
    asked = {row.prompt for name in ("forget", "retain") for row in rows.get(name, ()) if row.prompt}
    shared = sum(row.prompt in asked for row in rows.get("control", ()))
    if shared:
        raise InputError(
            f"{shared} rows of --control ask what --forget or --retain rows ask",
            "an attack may train on those, and control rows are never trained on",
            "leave them out of --control",
        )
