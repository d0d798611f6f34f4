"""The sections on pruned models."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import mebibytes, rows


def prune_smollm2(result: dict[str, Any]) -> str:
    """Return the section on unstructured pruning of SmolLM2."""
    lines = []
    for row in result["rows"]:
        figures = [f"{row['ppl'][text]['value']:.2f}" for text in ("open", "domain")]
        cost = row.get("cost")
        lines.append([row["name"], *figures, *([f"{cost['seconds']:.0f}", mebibytes(cost)] if cost else ["", ""])])
    text = (
        f"{result['sparsity']:.0%} of the matrices' weights zero, {result['samples']} windows of {result['window']} "
        f"tokens of each calibration text; perplexity on {result['passages']} passages of\nordinary text (open) and of "
        "bills (domain) that no method saw. Seconds and peak are of the whole command.\n\n"
    )
    header = ["method, calibration", "open", "domain", "seconds", "peak MiB"]
    return "## Pruned SmolLM2-135M-Instruct\n\n" + text + rows(header, lines)


def d_pruner_memory(result: dict[str, Any]) -> str:
    """Return the section on the memory of D-Pruner."""
    names = {"own": "`prune --method d-pruner`", "plain": "all gradients and both score sets held"}
    lines = [
        [names[name], f"{cost['seconds']:.0f}", f"{cost['cpu_seconds']:.0f}", mebibytes(cost)]
        for name, cost in result["costs"].items()
    ]
    text = (
        f"SmolLM2-135M-Instruct, {result['settings']['samples']} windows of {result['settings']['window']} tokens of "
        f"each text; masks agree in {result['mask_agreement']:.4%} of the entries. The first\nalso measures a passage "
        "before and after.\n\n"
    )
    return "## Memory of D-Pruner\n\n" + text + rows(["side", "seconds", "CPU seconds", "peak MiB"], lines)
