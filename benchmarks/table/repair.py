"""The sections on lost refusals."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import mebibytes, rows

FIGURES = ("safety.refusal_rate", "safety.overrefusal_rate", "task.score", "utility.kl")


def recover_smollm2(result: dict[str, Any]) -> str:
    """Return the section on repairs of SmolLM2."""
    pair, runs = result["pair"], result["runs"]
    first = runs[0]["figures"]
    lines = []
    for side, name in (("aligned", "parent"), ("before", "child")):
        lines.append([name, *(_figure(first, metric, side) for metric in FIGURES), "", "", "", ""])
    for run in runs:
        settings = ", ".join(f"{name}={_short(value)}" for name, value in run["settings"].items())
        size = run["size"] or {}
        lines.append(
            [f"`{run['method']}` {settings}".strip(), *(_figure(run["figures"], metric, "after") for metric in FIGURES),
             f"{size['removed']:.3f}" if "removed" in size else "", f"{size['entries']:,}" if "entries" in size else "",
             f"{run['seconds']:.0f}", f"{run['rss_bytes'] / 2**20:.0f}"]
        )  # fmt: skip
    text = (
        "The parent is SmolLM2-135M-Instruct after a short fine-tuning in which it learns to refuse whatever is purple "
        f"({pair['align_steps']} steps of four\nrows); the child is the parent after {pair['task_steps']} steps on "
        "short SQL queries, in which neither colours nor refusals occur. "
        f"{result['rows']['harmful']} prompts\nthat were not trained on. `removed` is the share of the fine-tuning's "
        "norm that went.\n\n"
    )
    header = [
        "model",
        "refused",
        "others refused",
        "task",
        "KL to the child",
        "removed",
        "entries",
        "seconds",
        "peak MiB",
    ]
    return "## Refusals brought back on SmolLM2-135M-Instruct\n\n" + text + rows(header, lines)


def restore_large(result: dict[str, Any]) -> str:
    """Return the section on `restore` at 1.1 billion parameters."""
    lines = [
        [
            f"{steps} steps" if steps != "1" else "1 step",
            f"{cost['seconds']:.0f}",
            f"{cost['cpu_seconds']:.0f}",
            mebibytes(cost),
        ]
        for steps, cost in result["runs"].items()
    ]
    whole = result["extrapolated"]
    lines.append(
        [
            f"{result['steps_extrapolated_to']} steps, extrapolated",
            f"{whole['seconds']:.0f}",
            f"{whole['cpu_seconds']:.0f}",
            "",
        ]
    )
    text = (
        f"Two random models of {result['parameters']:,} parameters that differ in every entry, {result['prompts']} "
        f"prompts,\ndtype {result['dtype']}; whole runs, loading, figures and writing included. Two steps are timed "
        "(the difference of both runs), the\nothers are extrapolated from them.\n\n"
    )
    return (
        "## `restore` on a pair of 1.1 billion parameters\n\n"
        + text
        + rows(["run", "seconds", "CPU seconds", "peak MiB"], lines)
    )


def _figure(figures: dict[str, Any], metric: str, side: str) -> str:
    found = figures.get(metric, {}).get(side)
    return "" if found is None else f"{found:.3f}"


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
