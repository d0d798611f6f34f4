"""Sections on checkpoints, patches and runs as files."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.table.page import rows


def kill_resume(result: dict[str, Any]) -> str:
    """Return the section on killed and resumed runs."""
    places = ["training", "writing and measuring", "after publishing"]
    lines = []
    for place in places:
        kills = [row for row in result["kills"] if row["killed"] == place]
        good = sum(row["equal"] and not row["left_over"] for row in kills)
        lines.append([place, str(len(kills)), str(good)])
    text = (
        f"`kill -9` at {len(result['kills'])} random moments of a FLAT run on the demo, then `--resume`: how many\n"
        "ended in the bytes of the uninterrupted run (weights, side files, manifest without times and paths).\n"
    )
    return "## Killed and resumed\n\n" + text + "\n" + rows(["killed in", "runs", "equal bytes"], lines)


def patches(result: dict[str, Any]) -> str:
    """Return the section on patches and undo data."""
    lines = []
    for name, row in result["edits"].items():
        same = row["applied_equal"] and row["reverted_equal"] and row["applied_and_reverted_equal"]
        lines.append(
            [
                name,
                str(row["tensors"]),
                f"{row['changed_bytes'] / 1e6:.1f} MB",
                f"{row['patch_bytes'] / 1e3:.1f} KB",
                f"{row['undo_bytes'] / 1e3:.0f} KB ({row['undo_bytes'] / row['changed_bytes']:.0%})",
                f"{row['apply_seconds']:.1f} / {row['revert_seconds']:.1f} s",
                "bit for bit" if same else "DIFFERENT",
            ]
        )
    text = f"{result['model']}, {result['weight_bytes'] / 1e6:.0f} MB of weights in bf16.\n"
    header = [
        "edit",
        "tensors",
        "changed",
        "patch",
        "undo (of the changed bytes)",
        "apply / revert",
        "apply and revert",
    ]
    return "## Patches\n\n" + text + "\n" + rows(header, lines)


def conformance(_: dict[str, Any]) -> str:
    """Return the section on methods and architectures."""
    result: dict[str, Any] = {"methods": {}}
    # The newest of each method: they may have been run apart.
    for file in sorted(RESULTS.glob("conformance*-2*.json"), key=lambda path: path.stem[-15:]):
        result["methods"] |= json.loads(file.read_text())["methods"]
    methods = sorted(result["methods"])
    architectures = list(dict.fromkeys(name for row in result["methods"].values() for name in row))
    lines = []
    for name in architectures:
        cells = []
        for method in methods:
            cell = result["methods"][method].get(name)
            count = "" if cell is None else f"{cell['passed']} in {cell['seconds']:.1f} s"
            cells.append(count + (f", {cell['failed']} FAILED" if cell and cell["failed"] else ""))
        lines.append([f"`{name}`", *cells])
    text = "Checks passed on a tiny checkpoint of each architecture: plan, coverage, bytes, reload, revert, seed.\n"
    return "## Conformance\n\n" + text + "\n" + rows(["checkpoint", *(f"`{m}`" for m in methods)], lines)


def reload(_: dict[str, Any]) -> str:
    """Return the section on results loaded by stock transformers."""
    lines = []
    found: dict[str, Any] = {"methods": {}, "results": {}}
    # The newest of each: they may have been looked at apart.
    for file in sorted(RESULTS.glob("reload-2*.json")):
        document = json.loads(file.read_text())
        found = {kind: found[kind] | document[kind] for kind in found}
    for kind, named in found.items():
        for name, row in named.items():
            same = "equal" if not row["different_positions"] else f"{row['different_positions']} positions differ"
            where = "demo" if kind == "methods" else "SmolLM2"
            cells = [f"{row['tensors']}", row["dtype"], f"{row['logits']:,}", same, "yes" if row["moved"] else "NO"]
            lines.append([f"`{name}`", where, *cells])
    text = (
        "Every plain result, loaded by `AutoModelForCausalLM.from_pretrained` in a fresh process that imports nothing\n"
        "of llmsurgery, against the source's tensors with the edits of a second run (`--save patch`, the same seed)\n"
        "added in memory, or of a larger result those that `llmsurgery diff` finds: logits on fixed prompts, bit for\n"
        "bit. `moved`: they differ from the source's.\n"
    )
    header = ["result", "model", "edited tensors", "dtype", "logits compared", "bits", "moved"]
    return "## Reloaded by stock transformers\n\n" + text + "\n" + rows(header, lines)


def byte_layer(result: dict[str, Any]) -> str:
    """Return the section on writing one matrix of a large checkpoint."""
    names = {
        "cp": "`cp -r`, then sync",
        "apply": "`apply --no-undo`",
        "apply, undo": "`apply`",
        "cp shard": "`cp` of the changed shard, then sync",
        "apply --link": "`apply --link --no-undo`",
        "apply --link, undo": "`apply --link`",
        "transformers": "transformers: load, edit, save, then sync",
        "mergekit": f"mergekit {result['mergekit']} passthrough, then sync",
    }
    lines = []
    for name, row in result["median"].items():
        runs = result["runs"][name]
        ratio = result["ratio"].get(name)
        checked = "untouched_changed" in runs[0]
        lines.append(
            [
                names[name],
                f"{row['seconds']:.1f} ({min(run['seconds'] for run in runs):.1f} to "
                f"{max(run['seconds'] for run in runs):.1f}, {len(runs)} runs)",
                f"{ratio:.2f}x" if ratio is not None else "",
                f"{row['cpu_seconds']:.1f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['own_bytes'] / 1e9:.2f}",
                str(max(run["untouched_changed"] for run in runs)) if checked else "",
                f"{max(run['wrong_entries'] for run in runs):,}" if checked else "",
            ]
        )
    header = [
        "command",
        "seconds, median",
        "of `cp`",
        "CPU s",
        "peak MiB",
        "GB written",
        "others changed",
        "misrounded",
    ]
    heavy = ", ".join(result["heavy_imports"]) or "neither torch nor transformers"
    text = (
        f"A rank-one change of `{result['tensor']}` in a checkpoint of random bf16 weights\n"
        f"with the shapes of Llama 7B ({result['checkpoint_bytes'] / 1e9:.2f} GB, 3 shards), from a patch of "
        f"{result['patch_bytes'] / 1e3:.0f} kB, on {result['file_system']}, on {result['cores_used']} core.\n"
        "Before every run the checkpoint is taken out of the page cache; every output is synced. For `--link`,\n"
        "`of cp` means copying and syncing the one changed shard. `others changed`: tensors beside the edited one\n"
        "that differ in a byte, of 290. `misrounded`: entries of the edited one, of 45 million, that are not the\n"
        "exact result rounded once. mergekit doubles the matrix, an edit that its configuration can name.\n"
        f"`apply` imports {heavy}.\n"
        f"Other jobs ran on the machine's other core meanwhile; these runs had priority {result['nice']} on\n"
        "theirs. Times of one command differ by up to 1.7 times from run to run: read the ranges.\n"
    )
    return "## One matrix of 13.5 GB\n\n" + text + "\n" + rows(header, lines)
