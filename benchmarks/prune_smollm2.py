"""Half of the weights of a model zeroed by each method: perplexity on ordinary text and in a domain, time and memory.

    python -m benchmarks.prune_smollm2 MODEL OPEN.jsonl DOMAIN.jsonl [--sparsity 0.5] [--samples 4] [--window 256]

Both files hold `text` per line. Their last `--passages` rows are measured, the rows before them are calibrated on:
`samples` windows of `window` tokens of ordinary text, of the domain, or of both. Each pruning runs in a process of its
own, whose wall time and peak memory are those of loading, pruning, writing, and measuring one short passage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import run_measured
from benchmarks.record import write_result
from llmsurgery import evaluate_checkpoints

OPEN, DOMAIN = "open", "domain"
RUNS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("magnitude", "magnitude", {}),
    ("wanda, open", "wanda", {"calibration": OPEN}),
    ("wanda, domain", "wanda", {"calibration": DOMAIN}),
    ("sparsegpt, open", "sparsegpt", {"calibration": OPEN}),
    ("sparsegpt, domain", "sparsegpt", {"calibration": DOMAIN}),
    ("d-pruner", "d-pruner", {"calibration": OPEN, "domain": DOMAIN}),
)
"""Name, method, and the data option -> the text that it is given."""


def split(path: Path, passages: int, folder: Path, name: str) -> dict[str, Path]:
    """Write the rows of a file that are calibrated on and those that are measured; return both files."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < 2 * passages:
        raise SystemExit(f"{path} has {len(lines)} rows, {2 * passages} are needed")
    parts = {"used": lines[:-passages], "measured": lines[-passages:]}
    files = {part: folder / f"{name}-{part}.jsonl" for part in parts}
    for part, rows in parts.items():
        files[part].write_text("\n".join(rows) + "\n")
    return files


def prune_run(
    source: Path, method: str, data: dict[str, Path], out: Path, options: argparse.Namespace, settings: Sequence[str]
) -> dict[str, Any]:
    """Prune in a process of its own; return what it took and what its manifest says."""
    words = [sys.executable, "-m", "llmsurgery", "prune", str(source), "--method", method, "-o", str(out), "--json"]
    words += ["--sparsity", str(options.sparsity), "--no-undo"]
    words += [word for name, path in data.items() for word in (f"--{name}", str(path))]
    # Figures are measured afterwards, on more text, and not twice in every run.
    given = [*settings, "eval.text_rows=1", "eval.text_tokens=32"]
    cost = run_measured([*words, *(word for item in given for word in ("--set", item))])
    manifest: Any = json.loads((out / "surgery.json").read_text())
    record = manifest["operations"][0]["record"]
    kept = ("zeros_of_prunable", "zeros_of_all", "zeros_by_role", "by_magnitude", "raised_damping", "domain_loss")
    return {"settings": given, "cost": cost, "record": {name: record[name] for name in kept if name in record}}


def perplexities(model: Path, texts: dict[str, Path], passages: int) -> dict[str, Any]:
    """Return perplexity and its interval on each text."""
    result: dict[str, Any] = {}
    for name, path in texts.items():
        settings = {"text_rows": passages, "generate": False}
        found: Any = evaluate_checkpoints([model], text=path, dtype="float32", settings=settings)
        figure = found["models"][0]["metrics"]["utility.ppl"]
        result[name] = {"value": figure["value"], "interval": figure["interval"], "n": figure["n"]}
    return result


def main() -> None:
    """Prune by every method, measure, write the result."""
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("open", type=Path)
    parser.add_argument("domain", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--passages", type=int, default=20, help="passages of each text that are measured")
    parser.add_argument("--only", action="append", metavar="NAME", help="a row of the table; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="for d-pruner alone")
    options = parser.parse_args()
    source = resolve_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = {name: split(getattr(options, name), options.passages, work, name) for name in (OPEN, DOMAIN)}
        texts = {name: parts["measured"] for name, parts in files.items()}
        rows: list[dict[str, Any]] = [{"name": "dense", "ppl": perplexities(source, texts, options.passages)}]
        show(rows[-1])
        for name, method, data in RUNS:
            if options.only and name not in options.only:
                continue
            settings = []
            if method != "magnitude":
                settings = [f"samples={options.samples}", f"window={options.window}"]
            if method == "d-pruner":
                settings += [f"domain_samples={options.samples}", *options.set]
            out = work / "out"
            given = {option: files[text]["used"] for option, text in data.items()}
            row = {"name": name, "method": method, **prune_run(source, method, given, out, options, settings)}
            rows.append({**row, "ppl": perplexities(out, texts, options.passages)})
            show(rows[-1])
            shutil.rmtree(out)
    write_result(
        "prune_smollm2",
        {
            "model": options.model.name,
            "texts": {OPEN: options.open.name, DOMAIN: options.domain.name},
            "sparsity": options.sparsity,
            "samples": options.samples,
            "window": options.window,
            "passages": options.passages,
            "rows": rows,
        },
    )


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    cost = row.get("cost", {"seconds": 0.0, "peak_bytes": 0.0})
    figures = "  ".join(f"{name} {figure['value']:8.2f}" for name, figure in row["ppl"].items())
    print(f"{row['name']:18s}  {figures}  {cost['seconds']:6.1f} s  {cost['peak_bytes'] / 2**20:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
