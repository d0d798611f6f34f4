"""Section on faults and hostile input."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows


def faults(result: dict[str, Any]) -> str:
    """Return the section on faults."""
    lines = []
    for row in result["rows"]:
        seen = "; ".join(f"{name}: {count}" for name, count in row["seen"].items()) or row["skipped"]
        cells = [row["name"], row["expected"], str(row["tried"]), str(row["survived"]), str(len(row["lost"])), seen]
        lines.append([cell.replace("|", "/") for cell in cells])
    tried = sum(row["tried"] for row in result["rows"])
    text = (
        f"`make faults`: {tried} faults on tiny models. Survived means that what is expected happened; everything\n"
        "else counts as lost. Kills and interrupts fall at moments drawn uniformly over the processor time of the\n"
        "undisturbed run, every second one before one of its changes of files. Damaged files may take 10 s and four\n"
        "times their size plus 64 MiB each. CI runs a tenth of it as tests.\n"
    )
    header = ["fault", "expected", "tried", "survived", "lost", "seen"]
    return "## Faults and hostile input\n\n" + text + "\n" + rows(header, lines)
