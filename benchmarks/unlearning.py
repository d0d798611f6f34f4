"""Time and peak memory of a training step of each unlearning method, against the same loss written plainly.

    python -m benchmarks.unlearning MODEL [--only METHOD ...] [--case CASE] [--repeats N]

The toolkit's side is the method's own code, its training loop included. The plain side is `benchmarks.plain_losses`: a
second copy of the model where the loss has a reference, all logits and their log-softmax in fp32, the same adapters on
the same rows with the same optimizer. Both must begin at the same loss. What the toolkit pays once before the first
step, such as scoring a reference, is measured apart.

Every measurement is a process of its own, forked from one that has loaded the model, on one thread. The sides of a
method take their steps in turn, so that whatever else the machine does meanwhile meets both alike; seconds are CPU
seconds. `neuron-adjust` and `key-space` do not train and are left out. `uoe` runs on a mixture of experts with random
weights, because SmolLM2 has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.record import write_result

METHODS = (
    "ga", "graddiff", "kl-min", "dpo", "npo", "simnpo", "rmu", "undial", "loku", "flat", "lat", "uld-assistant",
    "uld-distillation", "selective-amnesia", "uoe",
)  # fmt: skip
MORE = {"uld-assistant": ("whole",), "graddiff": ("lean",)}
"""Further sides: ULD's loss on an assistant with all blocks, and the toolkit's step under `lean_allocator`."""
TOLERANCE = 1e-3
"""How far the first losses of both sides may lie apart, relative to the larger of the loss and 1."""

Run = dict[str, float]


def sides(name: str) -> tuple[str, ...]:
    """Return the sides of a method."""
    return ("toolkit", "plain", *MORE.get(name, ()))


class Side:
    """A process that takes its steps when it is told to.

    Args:
        measure: Measures in the new process; it takes what waits for the next turn, and returns the result.
    """

    def __init__(self, measure: Callable[[Callable[[], None]], Run]) -> None:
        told, tell = os.pipe()
        heard, say = os.pipe()
        self.result: Run | None = None
        self.process = os.fork()
        if self.process == 0:
            os.close(tell)
            os.close(heard)
            os._exit(_take_turns(measure, os.fdopen(told), os.fdopen(say, "w")))
        os.close(told)
        os.close(say)
        self.tell, self.heard = os.fdopen(tell, "w"), os.fdopen(heard)

    def go_on(self) -> None:
        """Let it work until its next turn, or its end.

        Raises:
            RuntimeError: It failed.
        """
        print("go", file=self.tell, flush=True)
        line = self.heard.readline()
        if not line:
            raise RuntimeError("a measurement failed")
        if line != "turn\n":
            self.result = json.loads(line)
            os.waitpid(self.process, 0)


def _take_turns(measure: Callable[[Callable[[], None]], Run], told: TextIO, say: TextIO) -> int:
    """Measure in a process of its own; return its exit status."""

    def wait() -> None:
        print("turn", file=say, flush=True)
        told.readline()

    told.readline()
    try:
        result = measure(wait)
    except BaseException:
        # The parent's handlers and buffers are not this process's to run.
        sys.excepthook(*sys.exc_info())
        return 1
    print(json.dumps(result), file=say, flush=True)
    return 0


def pair(model: Path, name: str, case: str, repeats: int) -> dict[str, list[Run]]:
    """Measure the sides of a method in turn, and again; this process never takes a step itself."""
    from benchmarks.training_sides import make_setting, measure

    setting = make_setting(model, name, case)
    runs: dict[str, list[Run]] = {side: [] for side in sides(name)}
    for _ in range(repeats):
        running = {side: Side(lambda wait, side=side: measure(setting, side, wait)) for side in runs}  # type: ignore[misc]
        while any(each.result is None for each in running.values()):
            for each in running.values():
                if each.result is None:
                    each.go_on()
        for side, each in running.items():
            assert each.result is not None
            runs[side].append(each.result)
    return runs


def compare(model: Path, name: str, case: str, repeats: int) -> dict[str, Any]:
    """Measure a method in processes of its own and compare its sides.

    Raises:
        RuntimeError: The sides do not compute the same loss.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name == "uoe":
            from benchmarks.training_setup import make_experts

            make_experts(model := Path(folder))
        words = [sys.executable, "-m", "benchmarks.unlearning", str(model), "--pair", "--only", name, "--case", case]
        done = subprocess.run([*words, "--repeats", str(repeats)], stdout=subprocess.PIPE, text=True, check=True)
    runs: dict[str, list[Run]] = json.loads(done.stdout.splitlines()[-1])
    first, other = (runs[side][0]["first_loss"] for side in ("toolkit", "plain"))
    if abs(first - other) > TOLERANCE * max(1.0, abs(other)):
        raise RuntimeError(f"{name}: the first loss is {first} here and {other} plainly")
    median = {
        side: {key: statistics.median(run[key] for run in many) for key in many[0]} for side, many in runs.items()
    }
    row: dict[str, Any] = {"runs": runs, "median": median}
    for side in runs:
        base = "plain" if side == "toolkit" else "toolkit"
        if side == "plain":
            continue
        # Steps that followed each other, not medians of what the machine was like at different times.
        ratios = [one["seconds"] / two["seconds"] for one, two in zip(runs[side], runs[base], strict=True)]
        row[side] = {
            "against": base,
            "time_ratio": statistics.median(ratios),
            "time_range": [min(ratios), max(ratios)],
            "memory_ratio": median[side]["peak_bytes"] / median[base]["peak_bytes"],
        }
        print(f"{case} {name} {side}:", json.dumps(row[side]), file=sys.stderr, flush=True)
    return row


def main() -> None:
    """Measure every method and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--case", default="short")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--remark", default="", help="what else ran on the machine")
    parser.add_argument("--pair", action="store_true", help="measure one method and print its runs")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.pair:
        print(json.dumps(pair(options.model, options.only[0], options.case, options.repeats)))
        return
    from benchmarks.training_setup import CASES, SETTINGS, STEPS
    from llmsurgery.compute.source import resolve_source

    source = resolve_source(options.model)
    results: dict[str, Any] = {}
    try:
        for name in options.only:
            results[name] = compare(source, name, options.case, options.repeats)
    except KeyboardInterrupt:
        print("interrupted: the methods so far are written", file=sys.stderr)
    facts = {
        "model": options.model.name,
        "dtype": "float32",
        "threads": 1,
        "cores_used": len(os.sched_getaffinity(0)),
        "nice": os.nice(0),
        "remark": options.remark,
        "case": {"name": options.case, **dataclasses.asdict(CASES[options.case])},
        "steps": STEPS,
        "settings": {name: SETTINGS[name] for name in results},
    }
    write_result("unlearning", {**facts, "results": results})


if __name__ == "__main__":
    main()
