"""A recipe of three steps with gates on SmolLM2-135M-Instruct: passed, failed, killed and resumed, replayed.

    python -m benchmarks.recipe_smollm2 MODEL QUESTIONS.jsonl MCQ.jsonl [--steps N] [--work DIR]

QUESTIONS holds `question/answer` rows: the first are forgotten, the next are kept. MCQ holds multiple-choice rows in
ARC's layout. The recipe unlearns (KL minimisation), points a country at another (ROCR), and takes the prior of answer
letters away (PriDe). It is run five times, each in a process of its own: as it is; with a gate that cannot hold; as it
is, but killed with SIGKILL in its last step, and then resumed; and from the manifest of the first run. Results are
compared file by file; of the manifests, what is neither time nor memory nor path.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import contents
from benchmarks.record import write_result

FORGET, RETAIN, ITEMS = 8, 24, 12
STEPS = ("forget", "redirect", "letters")
KILLED_IN = f"step {len(STEPS)} of {len(STEPS)}"
KILL_AFTER = 20.0
"""Seconds of the last step."""


def recipe(model: Path, files: dict[str, Path], steps: int) -> dict[str, Any]:
    """Return the recipe."""
    return {
        "name": "three-steps",
        "model": str(model),
        "seed": 0,
        "data": {name: str(path) for name, path in files.items() if name != "mcq"},
        "settings": {"eval.generate": False, "eval.text_rows": 8},
        "steps": [
            {
                "name": "forget",
                "task": "unlearn",
                "method": "kl-min",
                "guard": "none",
                "until": "none",
                "settings": {"max_steps": steps, "batch_size": 2, "lr": 1e-3, "save_every": 10},
                "require": ["forget.token_prob<=0.8x", "utility.ppl_ratio<=1.2"],
            },
            {
                "name": "redirect",
                "task": "redirect",
                "method": "rocr",
                "from": "France",
                "to": "China",
                "settings": {"layers": "4,5,6", "l2": 10, "stats_tokens": 4096},
                "require": ["redirect.strength>=0.5", "utility.ppl_ratio<=1.05"],
            },
            {
                "name": "letters",
                "task": "debias",
                "method": "pride",
                "data": {name: str(path) for name, path in files.items() if name == "mcq"},
                "settings": {"items": ITEMS},
                "require": ["mcq.rstd<=0.8x", "utility.ppl_ratio<=1.05"],
            },
        ],
        "require": ["utility.ppl_ratio<=1.2"],
    }


def run(words: Sequence[str], log: Path, kill_when: str = "") -> dict[str, Any]:
    """Run the command line; return exit code and seconds.

    Args:
        words: Arguments.
        log: File for what it prints on stderr.
        kill_when: Kill it `KILL_AFTER` seconds after this appears there; empty: let it end.
    """
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stream:
        words = [sys.executable, "-m", "llmsurgery", "run", *words]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stream, env=environment)
    while kill_when and child.poll() is None:
        time.sleep(0.05)
        if kill_when in log.read_text(errors="replace"):
            time.sleep(KILL_AFTER)
            child.send_signal(signal.SIGKILL)
            break
    return {"exit_code": child.wait(), "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run, kill, resume, replay, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("mcq", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        lines = [line for line in options.questions.read_text().splitlines() if line.strip()]
        parts = {"forget": lines[:FORGET], "retain": lines[FORGET : FORGET + RETAIN]}
        parts["mcq"] = options.mcq.read_text().splitlines()[: 2 * ITEMS]
        files = {name: work / f"{name}.jsonl" for name in parts}
        for name, path in files.items():
            path.write_text("\n".join(parts[name]) + "\n")
        path = work / "recipe.json"
        path.write_text(json.dumps(recipe(options.model.resolve(), files, options.steps), indent=2) + "\n")
        results = carry_out(work, path)
    write_result("recipe_smollm2", {"recipe": recipe(Path("MODEL"), {}, options.steps), **results})


def carry_out(work: Path, path: Path) -> dict[str, Any]:
    """Run the recipe in all ways; return what came of each."""
    out = {name: work / name for name in ("passed", "failed", "killed", "replayed")}
    log = work / "log"
    runs: dict[str, Any] = {}

    def note(name: str, **more: object) -> None:
        runs[name] |= more
        print(name, runs[name], flush=True)

    def left(name: str) -> list[str]:
        return sorted(one.name for one in work.glob(f"{name}*"))

    runs["passed"] = run([str(path), "-o", str(out["passed"]), "-v"], log)
    manifest: Any = json.loads((out["passed"] / "surgery.json").read_text())
    note("passed", gates=manifest["gates"], metrics=manifest["metrics"])
    expected = contents(out["passed"])

    gate = "steps.letters.require=[mcq.rstd<=0.01x]"
    runs["failed"] = run([str(path), gate, "-o", str(out["failed"])], log)
    note("failed", gate=gate, left=left("failed"), output=out["failed"].exists())

    runs["killed"] = run([str(path), "-o", str(out["killed"])], log, KILLED_IN)
    note("killed", killed_in=KILLED_IN, output=out["killed"].exists(), left=left("killed"))
    runs["resumed"] = run([str(path), "-o", str(out["killed"]), "--resume"], log)
    note("resumed", equal=contents(out["killed"]) == expected, left=left("killed"))

    runs["replayed"] = run([str(out["passed"] / "surgery.json"), "-o", str(out["replayed"])], log)
    note("replayed", equal=contents(out["replayed"]) == expected)
    return {"runs": runs, "files_compared": len(expected)}


if __name__ == "__main__":
    main()
