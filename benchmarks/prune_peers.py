"""Wanda and SparseGPT at 50% against llmcompressor: time, memory, masks per block, perplexity.

    python -m benchmarks.prune_peers --peer PYTHON --text TEXT.jsonl --model MODEL
    python -m benchmarks.prune_peers --peer PYTHON --text TEXT.jsonl --large --tokenizer FOLDER [--work DIR]

PYTHON is that of an environment with llmcompressor (pip install llmcompressor==0.14.0.1). MODEL is a directory or .gguf
file; --large makes a Llama of 1.1 billion random weights with the tokenizer of FOLDER in its place. TEXT.jsonl holds
`text` per line: its last `--passages` rows are measured, those before them are calibrated on. Both sides get the very
same windows and compute in the same dtype, each in a process of its own that loads, prunes and writes; the toolkit's
command measures one short passage besides. Sides take turns. Perplexity is taken of what was written, in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.measure import run_measured, wait_for_idle
from benchmarks.record import write_result

METHODS = ("wanda", "sparsegpt")
SIDES = ("llmsurgery", "llmcompressor")
CUT = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from llmsurgery.checkpoint import Checkpoint\n"
    "from llmsurgery.compute.source import resolve_source\n"
    "from llmsurgery.data.records import read_rows\n"
    "from llmsurgery.data.windows import pack_windows\n"
    "from llmsurgery.run.encoding import make_encoder\n"
    "model, text, length, samples, out = sys.argv[1:]\n"
    "place = resolve_source(model)\n"
    "encoder = make_encoder(Checkpoint.open(place))\n"
    "windows = pack_windows(encoder, read_rows(text), int(length), int(samples), 'calibration')\n"
    "Path(out).write_text(json.dumps([list(window) for window in windows]))\n"
    "print(place)\n"
)
"""Writes the windows that the toolkit cuts. In a process of its own: a child's peak begins at its parent's memory."""


def split_text(path: Path, passages: int, work: Path) -> dict[str, Path]:
    """Write the rows that are calibrated on and those that are measured; return both files."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if len(lines) < 2 * passages:
        raise SystemExit(f"{path} has {len(lines)} rows, {2 * passages} are needed")
    files = {"used": lines[:-passages], "measured": lines[-passages:]}
    for name, rows in files.items():
        (work / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return {name: work / f"{name}.jsonl" for name in files}


def make_large(work: Path, tokenizer: Path) -> Path:
    """Return a Llama of 1.1 billion random weights, made unless it is there."""
    from benchmarks.llama_shapes import cut_tokenizer, make_checkpoint
    from benchmarks.restore_large import TINY_LLAMA

    place = work / "large"
    if not (place / "tokenizer.json").is_file():
        make_checkpoint(place, TINY_LLAMA)
        cut_tokenizer(tokenizer, place, TINY_LLAMA.vocabulary)
    return place


def command(side: str, method: str, source: Path, out: Path, options: argparse.Namespace) -> list[str]:
    """Return the command of one side."""
    work, share = options.work, str(options.sparsity)
    if side == "llmcompressor":
        words = [str(source), method, share, options.dtype, str(work / "windows.json"), str(out)]
        return [options.peer, "-m", "benchmarks.peers.llmcompressor_prune", *words]
    words = ["prune", str(source), "--method", method, "-o", str(out), "--sparsity", share, "--no-undo", "--quiet"]
    words += ["--calibration", str(work / "used.jsonl"), "--text", str(work / "measured.jsonl")]
    words += ["--dtype", options.dtype]
    # Figures of a model that is read block by block: what a user who is short of memory asks for.
    settings = (f"samples={options.samples}", f"window={options.window}", "eval.text_rows=1", "eval.text_tokens=32",
                "eval.figures=streamed")  # fmt: skip
    return [sys.executable, "-m", "llmsurgery", *words, *(word for item in settings for word in ("--set", item))]


def perplexity(model: Path, text: Path, passages: int) -> dict[str, Any]:
    """Return the perplexity of a checkpoint on the measured rows, with its interval."""
    words = [sys.executable, "-m", "llmsurgery", "eval", str(model), "--text", str(text), "--json"]
    words += ["--dtype", "float32", "--set", f"text_rows={passages}", "--set", "generate=false"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    figure = json.loads(done.stdout)["models"][0]["metrics"]["utility.ppl"]
    return {name: figure[name] for name in ("value", "interval", "n")}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Return, per block, the share of entries that are zero in both checkpoints or in neither, and what else differs.

    Args:
        first: The toolkit's result.
        second: The peer's.
    """
    from llmsurgery.arch.detect import detect
    from llmsurgery.checkpoint import Checkpoint, decode

    one, other = Checkpoint.open(first), Checkpoint.open(second)
    same: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    zeros = dict.fromkeys(SIDES, 0)
    structure = detect(one.config, one.tensors)
    matrices = {target.stored: int(target.layer or 0) for target in structure.select(["linear"])}
    for name, layer in matrices.items():
        masks = [decode(place.read(name), place.info(name).dtype) == 0 for place in (one, other)]
        equal = masks[0] == masks[1]
        same[layer][0] += int(equal.sum())
        same[layer][1] += equal.size
        for side, mask in zip(SIDES, masks, strict=True):
            zeros[side] += int(mask.sum())
    entries = sum(count for _, count in same.values())
    rest = [name for name in one.tensors if name not in matrices and name in other.tensors]
    return {
        "mask_agreement": sum(count for count, _ in same.values()) / entries,
        "mask_agreement_by_block": [same[layer][0] / same[layer][1] for layer in sorted(same)],
        "zeros_of_matrices": {side: count / entries for side, count in zeros.items()},
        "other_tensors_that_differ": [name for name in rest if (one.read(name) != other.read(name)).any()],
    }


def run_method(method: str, source: Path, files: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turns; return costs, and what the last results are like."""
    outs = {side: options.work / f"{method}-{side}" for side in SIDES}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            shutil.rmtree(outs[side], ignore_errors=True)
            wait_for_idle(options.wait)
            runs[side].append(run_measured(command(side, method, source, outs[side], options)))
            print(f"{method}, {side}: {json.dumps(runs[side][-1])}", flush=True)
    row: dict[str, Any] = {
        "runs": runs,
        "median": {
            side: {name: statistics.median(run[name] for run in found) for name in found[0]}
            for side, found in runs.items()
        },
        "ppl": {side: perplexity(out, files["measured"], options.passages) for side, out in outs.items()},
        "peer": json.loads((outs["llmcompressor"] / "peer.json").read_text()),
        **compare(*outs.values()),
    }
    for out in outs.values():
        shutil.rmtree(out)
    row["time_ratio"], row["memory_ratio"] = (
        row["median"][SIDES[0]][name] / row["median"][SIDES[1]][name] for name in ("seconds", "peak_bytes")
    )
    return row


def main() -> None:
    """Make or find the model, run both methods, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter with llmcompressor")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--large", action="store_true", help="1.1 billion random weights")
    parser.add_argument("--tokenizer", type=Path, help="directory of a byte-pair tokenizer, for --large")
    parser.add_argument("--work", type=Path, help="scratch directory; the large model stays in it")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--passages", type=int, default=20, help="rows of the text that are measured")
    parser.add_argument("--dtype", default="float32", help="both sides compute in it")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for an idle machine before a run")
    options = parser.parse_args()
    if (options.model is None) == (not options.large) or (options.large and options.tokenizer is None):
        parser.error("give --model, or --large with --tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        options.work.mkdir(parents=True, exist_ok=True)
        model = make_large(options.work, options.tokenizer) if options.large else options.model
        files = split_text(options.text, options.passages, options.work)
        words = [str(model), str(files["used"]), str(options.window), str(options.samples)]
        cut = [sys.executable, "-c", CUT, *words, str(options.work / "windows.json")]
        source = Path(subprocess.run(cut, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
        rows = {name: run_method(name, source, files, options) for name in options.method or METHODS}
        dense = perplexity(source, files["measured"], options.passages)
    name = "prune_peers_large" if options.large else "prune_peers"
    shape = "Llama of 1.1 billion random weights" if options.large else options.model.name
    kept = ("sparsity", "samples", "window", "passages", "dtype", "repeats")
    settings = {key: getattr(options, key) for key in kept}
    write_result(name, {"model": shape, "text": options.text.name, **settings, "dense": dense, "methods": rows})


if __name__ == "__main__":
    main()
