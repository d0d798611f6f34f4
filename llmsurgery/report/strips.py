"""Figures before and after as small drawings: one axis per metric, with the intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsurgery.report.numbers import format_number

WIDTH, MARGIN = 220, 8


@dataclass(frozen=True)
class Strip:
    """One metric of a report.

    Attributes:
        name: The metric.
        before: Value before, as text.
        after: Value after, as text.
        before_interval: 95% interval before, as text; empty without one.
        after_interval: The same after.
        change: What became of the value: "x 0.20", or the difference where it was zero.
        verdict: "better", "worse", or "" where the intervals overlap or are not known.
        rows: Rows it was measured on.
        direction: Which way is better.
        note: The aligned model's value, or the step that measured it first; empty without either.
        marks: Drawing: (x before, low, high, x after, low, high), each None where there is none.
        scale: Ends of the axis as text.
    """

    name: str
    before: str
    after: str
    before_interval: str
    after_interval: str
    change: str
    verdict: str
    rows: int
    direction: str
    note: str
    marks: tuple[float | None, ...]
    scale: tuple[str, str]


def strips(metrics: Mapping[str, Any]) -> list[Strip]:
    """Return one strip per metric of a manifest."""
    return [_strip(name, metric) for name, metric in metrics.items()]


def _strip(name: str, metric: Mapping[str, Any]) -> Strip:
    before, after = metric["before"], metric["after"]
    numbers = [value for side in (before, after) for value in (side["value"], *(side["interval"] or ()))]
    known = [float(value) for value in numbers if value is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
    width = (high - low) or 1.0

    def place(value: float | None) -> float | None:
        return None if value is None else round(MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / width, 1)

    marks = tuple(
        place(value)
        for side in (before, after)
        for value in (side["value"], *(side["interval"] or (None, None)))
    )  # fmt: skip
    notes = [f"aligned model {format_number(metric['aligned']['value'])}"] if "aligned" in metric else []
    notes += [f"before: at step {metric['since']}"] if "since" in metric else []
    return Strip(
        name,
        format_number(before["value"]),
        format_number(after["value"]),
        interval_text(before["interval"]),
        interval_text(after["interval"]),
        _change(before["value"], after["value"]),
        _verdict(before, after, metric["direction"]),
        after["n"],
        metric["direction"],
        "; ".join(notes),
        marks,
        (format_number(low), format_number(high)),
    )


def interval_text(interval: Sequence[float] | None) -> str:
    """Return an interval as text, empty for none."""
    return "" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if before > 0 and after >= 0:
        return f"× {after / before:.3g}"  # noqa: RUF001
    return f"{after - before:+.3g}"


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any], direction: str) -> str:
    """Say whether a value moved beyond both intervals, and which way."""
    if before["value"] is None or after["value"] is None or after["interval"] is None:
        return ""
    first, second = (side["interval"] or (side["value"], side["value"]) for side in (before, after))
    if first[0] <= second[1] and second[0] <= first[1]:
        return ""
    harm = _HARM[direction]
    return "better" if harm(after["value"]) < harm(before["value"]) else "worse"


_HARM: dict[str, Callable[[float], float]] = {
    "lower": lambda value: value,
    "higher": lambda value: -value,
    "zero": abs,
    "half": lambda value: abs(value - 0.5),
}
"""How far a value is from what an operation wants, by direction."""
