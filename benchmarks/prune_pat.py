"""SmolLM2 at three quarters of its width by PAT, against a random set of channels and depth pruning of the same size.

    python -m benchmarks.prune_pat MODEL TEXT.jsonl [--steps 300] [--hidden K] [--only NAME] [--teacher] [--set N=V]

TEXT holds `text` per line: its last `--passages` rows are measured, the rows before them are trained or calibrated on.
`random` trains like `pat`, as many steps on the same pieces, with a set of channels that is drawn before. ShortGPT and
LLM-Pruner train nothing; they keep as many blocks, or heads and channels, as give the size of PAT's result or the next
larger one; `llm-pruner, recovered` trains as long as PAT. Each runs in a process of its own, whose time and memory are
those of loading, pruning, writing, and measuring one short passage. Speeds are taken at the end in this process, source
and results in turn, `--repeats` times each; the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import run_measured
from benchmarks.prune_smollm2 import perplexities, split
from benchmarks.record import write_result

ROWS, TOKENS = 4, 128
"""Pieces of a step, and tokens of a piece."""

PREFILL, DECODED = 512, 64
"""Tokens that are read at once, and written one by one."""

KEPT = ("row_loss", "loss_last", "loss_rounded", "open_gates", "undecided_gates", "steps", "removed_share_of_all",
        "removed_layers", "kept_heads", "kept_channels", "kept_width", "stored_width")  # fmt: skip
QUIET = ("eval.text_rows=1", "eval.text_tokens=32", "eval.generate=false")


def sizes(folder: Path) -> dict[str, int]:
    """Return parameters and bytes of the weights of a checkpoint."""
    from llmsurgery.checkpoint import Checkpoint

    parameters = sum(info.size for info in Checkpoint.open(folder).tensors.values())
    return {"parameters": parameters, "weight_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}


def plans(source: Path, hidden: int | None, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the runs: name -> words of the command behind `prune MODEL`."""
    from llmsurgery.arch.detect import detect
    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.methods.heads_and_channels import channels_kept
    from llmsurgery.methods.narrowing import narrowed_parameters, narrowed_tensors
    from llmsurgery.methods.widths import WidthConfig, widths_of

    checkpoint = Checkpoint.open(source)
    structure = detect(checkpoint.config, checkpoint.tensors)
    gone = narrowed_parameters(narrowed_tensors(structure), widths_of(WidthConfig(hidden=hidden), structure))
    block = sum(tensor.parameters for tensor in structure.tensors if tensor.layer is not None) / structure.layers
    layers = structure.layers - math.floor(gone / block)
    trained = [f"max_steps={options.steps}", f"batch_size={ROWS}", f"window={TOKENS}", *options.set]
    words = [word for item in trained for word in ("--set", item)]
    words += ["--hidden", str(hidden)] if hidden else []
    share = pruner_share(structure, gone, channels_kept)
    result = {
        "pat": ["--method", "pat", *words],
        "random": ["--method", "pat", *words, "--set", "kept=random"],
        "shortgpt": ["--method", "shortgpt", "--layers", str(layers)],
        "llm-pruner": ["--method", "llm-pruner", "--sparsity", f"{share:g}"],
    }
    recovery = (f"max_steps={options.steps}", f"batch_size={ROWS}", f"max_length={TOKENS}")
    result["llm-pruner, recovered"] = [*result["llm-pruner"], *(word for item in recovery for word in ("--set", item))]
    if options.teacher:
        result["pat, teacher"] = ["--method", "pat", *words, "--teacher"]
    return result


