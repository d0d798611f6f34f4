"""Sections on redirections."""

from __future__ import annotations

from typing import Any

from benchmarks.table.page import rows


def redirect_smollm2(result: dict[str, Any]) -> str:
    """Return the section on redirection with SmolLM2."""
    cells, forms, main = result["questions"]["cells"], result["forms"], result["runs"][0]
    out = [f"{name}: {cell['known']} of {cell['asked']}" for name, cell in cells.items() if name[7:] not in forms]
    found, cost = main["figures"], main["cost"]
    lines = []
    for side in ("forget", "retain"):
        for form in forms:
            name = f"ort.{side}_{form}"
            cell = cells[f"{side}_{form}"]
            change = f"-{found['drops'][form]:.0%}" if side == "forget" else f"{found['neighbours'][form]:.1%} kept"
            limit = f"-{cell['limit']:.0%}" if cell["limit"] is not None else ""
            numbers = [f"{found[when][name]:.3f}" for when in ("before", "after")]
            lines.append([f"`{side}_{form}`", f"{cell['known']} of {cell['asked']}", *numbers, change, limit])
    pairs = " and ".join(f"{pair['from']} to {pair['to']}" for pair in result["pairs"])
    ppl = [f"{found[when]['utility.ppl']:.3f}" for when in ("before", "after")]
    patch, record = result["patch"], main["record"]
    same = "equal" if patch["applied_equal"] and patch["reverted_equal"] else "DIFFERENT"
    settings = " ".join(f"`--set {item}`" for item in main["settings"])
    layers = ", ".join(map(str, record["layers"]))
    text = (
        f"`redirect --method rocr` {settings or 'with its defaults'}: {pairs}, asked by `eval --suite ort`; score per\n"
        f"question, exp of the mean log p. Known: at least {result['questions']['floor']:g}, and at most half of it\n"
        "with the new name in the question. `limit`: the drop where the question itself names the new name.\n"
        + (f"Left out for want of known questions: {', '.join(out)}.\n" if out else "")
        + f"Layers {layers} (by {record['layers_by']}); form gap {found['form_gap']:.2f}, neighbours "
        f"{found['neighbours_mean']:.1%} kept, perplexity {ppl[0]} to {ppl[1]} ({found['ppl_ratio']:.4f}) on\n"
        f"{result['passages']} passages; {cost['seconds']:.0f} s ({cost['cpu_seconds']:.0f} CPU s, other jobs ran "
        f"meanwhile), peak memory {cost['peak_bytes'] / 2**30:.1f} GiB, figures and the writing of files included.\n"
        f"Patch {patch['patch_bytes'] / 1e3:.0f} KB; applied to a fresh copy and reverted: all files {same}.\n"
    )
    table = rows(["cell", "known", "before", "after", "change", "limit"], lines)
    curve = []
    for run in result["runs"]:
        one = run["figures"]
        values = [f"{one['drops'][form]:.2f}" for form in forms] + [f"{one['form_gap']:.2f}"]
        values += [f"{one['neighbours_mean']:.3f}", f"{one['ppl_ratio']:.4f}"]
        curve.append([" ".join(f"`{item}`" for item in run["settings"]) or "defaults", *values])
    header = ["settings", *(f"drop {form}" for form in forms), "form gap", "neighbours", "ppl ratio"]
    more = "\n\nStrength against neighbours:\n\n" + rows(header, curve) if len(curve) > 1 else ""
    return "## Redirection on SmolLM2-135M-Instruct\n\n" + text + "\n" + table + more


def redirect_7b(result: dict[str, Any]) -> str:
    """Return the section on one redirection of a large checkpoint."""
    names = {
        "cp shards": "`cp` of the changed shard, then sync",
        "forward": "the forward alone: read and run the first blocks",
        "redirect --link": "`redirect --link --no-undo`",
        "redirect --link, undo": "`redirect --link`",
        "transformers": "transformers: load, edit one matrix, save, then sync",
        "mergekit": f"mergekit {result['mergekit']} passthrough, one matrix, then sync",
        "rome": "plain ROME in memory: load, keys of 32 tokens, edit, save, then sync",
    }
    lines = []
    for name, title in names.items():
        runs, row = result["runs"].get(name), result["median"].get(name)
        if not runs:
            continue
        seconds = [run["seconds"] for run in runs]
        ratio = f"{row['seconds'] / result['floor_seconds']:.2f}x" if name not in ("cp shards", "forward") else ""
        lines.append(
            [
                title,
                f"{row['seconds']:.1f} ({min(seconds):.1f} to {max(seconds):.1f}, {len(runs)} runs)",
                ratio,
                f"{row['cpu_seconds']:.1f}",
                f"{max(run['peak_bytes'] for run in runs) / 2**20:,.0f}",
                f"{row['own_bytes'] / 1e9:.2f}" if "own_bytes" in row else "",
            ]
        )
    own = next(run for name in ("redirect --link", "redirect --link, undo") for run in result["runs"].get(name, []))
    loads = [run["load"] for runs in result["runs"].values() for run in runs]
    first = next((runs[0] for runs in result["first"].values()), None)
    once = f"The first run, which also makes the statistics, took {first['seconds']:.0f} s.\n" if first else ""
    layers = ", ".join(map(str, result["layers"]))
    changed = next((run["changed"] for runs in result["runs"].values() for run in runs if "changed" in run), None)
    checked = "" if changed is None else f" {len(changed)} of 291 tensors differ from the checkpoint's in a byte."
    light = [
        [f"`{name}`" if name != "plan of 70B" else "`redirect --dry-run` of 70B shapes, 141 GB, headers alone",
         f"{row['median']:.2f} ({row['minimum']:.2f} to {row['maximum']:.2f})"]
        for name, row in result["light"].items()
    ]  # fmt: skip
    text = (
        f"`redirect --method rocr --set eval.figures=edit --set stats_tokens={result['stats_tokens']}`: one name, "
        f"layers {layers}, in random bf16\nweights of Llama 7B's shapes ({result['checkpoint_bytes'] / 1e9:.2f} GB, "
        f"3 shards) and SmolLM2's tokenizer cut to 32,000 tokens, computed in\n{result['dtype']} with statistics from "
        f"the cache, on {result['file_system']}. Before every run checkpoint and statistics are taken\nout of the page "
        "cache; every output is synced. The floor is `cp` and the forward alone, which runs the 12 prompts\n"
        f"({result['prompt_tokens']} tokens) as one padded batch through blocks 0 to {result['layers'][-1]}, imports "
        "included. `redirect` measures the source, writes,\nand measures the written result: it reads these blocks "
        f"twice.{checked}\n{once}"
        f"`redirect.strength` after: {own['metrics']['redirect.strength']:.2f}. Other jobs shared the machine (load "
        f"{min(loads):.1f} to {max(loads):.1f}, priority {result['nice']}): read the ranges.\n"
    )
    header = ["command", "seconds, median", "of the floor", "CPU s", "peak MiB", "GB written"]
    return (
        "## One redirection of 13.5 GB\n\n" + text + "\n" + rows(header, lines)
        + "\n\n" + rows(["command, process start included", "seconds, median"], light)
    )  # fmt: skip
