"""Sections on what is forgotten, what stays, and what comes back."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.table.page import machine, rows


def unlearn_smollm2(result: dict[str, Any]) -> str:
    """Return the section on forgetting with SmolLM2."""
    outside = result.get("outside")
    names = {
        "forget.token_prob": "prob:forget.jsonl",
        "retain.token_prob": "prob:neighbours.jsonl",
        "utility.ppl": "ppl",
    }
    lines = []
    for name, metric in result["metrics"].items():
        cells = [f"{metric[when]['value']:.4f}" for when in ("before", "after")]
        for when in ("before", "after"):
            if outside and name in names:
                own = f"{result['bfloat16'][when][name]['value']:.4f}" if "bfloat16" in result else ""
                cells.append(f"{own} / {outside[when][names[name]]:.4f}")
            else:
                cells.append("")
        lines.append([name, *cells])
    record = result["operation"]["record"]
    source = result["operation"].get("guard", {"source": "none"})["source"]
    effect = {
        "none": "`--guard none`: the neighbours go with the forget rows; that is FLAT with forget data alone.",
        "self": "`--guard self`, the default: questions drawn from the model keep the neighbours.",
    }[source]
    weight = result["operation"].get("guard", {}).get("weight", 1.0)
    took = result.get("remark") or f"{result['cost']['seconds']:.0f} s"
    strong = "" if weight == 1 else f", guard.weight={weight:g}"
    if strong:
        effect = f"`--guard self --set guard.weight={weight:g} --until '{result['operation']['until']}'`."
    text = (
        "The model's own greedy answers: 12 questions forgotten (`forget`), 48 of the same form never shown\n"
        f"(`retain`). {effect}\n"
        f"{record['steps']} steps (stopped by: {record['stopped']}), {took}, peak memory "
        f"{result['cost']['rss_bytes'] / 2**30:.1f} GiB, scored in {result['operation']['dtype']}.\n"
    )
    header = ["metric", "before", "after", "bf16 before, ours / outside", "bf16 after, ours / outside"]
    return f"## FLAT on SmolLM2-135M-Instruct, `--guard {source}`{strong}\n\n" + text + "\n" + rows(header, lines)


def guard(result: dict[str, Any]) -> str:
    """Return the section on the guard: plain and guarded runs side by side."""
    names = ["forget.token_prob", "forget.rouge_l", "retain.token_prob", "retain.rouge_l", "utility.ppl_ratio"]
    lines = []
    for name, run in result["runs"].items():
        values = [f"{run['metrics'][metric]['after']['value']:.3f}" for metric in names]
        lines.append([f"`{name}`", *values, str(run["record"]["steps"]), f"{run['seconds']:.0f}"])
    text = "FLAT on the embedded demo until `forget.token_prob<=0.2x`; after (before: 1, but token_prob .97).\n"
    return "## The guard\n\n" + text + "\n" + rows(["run", *names, "steps", "seconds"], lines)


def guard_curves() -> str:
    """Return the section on the trade-off curves, one row per curve, from all results."""
    goals = (0.5, 0.3, 0.2, 0.15)
    lines, last = [], None
    for file in sorted(RESULTS.glob("guard_curve-2*.json")):
        last = json.loads(file.read_text())
        cells = []
        for goal in goals:
            point = next((point for point in last["curve"] if point["forget"] <= goal), None)
            cells.append(
                "" if point is None else "{forget:.2f} / {neighbours:.2f} / {ppl:.3f} ({step})".format(**point)
            )
        lines.append([last["name"], *cells])
    if last is None:
        return ""
    text = (
        "FLAT on SmolLM2-135M-Instruct, its own answers, 12 forgotten and 48 unseen neighbours, in fp32: kept share\n"
        "of the token probability of the forget rows / of the neighbours / perplexity ratio (step), where the forget\n"
        "rows first fall to the share in the column's head.\n"
    )
    header = ["run", *(f"to {goal}x" for goal in goals)]
    return "## The guard's trade-off\n\n" + text + "\n" + rows(header, lines) + "\n\n" + machine(last) + "\n"


def comparison(result: dict[str, Any]) -> str:
    """Return the section on several methods side by side."""
    from llmsurgery.report.comparison import comparison_markdown

    demo = result["model"] == "demo"
    attacked = any(row.get("attacks") for row in result["rows"])
    where = "on the embedded demo" if demo else f"on {result['model']}"
    text = (
        "`llmsurgery compare`, default settings but for what a recipe names. `retain kept` is of rows that were shown\n"
        "to all methods but `flat` and `ga`"
        + ("" if demo else "; `unseen kept` is of rows that none was given")
        + ".\n"
    )
    if hidden := result.get("not_in_labels"):
        text += f"All recipes that have the setting: {', '.join(f'`{part}`' for part in hidden)}.\n"
    if remark := result.get("remark"):
        text += f"{remark}\n"
    title = "Methods side by side, attacked," if attacked else "Methods side by side"
    return f"## {title} {where}\n\n{text}\n" + comparison_markdown(result)


def attacks(_: dict[str, Any]) -> str:
    """Return the section on attacked results, their control being rows that the source does not know."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines, budgets = [], {}
    # Results may have been attacked apart.
    attacked: dict[str, Any] = {}
    for file in sorted(RESULTS.glob("attacks_smollm2_control*.json")):
        attacked |= json.loads(file.read_text())["results"]
    for name, found in attacked.items():
        for attack, one in found.items():
            rows_known = one.get("control_rows") or {}
            control = f"{number(rows_known.get('before'))} to {number(rows_known.get('after'))}" if rows_known else ""
            scores = [number(one[key]) for key in ("source", "before", "after")]
            rest = [number(one.get(key)) for key in ("recovery", "control_gain", "excess")]
            lines.append([f"`{name}`", attack, *scores, control, *rest, one["verdict"], one["reason"]])
            chosen = {**one["settings"], **{key: value for key, value in one["budget"].items() if key == "steps"}}
            kept = ("score", "trainers", "modes", "sizes", "folds", "epochs", "rank", "alpha", "lr", "steps", "bits")
            budgets[attack] = ", ".join(f"{key} {chosen[key]}" for key in kept if key in chosen)
    said = "; ".join(f"{attack}: {budget}" for attack, budget in budgets.items())
    text = (
        "Score of the forget rows on the source, on the result, and after the attack's best point; of the control\n"
        "rows (true answers that the source does not know) before and after the same attack; what came back, what\n"
        f"the control rows gained in the same unit, and the difference. Budget: {said}.\n"
    )
    header = ["result", "attack", "source", "before", "after", "control rows", "recovery", "control gain", "excess"]
    return (
        "## Attacks on SmolLM2-135M-Instruct, with control rows\n\n"
        + text
        + "\n"
        + rows([*header, "verdict", "reason"], lines)
    )
