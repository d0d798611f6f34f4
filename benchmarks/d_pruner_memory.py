"""Time and peak memory of `prune --method d-pruner` against holding all gradients and both score sets.

    python -m benchmarks.d_pruner_memory MODEL OPEN.jsonl DOMAIN.jsonl [--samples 4] [--window 256]

Both sides run in a process of their own on the same windows, and both write their result. The toolkit's side also
measures one short passage before and after, which the other side does not. Masks are compared entry by entry.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import run_measured
from benchmarks.record import write_result

SPARSITY = 0.5


def token_windows(source: Path, text: Path, samples: int, length: int) -> list[list[int]]:
    """Return the windows that the method cuts of a text."""
    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.data.records import read_rows
    from llmsurgery.data.windows import pack_windows
    from llmsurgery.run.encoding import make_encoder

    encoder = make_encoder(Checkpoint.open(source))
    windows = pack_windows(encoder, read_rows(text), length, samples, "text")
    return [list(window) for window in windows]


def agreement(first: Path, second: Path) -> float:
    """Return the share of entries of the matrices that are zero in both checkpoints or in neither."""
    from llmsurgery.checkpoint import Checkpoint

    one, other = Checkpoint.open(first), Checkpoint.open(second)
    same = total = 0
    for name in one.tensors:
        if name.endswith("_proj.weight"):
            equal = (one.read(name) == 0) == (other.read(name) == 0)
            same, total = same + int(equal.sum()), total + equal.size
    return same / total


def main() -> None:
    """Run both sides and write the result."""
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("open", type=Path)
    parser.add_argument("domain", type=Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    source = resolve_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("open", "domain"):
            windows = token_windows(source, getattr(options, name), options.samples, options.window)
            (work / f"{name}.json").write_text(json.dumps(windows))
        own, plain = work / "own", work / "plain"
        words = [sys.executable, "-m", "llmsurgery", "prune", str(source), "--method", "d-pruner", "-o", str(own)]
        words += ["--calibration", str(options.open), "--domain", str(options.domain), "--sparsity", str(SPARSITY)]
        given = [f"samples={options.samples}", f"window={options.window}", f"domain_samples={options.samples}"]
        given += ["eval.text_rows=1", "eval.text_tokens=32"]
        words += [word for item in given for word in ("--set", item)]
        costs = {"own": run_measured([*words, "--no-undo", "-q"])}
        words = [sys.executable, "-m", "benchmarks.peers.d_pruner_plain", str(source)]
        words += [str(work / "open.json"), str(work / "domain.json"), str(plain), str(SPARSITY)]
        costs["plain"] = run_measured(words)
        same = agreement(own, plain)
    for name, cost in costs.items():
        print(f"{name:6s} {cost['cpu_seconds']:6.1f} CPU s  {cost['peak_bytes'] / 2**20:7.0f} MiB")
    print(f"masks agree in {same:.5f} of the entries")
    settings = {"samples": options.samples, "window": options.window, "sparsity": SPARSITY}
    write_result("d_pruner_memory", {"settings": settings, "costs": costs, "mask_agreement": same})


if __name__ == "__main__":
    main()
