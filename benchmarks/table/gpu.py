"""The section on the kernels of a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows


def gpu_kernels(result: dict[str, Any]) -> str:
    """Return the section on SparseGPT's columns, selection and token log-probabilities."""
    lines = []
    for row in result["columns"]:
        loop, kernel = (1000 * row["seconds"][name] for name in ("loop", "kernel"))
        lines.append(
            [
                f"SparseGPT {row['rows']} x {row['width']}, {'2:4' if row['group'] else 'half'}",
                f"{loop:.0f} ms",
                f"{kernel:.1f} ms ({loop / kernel:.1f}x)",
                f"{row['mask_agreement']:.3%}",
            ]
        )
    columns = rows(["matrix", "loop in PyTorch", "Triton kernel", "masks agree"], lines)
    selection = result["selection"]
    chosen = rows(
        ["half of 11008 x 4096", "kthvalue", "sort"],
        [
            [
                what,
                *(
                    f"{1000 * selection[name]['seconds']:.1f} ms, {selection[name]['peak_bytes'] / 2**20:.0f} MiB"
                    for name in (key, f"{key}, sorted")
                ),
            ]
            for what, key in (("of every row", "rows"), ("of the whole", "whole"))
        ],
    )
    logits = rows(
        ["2,048 labels, 128,256 tokens, width 4,096, with gradient", "time", "memory"],
        [
            [row["name"], f"{1000 * row['seconds']:.1f} ms", f"{row['peak_bytes'] / 2**20:.0f} MiB"]
            for row in result["log_probabilities"]
            if row["name"] != "as set"
        ],
    )
    return (
        "## Kernels on a GPU\n\n"
        "`python -m benchmarks.gpu --only kernels`. Whole matrices by SparseGPT from 4,096 random inputs; with fewer "
        "inputs than columns the\nlast bits decide between many masks, hence the lower agreement at width 11,008. "
        f"{result.get('note', '')}\n\n"
        f"{columns}\n\n{chosen}\n\n{logits}"
    )
