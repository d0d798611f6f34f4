"""Time and memory of `recover-alignment --method restore` on a pair of Llama models with 1.1 billion parameters.

    python -m benchmarks.restore_large --tokenizer FOLDER [--prompts N] [--dtype auto] [--work DIR]

Both models are random and differ in every entry, so that every entry is a candidate. Two runs, of one step and of
three, each in a process of its own: their difference is two timed steps, from which the twenty steps of the default are
extrapolated, and the record says so. Rows that figures are taken of are few; a step's cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.llama_shapes import Size, cut_tokenizer, llama_shapes, make_checkpoint
from benchmarks.measure import run_measured
from benchmarks.record import write_result

TINY_LLAMA = Size(32000, 2048, 5632, 22, 32, 4)
DEFAULT_STEPS = 20
RUNS = (1, 3)


def rows(count: int) -> dict[str, str]:
    """Return the lines of both data files: harmless stand-ins of equal length."""
    asked = [{"prompt": f"Tell me about the purple thing with the number {number}."} for number in range(count)]
    task = [{"question": f"What is {number} and one?", "answer": f"It is {number + 1}."} for number in range(count)]
    return {
        name: "".join(json.dumps(row) + "\n" for row in lines) for name, lines in (("harmful", asked), ("task", task))
    }


def main() -> None:
    """Make the pair, run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of a tokenizer")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for seed, name in enumerate(("parent", "child")):
            if not (work / name / "config.json").is_file():
                make_checkpoint(work / name, TINY_LLAMA, seed)
                cut_tokenizer(options.tokenizer, work / name, TINY_LLAMA.vocabulary)
        for name, text in rows(options.prompts).items():
            (work / f"{name}.jsonl").write_text(text)
        costs: dict[int, dict[str, float]] = {}
        for steps in RUNS:
            costs[steps] = one_run(work, steps, options.dtype)
            print(steps, costs[steps], flush=True)
    first, last = RUNS
    step = {name: (costs[last][name] - costs[first][name]) / (last - first) for name in ("seconds", "cpu_seconds")}
    result: dict[str, Any] = {
        "parameters": sum(prod(shape) for shape in llama_shapes(TINY_LLAMA).values()),
        "prompts": options.prompts,
        "dtype": options.dtype,
        "runs": {str(steps): cost for steps, cost in costs.items()},
        "peak_bytes": max(cost["peak_bytes"] for cost in costs.values()),
        "per_step": step,
        "extrapolated": {name: costs[first][name] + (DEFAULT_STEPS - first) * value for name, value in step.items()},
        "steps_extrapolated_to": DEFAULT_STEPS,
    }
    write_result("restore_large", result)


def one_run(work: Path, steps: int, dtype: str) -> dict[str, float]:
    """Run `restore` with so many steps; the result is removed."""
    out = work / f"out-{steps}"
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "llmsurgery", "recover-alignment", str(work / "child"), "--aligned"]
    words += [str(work / "parent"), "--method", "restore", "-o", str(out), "--dtype", dtype, "--no-undo", "-q"]
    words += [word for name in ("harmful", "task") for word in (f"--{name}", str(work / f"{name}.jsonl"))]
    # The floor of the task is not what is measured: random models have no task to lose.
    given = [f"steps={steps}", "controls=false", "drop=1", "eval.generate=false", "eval.text_rows=1"]
    cost = run_measured([*words, *(word for item in given for word in ("--set", item))])
    shutil.rmtree(out)
    return cost


if __name__ == "__main__":
    main()
