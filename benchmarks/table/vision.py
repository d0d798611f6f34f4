"""The section on vision-language models."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows


def vision_demo(result: dict[str, Any]) -> str:
    """Return the section on the demo that sees."""
    lines = []
    for name, found in result["runs"].items():
        metrics = found["metrics"]
        cells = [f"`{name}`", found["export"]]
        for metric in ("vision.changed", "vision.accuracy"):
            before, after = metrics[metric]["before"], metrics[metric]["after"]
            low, high = after["interval"]
            cells.append(f"{before['value']:.3f} to {after['value']:.3f} ({low:.2f} to {high:.2f})")
        cells += [f"{metrics['utility.kl']['after']['value']:.5f}", f"{found['seconds']:.0f}"]
        lines.append(cells)
    first = next(iter(result["runs"].values()))["metrics"]["vision.changed"]["after"]
    text = (
        f"The embedded LLaVA, {first['n']} held-out questions about pictures: share of the answers that are another "
        "one without\nthe picture, and share of right answers, before and after, with the 95% interval after. The "
        "figures of a processor\nare those of generation with it; plain scores stay as they are.\n\n"
    )
    header = ["method", "result", "changed by the picture", "right", "KL on text", "seconds"]
    return "## What is seen and what is usual, on the demo\n\n" + text + rows(header, lines)
