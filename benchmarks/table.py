"""Write `benchmarks/README.md` from the newest result of each benchmark.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

HEAD = """# Benchmarks

Made by `python -m benchmarks.table` from the newest file of each kind under `results/`; every number has its JSON.

Repeat them with `make benchmarks` (startup, the FLAT step, every method's step, the guard, the methods on the demo),
and, with question and text files of your own,
`python -m benchmarks.unlearn_smollm2 MODEL QUESTIONS.jsonl TEXT.jsonl`,
`python -m benchmarks.redirect_smollm2 MODEL TEXT.jsonl` and
`python -m benchmarks.memory MODEL FORGET.jsonl RETAIN.jsonl`.
`python -m benchmarks.byte_layer SCRATCH --make` needs 27 GB of disk, and so does
`python -m benchmarks.redirect_7b SCRATCH --make --tokenizer FOLDER`, with FOLDER a byte-pair tokenizer.
"""


def newest(name: str) -> dict[str, Any] | None:
    """Return the newest result of a benchmark, None if it never ran."""
    files = sorted(RESULTS.glob(f"{name}-2*.json"))
    return json.loads(files[-1].read_text()) if files else None


def machine(result: dict[str, Any]) -> str:
    """Return one line on where a result was measured."""
    place = result["environment"]
    device = place["gpu"] or f"{place['cpu']}, {place['cores']} cores"
    return f"{device}; torch {place['torch']}, transformers {place['transformers']}; commit {place['commit']}"


def rows(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    parts = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(part) + " |" for part in parts)


def startup(result: dict[str, Any]) -> str:
    """Return the section on start-up time."""
    lines = [[f"`{name}`", f"{row['median']:.2f}"] for name, row in result["seconds"].items()]
    return "## Start-up\n\n" + rows(["command", "seconds, median of 10"], lines)


def mebibytes(row: dict[str, float]) -> str:
    """Return the peak of a variant in MiB."""
    return f"{row['peak_bytes'] / 2**20:.0f}"


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


def conformance(result: dict[str, Any]) -> str:
    """Return the section on methods and architectures."""
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
    for file in sorted(RESULTS.glob("attacks_smollm2_control-2*.json")):
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


SECTIONS = {
    "startup": startup,
    "flat_step": flat_step,
    "unlearning": unlearning,
    "memory": memory,
    "unlearn_smollm2": unlearn_smollm2,
    "unlearn_smollm2_guard": unlearn_smollm2,
    "unlearn_smollm2_strong": unlearn_smollm2,
    "guard_demo": guard,
    "patches": patches,
    "kill_resume": kill_resume,
    "conformance": conformance,
    "compare_demo": comparison,
    "compare_demo_attacks": comparison,
    "compare_smollm2": comparison,
    "compare_smollm2_attacks": comparison,
    "attacks_smollm2_control": attacks,
    "reload": reload,
    "byte_layer": byte_layer,
    "redirect_7b": redirect_7b,
    "covariance": covariance,
    "redirect_smollm2": redirect_smollm2,
    "redirect_smollm2_layers": redirect_smollm2,
}


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        result = newest(name)
        if result is not None:
            parts.append(f"{section(result)}\n\n{machine(result)}\n")
        if name == "guard_demo":
            parts.append(guard_curves())
    Path(__file__).with_name("README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
