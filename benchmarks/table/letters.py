"""The section on answer letters."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import mebibytes, rows

WHEN = ("before", "after")


def debias_smollm2(result: dict[str, Any]) -> str:
    """Return the section on the prior of answer letters of SmolLM2."""
    base, count = result["base"], len("ABCD"[: len(result["base"]["recall"])])
    halves = []
    for name, found in result["halves"].items():
        spread, right = found["rstd"], found["accuracy"]
        low, high = spread["middle_95"]
        halves.append(
            [f"`{name}`", f"{spread['mean']:.1f} +- {spread['deviation']:.1f}", f"{low:.1f} to {high:.1f}",
             f"{right['mean']:.4f} +- {right['deviation']:.4f}"]
        )  # fmt: skip
    lines = []
    for name, found in result["methods"].items():
        metrics, cells = found["metrics"], [f"`{name}`"]
        for metric, digits in (
            ("mcq.rstd", 1), ("mcq.accuracy", 4), ("bias.stereotype_rate", 3), ("utility.ppl", 3), ("utility.kl", 5),
        ):  # fmt: skip
            pair = metrics.get(metric)
            cells.append("" if pair is None else " to ".join(f"{pair[w]['value']:.{digits}f}" for w in WHEN))
        cells.append(f"{found['predicted']['rstd']:.1f}" if "predicted" in found else "")
        lines.append([*cells, f"{found['seconds']:.0f}"])
    chosen = ", ".join(f"{letter} {share:.0%}" for letter, share in zip("ABCDEFGHIJ", base["chosen"], strict=False))
    first = next(iter(result["methods"].values()))
    text = (
        f"{result['rows']} questions of ARC in all {count} cyclic orders, asked once ({result['forwards']} forwards in "
        f"all). On the\nheld-out half the model chooses {chosen}; spread of the recalls {base['rstd']:.1f} points, "
        f"accuracy {base['accuracy']:.4f}.\nEstimated on one random half and measured on the other, "
        "mean and deviation over the halves, and their middle 95%:\n"
    )
    reloaded = first["metrics"]["mcq.rstd"]["after"]["n"] if "mcq.rstd" in first["metrics"] else 0
    more = (
        f"\n\nEach checkpoint loaded again and asked {reloaded} held-out questions in every order; `predicted` is the "
        "spread that\nthe kept log-probabilities of the source with the offsets give for the same questions.\n\n"
    )
    header = ["method", "rstd", "accuracy", "stereotype rate", "perplexity", "KL", "predicted", "seconds"]
    table = rows(["estimator", "rstd", "middle 95%", "accuracy"], halves)
    return "## Answer letters on SmolLM2-135M-Instruct\n\n" + text + "\n" + table + more + rows(header, lines)


def debias_cost(result: dict[str, Any]) -> str:
    """Return the section on what the methods of `debias` take."""
    lines = [
        [f"`{name}`", f"{cost['seconds']:.0f}", f"{cost['cpu_seconds']:.0f}", mebibytes(cost)]
        for name, cost in result["costs"].items()
    ]
    text = (
        f"SmolLM2-135M-Instruct, {result['rows']} questions of ARC in all orders, half of them learnt from; whole "
        "commands, figures before and\nafter included.\n\n"
    )
    return "## Cost of `debias`\n\n" + text + rows(["method", "seconds", "CPU seconds", "peak MiB"], lines)
