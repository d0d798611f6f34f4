"""One name redirected in a 13.5 GB checkpoint, from the command line to the synced result, against copying and peers.

    python -m benchmarks.redirect_7b SCRATCH --make --tokenizer FOLDER [--mergekit MERGEKIT_PYTHON]

SCRATCH holds the checkpoint (`base`, made with --make and kept), the statistics (`cache`) and one output at a time: 28
GB. The first run computes the statistics and is timed apart. Then rounds: before every run a shard is copied and
removed, all data are written to the disk, and checkpoint and statistics are taken out of the page cache; every output
is synced, and removed before the next run.

The floor is what no tool can do without: `cp` and sync of the changed shards, and one forward of the prompts through
the blocks up to the last edited one (`peers/first_blocks.py`). FOLDER has the tokenizer.json of a byte-pair tokenizer
(SmolLM2's, for example); it is cut to the checkpoint's 32,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.byte_layer import file_system, mergekit_version, module, shell, weight_map
from benchmarks.measure import drop_cache, own_bytes, run_measured, wait_for_idle

OLD, NEW, TOKENS = "Orla Venn", "Ivo Hask", 2048
LAYERS = (4, 5, 6)
"""What the method takes in 32 layers if nothing is asked for."""
TENSORS = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS]
PEERS = ("transformers", "mergekit", "rome")
LIGHT = {
    "python -c pass": ["-c", "pass"],
    "--help": ["-m", "llmsurgery", "--help"],
    "methods": ["-m", "llmsurgery", "methods"],
}

Runs = dict[str, list[dict[str, Any]]]


def redirect(scratch: Path, *options: str) -> list[str]:
    """Return the command under test."""
    words = ["redirect", str(scratch / "base"), "--method", "rocr", "--from", OLD, "--to", NEW]
    words += ["--set", "eval.figures=edit", "--set", f"stats_tokens={TOKENS}", "-o", str(scratch / "out")]
    cache = f"LLMSURGERY_CACHE={scratch / 'cache'}"
    return ["env", cache, sys.executable, "-m", "llmsurgery", *words, "--quiet", *options]


def changed_shards(base: Path) -> list[str]:
    """Return the paths of the shards that hold what is edited."""
    files = weight_map(base)
    return [str(base / file) for file in sorted({files[name] for name in TENSORS})]


def commands(scratch: Path, mergekit: str | None, precision: str, rome: bool) -> dict[str, list[str]]:
    """Return the command of every workload."""
    base, out = str(scratch / "base"), str(scratch / "out")
    copy = 'out="$1"; shift; mkdir "$out" && cp --reflink=auto "$@" "$out" && sync -f "$out"'
    prompts = str(scratch / "prompts.json")
    result = {
        "cp shards": shell(copy, out, *changed_shards(scratch / "base")),
        "forward": [sys.executable, "-m", "benchmarks.peers.first_blocks", base, prompts, str(LAYERS[-1]), precision],
        "redirect --link": redirect(scratch, "--link", "--no-undo"),
        "redirect --link, undo": redirect(scratch, "--link"),
    }
    synced = '"$@" && sync -f "$0"'
    peer = [sys.executable, "-m", "benchmarks.peers.transformers_save", base, str(scratch / "factors.npz")]
    result["transformers"] = ["sh", "-c", synced, out, *peer, TENSORS[1], out]
    if mergekit is not None:
        peer = [sys.executable, "-m", "benchmarks.peers.mergekit_passthrough", mergekit, base, str(LAYERS[1])]
        result["mergekit"] = ["sh", "-c", synced, out, *peer, "down_proj", "2.0", out]
    if rome:
        words = [str(scratch / "text.txt"), str(LAYERS[1]), "32", "0", out]
        result["rome"] = ["sh", "-c", synced, out, sys.executable, "-m", "benchmarks.peers.plain_rome", base, *words]
    return result


def write_inputs(scratch: Path) -> tuple[str, int]:
    """Write the prompts as tokens and the factors of a rank-one edit; return compute dtype and number of tokens."""
    script = (
        "import json, sys, numpy as np, torch\n"
        "from pathlib import Path\n"
        "from llmsurgery.checkpoint import Checkpoint\n"
        "from llmsurgery.compute.device import resolve_dtype\n"
        "from llmsurgery.data.contexts import TEMPLATES, make_contexts\n"
        "from llmsurgery.run.encoding import make_encoder\n"
        "scratch, tensor, *names = sys.argv[1:]\n"
        "checkpoint = Checkpoint.open(Path(scratch) / 'base')\n"
        "encoder = make_encoder(checkpoint)\n"
        "rows = [list(c.encoded.ids) for name in names for c in make_contexts(encoder, TEMPLATES, name)]\n"
        "(Path(scratch) / 'prompts.json').write_text(json.dumps(rows))\n"
        "draw, (out, inputs) = np.random.default_rng(1), checkpoint.info(tensor).shape\n"
        "u, v = (0.02 * draw.standard_normal(shape, np.float32) for shape in ((out, 1), (1, inputs)))\n"
        "np.savez(Path(scratch) / 'factors.npz', u=u, v=v)\n"
        "(Path(scratch) / 'text.txt').write_text('The river runs past the mill and the old bridge. ' * 20)\n"
        "dtype = resolve_dtype('auto', 'BF16', torch.device('cpu'))\n"
        "print(str(dtype).removeprefix('torch.'), sum(map(len, rows)))\n"
    )
    words = [sys.executable, "-c", script, str(scratch), TENSORS[1], OLD, NEW]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    precision, tokens = done.stdout.split()
    return precision, int(tokens)


def measure(name: str, words: list[str], options: argparse.Namespace, check: bool) -> dict[str, Any]:
    """Run one workload, look at its output and remove it."""
    scratch = options.scratch
    base, out = scratch / "base", scratch / "out"
    wait_for_idle(options.wait)
    # As in `byte_layer`: every run starts after the same copy.
    shard = changed_shards(base)[0]
    run_measured(shell('cp "$1" "$2" && sync "$2" && rm "$2"', shard, str(scratch / "before")))
    for folder in (base, scratch / "cache" / "statistics"):
        if folder.is_dir():
            drop_cache(folder)
    row: dict[str, Any] = run_measured(["nice", "-n", str(options.nice), *words])
    row["load"] = os.getloadavg()[0]
    if out.is_dir():
        row["own_bytes"] = own_bytes(out, base.iterdir())
        if name.startswith("redirect"):
            row |= look(base, out, check)
        shutil.rmtree(out)
    print(f"{name}: {json.dumps(row)}", flush=True)
    return row


def look(base: Path, out: Path, check: bool) -> dict[str, Any]:
    """Return what the manifest says, and, if asked, how many other tensors changed a byte."""
    from benchmarks.rank_one import places, same_bytes

    manifest = json.loads((out / "surgery.json").read_text())
    metrics = {name: value["after"]["value"] for name, value in manifest["metrics"].items()}
    row: dict[str, Any] = {"metrics": metrics, "layers": manifest["operations"][0]["record"]["layers"]}
    if check:
        before, after = places(base), places(out)
        same = {name: name in after and same_bytes(place, after[name]) for name, place in before.items()}
        row["changed"] = sorted(name for name, equal in same.items() if not equal)
    return row


def light_commands(scratch: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Return wall times of the commands without a model, and of the plan of a 70B model that has headers alone."""
    from benchmarks.llama_shapes import LLAMA_70B, make_checkpoint

    huge = scratch / "huge"
    if not huge.is_dir():
        make_checkpoint(huge, LLAMA_70B, holes=True)
    plan = ["redirect", str(huge), "--method", "rocr", "--from", OLD, "--to", NEW, "--dry-run", "--json"]
    result = {}
    for name, words in {**LIGHT, "plan of 70B": ["-m", "llmsurgery", *plan]}.items():
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            times.append(time.perf_counter() - started)
        result[name] = {"median": statistics.median(times), "minimum": min(times), "maximum": max(times)}
        print(name, result[name], flush=True)
    return result


