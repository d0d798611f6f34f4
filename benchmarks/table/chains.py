"""The section on recipes."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows

WHAT = {
    "passed": "as it is",
    "failed": "with a gate that cannot hold",
    "killed": "killed with SIGKILL in its last step",
    "resumed": "then `--resume`",
    "replayed": "`llmsurgery run` of the first run's manifest",
}


def recipe_smollm2(result: dict[str, Any]) -> str:
    """Return the section on a recipe of three steps."""
    lines = []
    for name, what in WHAT.items():
        run = result["runs"][name]
        came = "output" if run.get("output", name == "passed") else "no output"
        if "equal" in run:
            came = "same bytes" if run["equal"] else "other bytes"
        lines.append([what, str(run["exit_code"]), came, f"{run['seconds']:.0f}"])
    steps = ", ".join(f"`{step['task']} --method {step['method']}`" for step in result["recipe"]["steps"])
    gates = [
        [f"`{gate['gate']}`", gate["step"], f"{gate['value']:.4g}", f"{gate['limit']:.4g}"]
        for gate in result["runs"]["passed"]["gates"]
        if gate["step"]
    ]
    text = (
        f"{steps}; gates after each and at the end. {result['files_compared']} files are compared, the manifest\n"
        "without times, memory and paths.\n\n"
    )
    figures = "\n\n" + rows(["gate", "after", "value", "limit"], gates)
    return (
        "## A recipe of three steps on SmolLM2-135M-Instruct\n\n"
        + text
        + rows(["run", "exit code", "result", "seconds"], lines)
        + figures
    )
