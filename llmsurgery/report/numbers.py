"""Figures as text."""

from __future__ import annotations


def format_number(value: float | None) -> str:
    """Return a figure with four significant digits, "n/a" for one that could not be computed."""
    return "n/a" if value is None else f"{value:.4g}"
