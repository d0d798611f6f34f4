"""Time and peak memory of each method of `debias` on a model, each in a process of its own.

    python -m benchmarks.debias_cost MODEL ARC.jsonl [--rows N]

`--rows` questions of ARC, half of them learnt from, and made-up sentences for `project`; figures before and after are
part of every run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.debias_smollm2 import METHODS, contrast_rows, first_usable
from benchmarks.measure import run_measured
from benchmarks.record import write_result


def main() -> None:
    """Run every method and write the result."""
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args()
    source = resolve_source(options.model)
    costs: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = {"mcq": first_usable(options.questions, options.rows), "contrast": contrast_rows()}
        for name, members in rows.items():
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in members))
        for method, settings in METHODS.items():
            data = "contrast" if method == "project" else "mcq"
            words = [sys.executable, "-m", "llmsurgery", "debias", str(source), "--method", method, "--no-undo", "-q"]
            words += ["-o", str(work / method), f"--{data}", str(work / f"{data}.jsonl")]
            given = {**settings, "kl_budget": "none", "eval.text_rows": 4}
            given |= {"items": options.rows // 2} if method in ("pride", "anchored") else {}
            words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
            costs[method] = run_measured(words)
            print(method, costs[method], flush=True)
    write_result("debias_cost", {"model": options.model.name, "rows": options.rows, "costs": costs})


if __name__ == "__main__":
    main()
