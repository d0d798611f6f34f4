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


def prune_peers(result: dict[str, Any]) -> str:
    """Return the section on Wanda and SparseGPT against llmcompressor."""
    lines = []
    for name, row in result["methods"].items():
        own, peer = row["median"]["llmsurgery"], row["median"]["llmcompressor"]
        blocks, cpu = row["mask_agreement_by_block"], [side["cpu_seconds"] for side in (own, peer)]
        ppl = [row["ppl"][side]["value"] for side in ("llmsurgery", "llmcompressor")]
        lines.append(
            [
                f"`{name}`",
                f"{own['seconds']:.0f} / {peer['seconds']:.0f} s ({row['time_ratio']:.2f}x)",
                f"{cpu[0]:.0f} / {cpu[1]:.0f} s ({cpu[0] / cpu[1]:.2f}x)",
                f"{mebibytes(own)} / {mebibytes(peer)} MiB ({row['memory_ratio']:.2f}x)",
                f"{row['mask_agreement']:.2%} (block 0 {blocks[0]:.2%}, worst {min(blocks):.2%})",
                f"{ppl[0]:.2f} / {ppl[1]:.2f}",
            ]
        )
    versions = next(iter(result["methods"].values()))["peer"]["versions"]
    text = (
        f"{result['model']}, {result['sparsity']:.0%} of the matrices, the same {result['samples']} windows of "
        f"{result['window']} tokens, {result['dtype']};\nllmsurgery / llmcompressor {versions['llmcompressor']}: whole "
        f"commands, each in a process of its own, {result['repeats']} run(s) a side. Agreement is the share of\n"
        f"entries zero in both results or in neither. Perplexity on {result['passages']} passages, dense "
        f"{result['dense']['value']:.2f}. Where other jobs ran beside, CPU time says more than time.\n\n"
    )
    header = ["method", "time", "CPU time", "peak memory", "masks agree", "perplexity"]
    return f"## Pruning against llmcompressor, {result['model']}\n\n" + text + rows(header, lines)
