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
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from benchmarks.record import write_result

if TYPE_CHECKING:
    from benchmarks.training_sides import Setting

METHODS = (
    "ga", "graddiff", "kl-min", "dpo", "npo", "simnpo", "rmu", "undial", "loku", "flat", "lat", "uld-assistant",
    "uld-distillation", "selective-amnesia", "uoe",
)  # fmt: skip
MORE = {"uld-assistant": ("whole",), "graddiff": ("lean",)}
"""Further sides: ULD's loss on an assistant with all blocks, and the toolkit's step under `lean_allocator`."""
TOLERANCE = 1e-3
"""How far the first losses of both sides may lie apart, relative to the larger of the loss and 1."""

Run = dict[str, Any]


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
            _take_turns(measure, os.fdopen(told), os.fdopen(say, "w"))
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


def _take_turns(measure: Callable[[Callable[[], None]], Run], told: TextIO, say: TextIO) -> NoReturn:
    """Measure in a process of its own, and end it."""

    def wait() -> None:
        print("turn", file=say, flush=True)
        told.readline()

    told.readline()
    status = 1
    try:
        print(json.dumps(measure(wait)), file=say, flush=True)
        status = 0
    finally:
        # The handlers and buffers of the first process are not this one's to run.
        if status:
            traceback.print_exc()
        os._exit(status)


def all_seconds(runs: list[Run]) -> list[float]:
    """Return the seconds of all steps."""
    return [seconds for run in runs for seconds in run["seconds"]]


def summary(runs: list[Run]) -> dict[str, float]:
    """Return the median over steps, or over processes for what each has once."""
    once = {key: statistics.median(run[key] for run in runs) for key in ("peak_bytes", "once_seconds", "first_loss")}
    return {"seconds": statistics.median(all_seconds(runs)), **once}


def measure_sides(setting: Setting) -> dict[str, Run]:
    """Measure the sides of a method in turn; this process never takes a step itself."""
    from benchmarks.training_sides import measure

    running = {side: Side(partial(measure, setting, side)) for side in sides(setting.name)}
    while any(each.result is None for each in running.values()):
        for each in running.values():
            if each.result is None:
                each.go_on()
    return {side: each.result for side, each in running.items() if each.result is not None}


def compare(name: str, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Compare the sides of a method.

    Raises:
        RuntimeError: The sides do not compute the same loss.
    """
    first, other = (runs[side][0]["first_loss"] for side in ("toolkit", "plain"))
    if abs(first - other) > TOLERANCE * max(1.0, abs(other)):
        raise RuntimeError(f"{name}: the first loss is {first} here and {other} plainly")
    row: dict[str, Any] = {"runs": runs, "sides": {side: summary(many) for side, many in runs.items()}, "ratios": {}}
    for side in (side for side in runs if side != "plain"):
        base = "plain" if side == "toolkit" else "toolkit"
        # Of steps that followed each other, not of medians of what the machine was like at different times.
        ratios = [one / two for one, two in zip(all_seconds(runs[side]), all_seconds(runs[base]), strict=True)]
        row["ratios"][side] = {
            "against": base,
            "time": statistics.median(ratios),
            "time_range": [min(ratios), max(ratios)],
            "memory": row["sides"][side]["peak_bytes"] / row["sides"][base]["peak_bytes"],
        }
        print(f"{name} {side}:", json.dumps(row["ratios"][side]), file=sys.stderr, flush=True)
    return row


def make_settings(model: Path, folder: Path, names: list[str], case: str) -> list[Setting]:
    """Load what the methods run on."""
    from benchmarks.training_setup import load, make_experts
    from benchmarks.training_sides import make_setting

    loaded = load(model)
    settings = [make_setting(loaded, model, name, case) for name in names if name != "uoe"]
    if "uoe" in names:
        make_experts(folder)
        settings.append(make_setting(load(folder), None, "uoe", case))
    return settings


def main() -> None:
    """Measure every method and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--case", default="short")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so long")
    parser.add_argument("--remark", default="", help="what else ran on the machine")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    # Before torch is imported, and counts the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.training_setup import CASES, SETTINGS, STEPS
    from llmsurgery.compute.source import resolve_source

    runs: dict[str, dict[str, list[Run]]] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(resolve_source(options.model), Path(folder), options.only, options.case)
        # Every method once, then again: a run that is cut short has all of them.
        for setting in [*settings] * options.repeats:
            if time.monotonic() < end:
                for side, run in measure_sides(setting).items():
                    runs.setdefault(setting.name, {}).setdefault(side, []).append(run)
                results[setting.name] = compare(setting.name, runs[setting.name])
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
