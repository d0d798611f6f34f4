"""Sections on time and memory."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.table.page import mebibytes, rows


def startup(result: dict[str, Any]) -> str:
    """Return the section on start-up time."""
    lines = [[f"`{name}`", f"{row['median']:.2f}"] for name, row in result["seconds"].items()]
    return "## Start-up\n\n" + rows(["command", "seconds, median of 10"], lines)


def flat_step(result: dict[str, Any]) -> str:
    """Return the section on the FLAT step."""
    lines = []
    for case, row in result["results"].items():
        lean, plain = row["median"]["lean"], row["median"]["plain"]
        shape = f"{case}: {2 * row['pairs']} rows of {row['prompt_tokens']} + {row['answer_tokens']} tokens"
        lines.append(
            [
                shape,
                f"{lean['seconds']:.2f} / {plain['seconds']:.2f} s ({row['time_ratio']:.2f}x)",
                f"{mebibytes(lean)} / {mebibytes(plain)} MiB ({row['memory_ratio']:.2f}x)",
            ]
        )
    text = (
        f"One optimizer step with LoRA on every block matrix, {result['dtype']}. The lean head runs on labelled\n"
        "positions in chunks and keeps no logits; the plain one computes all logits and their log-softmax in fp32.\n"
        "Memory is the peak above the loaded model.\n"
    )
    return (
        "## FLAT step, SmolLM2-135M\n\n"
        + text
        + "\n"
        + rows(["step", "time, lean / plain", "memory, lean / plain"], lines)
    )


def unlearning(newest_result: dict[str, Any]) -> str:
    """Return the section on the training step of every method."""
    # The newest run of each method: they may have been run apart.
    methods: dict[tuple[str, str], Any] = {}
    for file in sorted(RESULTS.glob("unlearning-2*.json")):
        result = json.loads(file.read_text())
        methods |= {(result["case"]["name"], name): (row, result["case"]) for name, row in result["results"].items()}
    lines = []
    for (case, name), (row, size) in sorted(methods.items()):
        sides = row["sides"]
        for side, ratio in row["ratios"].items():
            base = ratio["against"]
            own, other = sides[side], sides[base]
            low, high = ratio["time_range"]
            label = {"toolkit": f"`{name}`", "whole": f"`{name}`, all blocks / a quarter", "lean": f"`{name}`, lean"}[
                side
            ]
            lines.append(
                [
                    f"{label}, {case}: {size['rows']} x ({size['prompt']} + {size['answer']})",
                    f"{own['seconds']:.2f} / {other['seconds']:.2f} s",
                    f"{ratio['time']:.2f}x ({low:.2f} to {high:.2f}, {len(row['runs'][side])} runs)",
                    f"{mebibytes(own)} / {mebibytes(other)} MiB ({ratio['memory']:.2f}x)",
                    f"{own['once_seconds']:.1f} / {other['once_seconds']:.1f} s",
                ]
            )
    rival = [
        name
        for (_, name), (row, _) in sorted(methods.items())
        if row["ratios"]["toolkit"]["time"] > 1.05 or row["ratios"]["toolkit"]["memory"] >= 1
    ]
    lost = f"More than 1.05x the time, or more memory: {', '.join(rival)}." if rival else "None of these loses."
    text = (
        "One optimizer step of the toolkit's own code / of the same loss written plainly: a second copy of the model\n"
        "as the reference, all logits and their log-softmax, the same adapters, rows and optimizer, fp32, one thread.\n"
        "The sides take turns; CPU seconds; peak memory above the loaded model; `once` is paid before the first step.\n"
        f"{lost}\n"
        "`all blocks` is ULD's loss on an assistant of all blocks against its own of a quarter, both in the toolkit's\n"
        "code; the paper says that its training is more than three times cheaper. `lean` is the toolkit's step with\n"
        "the allocator's setting that runs of trained methods have, against the one without; all other rows are\n"
        "without. `loku` starts from random factors: the search for FILA's is no part of a step. `uoe` runs on a\n"
        "mixture of experts with random weights. `neuron-adjust` and `key-space` do not train; methods that are\n"
        "missing here are not measured yet.\n"
        f"Measured at priority {newest_result['nice']}; {newest_result['remark'] or 'the machine was idle'}.\n"
    )
    header = ["step", "time", "ratio", "memory", "once"]
    return "## Unlearning steps, SmolLM2-135M\n\n" + text + "\n" + rows(header, lines)


def memory(_: dict[str, Any]) -> str:
    """Return the section on predicted and measured peaks."""
    lines, saved = [], []
    # The newest run of each case: they may have been run apart.
    cases: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("memory-2*.json")):
        cases |= json.loads(file.read_text())["cases"]
    for name, row in sorted(cases.items()):
        lean = row["lean"]["measured"]
        cells = [f"{row['predicted'] / 2**20:,.0f}", f"{lean / 2**20:,.0f}", f"{row['ratio']:.2f}"]
        lines.append([name, *cells, max(row["memory"]["phases"], key=row["memory"]["phases"].get)])
        if "plain" in row:
            plain = row["plain"]
            saved.append(
                f"`{name}` {plain['measured'] / 2**20:,.0f} instead of {lean / 2**20:,.0f} MiB, "
                f"{plain['cpu_seconds']:.0f} instead of {row['lean']['cpu_seconds']:.0f} CPU seconds"
            )
    outside = [name for name, row in cases.items() if abs(row["ratio"] - 1) > 0.15]
    said = f"Outside of 15%: {', '.join(outside)}." if outside else "All are within 15%."
    text = (
        "`memory_bytes` of `--dry-run` against the largest resident set of the run, MiB, two steps each, on the CPU.\n"
        f"{said} Device memory on a GPU is predicted by the same rules and not measured yet.\n"
        f"With the C library's own allocator settings, one run each: {'; '.join(saved)}.\n"
    )
    header = ["run", "predicted", "measured", "ratio", "phase of the peak"]
    return "## Memory, SmolLM2-135M\n\n" + text + "\n" + rows(header, lines)


def covariance(result: dict[str, Any]) -> str:
    """Return the section on statistics of a wide layer."""
    size, whole = result["size"], result["eigh"]
    scale = (size / whole["size"]) ** 3
    names = {
        "solve": f"`solve`: Woodbury on the {result['tokens']:,} keys",
        "protected": f"`protected`: thin SVD of the {result['tokens']:,} keys",
    }
    lines = []
    for name, title in names.items():
        seconds, cpu = sorted(result["seconds"][name]), sorted(result["cpu_seconds"][name])
        middle = len(seconds) // 2
        span = f"{seconds[middle]:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f}, {len(seconds)} runs)"
        lines.append([title, span, f"{cpu[middle]:.1f}"])
    title = f"`torch.linalg.eigh` of {whole['size']:,} x {whole['size']:,}, fp32, once"
    lines.append([title, f"{whole['seconds']:.0f}", f"{whole['cpu_seconds']:.0f}"])
    if scale != 1:
        title = f"the same of {size:,} x {size:,}: NOT measured, extrapolated as the cube of the side"
        lines.append([title, f"about {whole['seconds'] * scale:.0f}", f"about {whole['cpu_seconds'] * scale:.0f}"])
    text = (
        f"One layer of {size:,} dimensions from {result['tokens']:,} random keys, {result['threads']} thread, each\n"
        f"time from the keys alone; other jobs ran meanwhile (load {result['load']:.0f}): read the CPU seconds.\n"
        f"Peak of the process before `eigh`: {result['peak_bytes'] / 2**20:,.0f} MiB.\n"
    )
    return "## Statistics of a wide layer\n\n" + text + "\n" + rows(["what", "seconds, median", "CPU s"], lines)
