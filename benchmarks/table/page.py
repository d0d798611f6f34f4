"""What all sections of the page of results are made with."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import RESULTS


def newest(name: str) -> dict[str, Any] | None:
    """Return the newest result of a benchmark, None if it never ran."""
    files = sorted(RESULTS.glob(f"{name}-2*.json"))
    return json.loads(files[-1].read_text()) if files else None


def machine(result: dict[str, Any]) -> str:
    """Return one line on where a result was measured."""
    place = result["environment"]
    device = place["gpu"] or f"{place['cpu']}, {place['cores']} cores"
    return f"{device}; torch {place['torch']}, transformers {place['transformers']}; commit {place['commit']}"


def rows(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    parts = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)


def mebibytes(row: dict[str, float]) -> str:
    """Return the peak of a variant in MiB."""
    return f"{row['peak_bytes'] / 2**20:.0f}"
