"""The section on models without LayerNorm."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows

COLUMNS = ("source", "at_once", "control", "result")


def layernorm(result: dict[str, Any]) -> str:
    """Return the section on the removal of LayerNorm."""
    runs = [*result["runs"], *([result["experiment"]] if "experiment" in result else [])]
    lines = []
    for run in runs:
        settings = ", ".join(f"{name}={value}" for name, value in run["settings"].items() if name != "control")
        label = "experiment: RMSNorm" if run is result.get("experiment") else "demo"
        errors = run["metrics"]["linearity.attribution_error"]
        lines.append(
            [
                f"{label}, seed {run['seed']}" + (f", {settings}" if settings else ""),
                *(f"{run['losses'][name]:.3f}" if name in run["losses"] else "" for name in COLUMNS),
                f"{errors['before']['value']:.3f} to {errors['after']['value']:.0e}",
                f"{run['metrics']['linearity.norm_error']['after']['value']:.0e}",
                f"{run['seconds']:.0f}",
            ]
        )
    header = [
        "run", "source", "all norms off at once", "trained with all norms", "norms gone one by one",
        "attribution error", "norm error after", "seconds",
    ]  # fmt: skip
    text = (
        "Cross-entropy in nats per token on windows of the corpus that no training saw, of the model in training; "
        "the errors are\nthose of the stored result, loaded by stock transformers. Direct logit attribution is "
        "compared with the effect of taking\na component away.\n\n"
    )
    return "## LayerNorm removed, on the demo\n\n" + text + rows(header, lines)