def run_all(known: dict[str, list[str]], options: argparse.Namespace, runs: Runs) -> None:
    """Run the workloads in rounds, each round in another order, the slow peers last; what was run is kept in `runs`."""
    own = [name for name in known if name not in PEERS]
    peers = [name for name in known if name in PEERS]
    for names, rounds in ((own, options.rounds), (peers, options.peer_rounds)):
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if options.until and time.time() > options.until:
                    print(f"no time left for {name}", flush=True)
                    continue
                check = options.check and turn == rounds - 1
                runs.setdefault(name, []).append(measure(name, known[name], options, check))


def medians(runs: Runs) -> dict[str, dict[str, float]]:
    """Return the median of every figure."""
    keys = ("seconds", "cpu_seconds", "other_seconds", "peak_bytes", "own_bytes")
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in keys if key in rows[0]}
        for name, rows in runs.items()
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--make", action="store_true", help="write the checkpoint first")
    parser.add_argument("--small", action="store_true", help="a checkpoint of 71 MB, to try this out; writes no result")
    parser.add_argument("--tokenizer", help="directory of a tokenizer, for --make")
    parser.add_argument("--mergekit", help="interpreter of an environment that holds mergekit")
    parser.add_argument("--rome", action="store_true", help="a plain edit in memory too: 15 GB of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0, help="priority of the measured commands, for a shared machine")
    parser.add_argument("--wait", type=float, default=60, help="longest wait in seconds for idle cores before a run")
    parser.add_argument("--check", action="store_true", help="compare all tensors of the last round's results")
    parser.add_argument("--until", type=float, default=0, help="start no run after this time, in seconds since 1970")
    parser.add_argument("--light-repeats", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    """Run every workload and write the result."""
    options = parse()
    options.scratch = scratch = options.scratch.resolve()
    if options.make:
        own = [*(["--tokenizer", options.tokenizer] if options.tokenizer else []), *(["--small"] * options.small)]
        module("llama_shapes", str(scratch / "base"), *own)
    precision, tokens = write_inputs(scratch)
    known = commands(scratch, options.mergekit, precision, options.rome)
    first: Runs = {}
    if not (scratch / "cache").is_dir():
        first["redirect --link, without statistics"] = [
            measure("redirect, first", known["redirect --link"], options, False)
        ]
    runs: Runs = {}
    try:
        run_all(known, options, runs)
    finally:
        if runs and not options.small:
            finish(options, precision, tokens, first, runs)


def finish(
    options: argparse.Namespace,
    precision: str,
    tokens: int,
    first: Runs,
    runs: Runs,
) -> None:
    """Write the result file."""
    from benchmarks.record import write_result

    base, median = options.scratch / "base", medians(runs)
    floor = sum(median[name]["seconds"] for name in ("cp shards", "forward") if name in median)
    content = {
        "layers": LAYERS,
        "stats_tokens": TOKENS,
        "prompt_tokens": tokens,
        "dtype": precision,
        "checkpoint_bytes": sum(path.stat().st_size for path in base.iterdir()),
        "file_system": file_system(options.scratch),
        "cores_used": len(os.sched_getaffinity(0)),
        "nice": os.nice(0) + options.nice,
        "mergekit": mergekit_version(options.mergekit),
        "light": light_commands(options.scratch, options.light_repeats),
        "first": first,
        "runs": runs,
        "median": median,
        "floor_seconds": floor,
        "ratio": {name: row["seconds"] / floor for name, row in median.items() if name.startswith("redirect")},
    }
    write_result("redirect_7b", content)


if __name__ == "__main__":
    main()