def pruner_share(structure: Any, gone: int, channels_kept: Any) -> float:
    """Return the largest share of heads and channels, in hundredths, that removes no more parameters than PAT does."""
    from llmsurgery.methods.heads_and_channels import CHANNELS, HEADS, groups_kept, members

    channels = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "mlp.gate")
    rows = {t.role: t.shape for t in structure.tensors if t.role in ("attn.q", "attn.k") and t.part == "weight"}
    each = rows["attn.q"][0] // structure.heads
    groups = rows["attn.k"][0] // each
    heads, inner = (sum(t.parameters for t in members(structure, roles)) for roles in (HEADS, CHANNELS))
    found = 0.01
    for hundredths in range(1, 100):
        share = hundredths / 100
        kept = groups_kept(groups, structure.heads // groups, rows["attn.q"][1], share)
        lost = heads * (1 - kept / groups) + inner * (1 - channels_kept(channels, share) / channels)
        found = share if lost <= gone else found
    return found


def prune_run(source: Path, words: Sequence[str], text: Path, out: Path) -> dict[str, Any]:
    """Prune in a process of its own; return what it took and what its manifest says."""
    given = [sys.executable, "-m", "llmsurgery", "prune", str(source), *words, "--calibration", str(text)]
    given += ["--dtype", "float32", "-o", str(out), "--json", "--no-undo"]
    cost = run_measured([*given, *(word for item in QUIET for word in ("--set", item))])
    operation: Any = json.loads((out / "surgery.json").read_text())["operations"][0]
    record = {name: operation["record"][name] for name in KEPT if name in operation["record"]}
    return {"words": list(words), "cost": cost, "record": record, **sizes(out)}


def speeds(models: dict[str, Path], repeats: int) -> dict[str, dict[str, float]]:
    """Return tokens per second of reading and of writing, of every model, the fastest of some repeats in turn."""
    import torch

    from llmsurgery.compute.load import load_model

    loaded = {name: load_model(path, torch.float32, torch.device("cpu")) for name, path in models.items()}
    ids = torch.arange(100, 100 + PREFILL)[None]
    best = {name: {"prefill": 0.0, "decode": 0.0} for name in models}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, model in loaded.items():
                started = time.perf_counter()
                output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
                read = time.perf_counter()
                for _ in range(DECODED):
                    token = output.logits[:, -1:].argmax(-1)
                    output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
                written = time.perf_counter()
                best[name]["prefill"] = max(best[name]["prefill"], PREFILL / (read - started))
                best[name]["decode"] = max(best[name]["decode"], DECODED / (written - read))
    return best


def main() -> None:
    """Prune, measure, write the result."""
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, help="width that is kept; three quarters without it")
    parser.add_argument("--passages", type=int, default=40, help="passages that are measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="NAME", help="a row of the table; may be repeated")
    parser.add_argument("--teacher", action="store_true", help="run PAT with --teacher, too")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for PAT and the random set")
    options = parser.parse_args()
    source = resolve_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = split(options.text, options.passages, work, "text")
        texts = {"text": files["measured"]}
        models = {"source": source}
        results: list[dict[str, Any]] = [
            {"name": "source", **sizes(source), "ppl": perplexities(source, texts, options.passages)["text"]}
        ]
        show(results[-1])
        for name, words in plans(source, options.hidden, options).items():
            if options.only and name not in options.only:
                continue
            models[name] = work / name.replace(", ", "-")
            row = {"name": name, **prune_run(source, words, files["used"], models[name])}
            results.append({**row, "ppl": perplexities(models[name], texts, options.passages)["text"]})
            show(results[-1])
        for name, found in speeds(models, options.repeats).items():
            next(row for row in results if row["name"] == name)["speed"] = found
            print(f"{name:14s}  prefill {found['prefill']:8.1f} tokens/s  decode {found['decode']:6.1f} tokens/s")
    write_result(
        "prune_pat",
        {
            "model": options.model.name,
            "text": options.text.name,
            "steps": options.steps,
            "rows": ROWS,
            "tokens": TOKENS,
            "passages": options.passages,
            "repeats": options.repeats,
            "prefill": PREFILL,
            "decoded": DECODED,
            "results": results,
        },
    )


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    cost = row.get("cost", {"cpu_seconds": 0.0, "peak_bytes": 0.0})
    print(
        f"{row['name']:14s}  {row['parameters'] / 1e6:7.1f} M  ppl {row['ppl']['value']:10.2f}  "
        f"{cost['cpu_seconds']:7.1f} CPU s  {cost['peak_bytes'] / 2**20:7.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
