"""The section on a narrower residual stream."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows


def prune_pat(result: dict[str, Any]) -> str:
    """Return the section on PAT against other ways to the same size."""
    source = result["results"][0]
    lines = []
    for row in result["results"]:
        low, high = row["ppl"]["interval"]
        speed, cost = row["speed"], row.get("cost")
        lines.append(
            [
                f"`{row['name']}`",
                f"{row['parameters'] / 1e6:.1f} M ({row['parameters'] / source['parameters']:.2f}x)",
                f"{row['weight_bytes'] / 1e6:.1f} MB",
                f"{row['ppl']['value']:.2f} ({low:.2f} to {high:.2f})",
                *(f"{speed[kind]:.0f} ({speed[kind] / source['speed'][kind]:.2f}x)" for kind in ("prefill", "decode")),
                f"{cost['cpu_seconds']:.0f} s, {cost['peak_bytes'] / 2**30:.1f} GiB" if cost else "",
            ]
        )
    text = (
        f"`prune --method pat`, {result['steps']} steps of {result['rows']} x {result['tokens']} tokens, from\n"
        f"{result['text']}; perplexity on {result['passages']} passages that no run saw. `random` trains as long, on\n"
        "channels that were drawn before; `shortgpt` and `llm-pruner` train nothing, and have PAT's size or the next\n"
        f"larger one. Tokens per second: {result['prefill']} read at once, {result['decoded']} written, fp32, the\n"
        f"fastest of {result['repeats']} in turn; other jobs may have run meanwhile.\n{result.get('note', '')}\n"
    )
    header = ["model", "parameters", "weights", "perplexity", "prefill", "decode", "CPU time and memory of pruning"]
    return "## Three quarters of the width, SmolLM2-135M\n\n" + text + "\n" + rows(header, lines)


def prune_pat_settings(result: dict[str, Any]) -> str:
    """Return the section on settings of PAT and on sets of channels that are not learned."""
    lines = []
    for run in result["runs"]:
        given, found = run["settings"], run["ppl"]["result"]
        low, high = found["interval"]
        lines.append(
            [
                run["name"],
                given["kept"],
                str(given["operator_rank"]),
                str(given["horizon"] or "default"),
                f"{given['rounded']:g}",
                "default" if given["gate_lr"] is None else f"{given['gate_lr']:g}",
                f"{given['lr']:g}, {given['train'] if given['train'] == 'full' else 'lora ' + str(given['rank'])}",
                f"{found['value']:.1f} ({low:.1f} to {high:.1f})",
                f"{run['record']['undecided_gates']:.0%}",
            ]
        )
    first = result["runs"][0]
    record, source = first["record"], first["ppl"]["source"]
    text = (
        f"{record['steps']} steps of {first['settings']['batch_size']} x {first['settings']['window']} tokens "
        f"to a width of {record['kept_width']}, perplexity on the {first['data']['text']['rows']} passages of\n"
        "the section above (source "
        f"{source['value']:.2f}); one seed each, many runs at once on one card, so times mean nothing.\n"
        "Defaults then were a horizon of a third of the steps and gates of 6 / horizon; those of the first row are "
        f"today's,\nbut for the rank, which is 192 by default at this width.\n{result['note']}\n"
    )
    header = ["run", "kept", "operator rank", "horizon", "rounded", "gate lr", "lr", "perplexity", "undecided"]
    return "## Settings of PAT, SmolLM2-135M\n\n" + text + "\n" + rows(header, lines)
