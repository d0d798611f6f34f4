"""The toolkit on a GPU: its kernels against plain PyTorch, its commands against the CPU of the same machine.

    python -m benchmarks.gpu [--model MODEL --text TEXT.jsonl --questions QA.jsonl] [--large DIRECTORY] [--only PART]

`kernels` needs nothing but the card: SparseGPT's columns by the Triton kernel and by the plain loop, selection against
sorting, token log-probabilities in chunks of several sizes against the whole logits. `commands` runs each command
twice, with `--device cpu` and `--device cuda`, in processes of their own: seconds, memory, what `--dry-run` predicted,
and how far the results are apart. `large` prunes a checkpoint with the shapes of Llama 7B that it makes in DIRECTORY.
TEXT.jsonl holds `text` per line, QA.jsonl `question` and `answer`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import run_measured
from benchmarks.record import write_result

PARTS = ("kernels", "commands", "large")
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""Outputs and inputs of matrices of a model of 7 billion parameters."""

VOCABULARY, WIDTH, POSITIONS = 128_256, 4096, 2048
CHUNKS = (2**23, 2**25, 2**27)
CALIBRATION = ("samples=16", "window=256")
FIGURES = ("eval.text_rows=4", "eval.text_tokens=128", "eval.generate=false")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "flat": (("unlearn", "--method", "flat", "--guard", "none", "--until", "none"), ("max_steps=20",)),
    "wanda": (("prune", "--method", "wanda", "--sparsity", "0.5"), CALIBRATION),
    "sparsegpt": (("prune", "--method", "sparsegpt", "--sparsity", "0.5"), CALIBRATION),
    "sparsegpt 2:4": (("prune", "--method", "sparsegpt", "--pattern", "2:4"), CALIBRATION),
    "d-pruner": (("prune", "--method", "d-pruner", "--sparsity", "0.5"), (*CALIBRATION, "domain_samples=16")),
    "pat": (("prune", "--method", "pat"), ("max_steps=20", "batch_size=4", "window=128")),
}
"""Name -> words behind `llmsurgery`, settings."""


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the median time of some work on the card in seconds, after one run to warm up."""
    import torch

    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def peak_of(work: Callable[[], object]) -> int:
    """Return how many bytes of the card some work takes beyond what is there before."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def columns() -> list[dict[str, Any]]:
    """Prune single matrices by SparseGPT with the plain loop and with the kernel."""
    import torch

    from llmsurgery.compute import sparsegpt

    found = []
    draw = torch.Generator("cuda").manual_seed(0)
    suits = sparsegpt.suits_kernel
    for rows, width in SHAPES:
        inputs = torch.randn(4096, width, generator=draw, device="cuda") * torch.rand(
            width, generator=draw, device="cuda"
        )
        weight = torch.randn(rows, width, generator=draw, device="cuda")
        moment = inputs.T @ inputs
        factor = sparsegpt.factorise(moment, 0.01, "a matrix")
        for group in (None, (2, 4)):
            made, seconds = {}, {}

            def work(group: tuple[int, int] | None = group) -> torch.Tensor:
                return sparsegpt.prune_matrix(weight, factor, 0.5, group)  # noqa: B023

            for name, chosen in (("loop", lambda _part: False), ("kernel", suits)):
                with patch.object(sparsegpt, "suits_kernel", chosen):
                    made[name] = work()
                    seconds[name] = timed(work, 2)
            row = {
                "rows": rows,
                "width": width,
                "group": group,
                "seconds": seconds,
                "factorise_seconds": timed(lambda: sparsegpt.factorise(moment, 0.01, "a matrix"), 2),  # noqa: B023
                "mask_agreement": float(((made["loop"] == 0) == (made["kernel"] == 0)).float().mean()),
                "relative_difference": float((made["loop"] - made["kernel"]).norm() / made["loop"].norm()),
            }
            found.append(row)
            print(json.dumps(row), flush=True)
    return found


def selection() -> dict[str, Any]:
    """Mark half of every row, and of a whole matrix, by torch's selection and by sorting, as the toolkit does here."""
    import torch

    from llmsurgery.compute.select import smallest, smallest_of_all

    scores = torch.rand(11008, 4096, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    flat = scores.reshape(1, -1)
    half = flat.shape[1] // 2
    work: dict[str, Callable[[], object]] = {
        "rows": lambda: scores <= torch.kthvalue(scores, 2048, dim=1, keepdim=True).values,
        "rows, sorted": lambda: smallest(scores, 2048),
        "whole": lambda: flat <= torch.kthvalue(flat, half, dim=1, keepdim=True).values,
        "whole, sorted": lambda: smallest_of_all(scores, half),
    }
    found = {name: {"seconds": timed(run), "peak_bytes": peak_of(run)} for name, run in work.items()}
    print(json.dumps(found), flush=True)
    return found


def log_probabilities() -> list[dict[str, Any]]:
    """Log-probabilities of labels and their gradient, in chunks of several sizes and from the whole logits."""
    import torch

    from llmsurgery.compute import head

    draw = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, generator=draw, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = 0.02 * torch.randn(VOCABULARY, WIDTH, generator=draw, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=draw, device="cuda")

    def plain() -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")

    def chunked() -> torch.Tensor:
        return -head.label_log_probabilities(hidden, head.Head(weight), labels).sum()

    def step(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(loss(), hidden)[0]

    wanted = step(plain).float()
    found: list[dict[str, Any]] = [{"name": "whole logits", "seconds": timed(lambda: step(plain)),
                                    "peak_bytes": peak_of(lambda: step(plain))}]  # fmt: skip
    for elements in CHUNKS:
        with patch.object(head, "chunk_elements", lambda _device, elements=elements: elements):
            row = {"name": f"chunks of {elements} logits", "seconds": timed(lambda: step(chunked))}
            row |= {"peak_bytes": peak_of(lambda: step(chunked))}
            row |= {"relative_difference": float((step(chunked).float() - wanted).norm() / wanted.norm())}
        found.append(row)
    found.append({"name": "as set", "seconds": timed(lambda: step(chunked)),
                  "peak_bytes": peak_of(lambda: step(chunked))})  # fmt: skip
    for row in found:
        print(json.dumps(row), flush=True)
    return found


def llmsurgery(source: Path, words: list[str], out: Path, device: str) -> dict[str, Any]:
    """Run a command in a process of its own; return what it took and what its manifest says."""
    given = [sys.executable, "-m", "llmsurgery", words[0], str(source), *words[1:], "--device", device]
    cost = run_measured([*given, "-o", str(out), "--json", "--no-undo", "--quiet"])
    manifest: Any = json.loads((out / "surgery.json").read_text())
    metrics = {name: entry["after"]["value"] for name, entry in manifest["metrics"].items() if "after" in entry}
    return {"cost": {**cost, "device_bytes": manifest["cost"].get("device_bytes")}, "metrics": metrics}


def predicted(source: Path, words: list[str], device: str) -> int:
    """Return the peak of memory that `--dry-run` predicts, in bytes."""
    given = [sys.executable, "-m", "llmsurgery", words[0], str(source), *words[1:], "--device", device]
    done = subprocess.run([*given, "--dry-run", "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["memory_bytes"])


def distance(first: Path, second: Path) -> dict[str, float]:
    """Return how alike two results of one source are, over the tensors that they both hold in one shape."""
    import torch

    from llmsurgery.checkpoint import Checkpoint, decode

    one, other = Checkpoint.open(first), Checkpoint.open(second)
    zeros = entries = 0
    difference = size = 0.0
    for name, info in one.tensors.items():
        if name not in other.tensors or other.info(name).shape != info.shape:
            continue
        a, b = (torch.from_numpy(decode(place.read(name), info.dtype)) for place in (one, other))
        zeros += int(((a == 0) == (b == 0)).sum())
        entries += a.numel()
        difference += float((a - b).square().sum())
        size += float(a.square().sum())
    return {"zeros_agree": zeros / entries, "relative_difference": (difference / size) ** 0.5}


def commands(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Run every command on both devices."""
    from llmsurgery.compute.source import resolve_source

    source = resolve_source(options.model)
    lines = options.questions.read_text().splitlines()
    files = {"forget": lines[:16], "retain": lines[16:48]}
    for name, rows in files.items():
        (work / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    found = []
    for name, (given, settings) in COMMANDS.items():
        if options.command and name not in options.command:
            continue
        words = [*given, "--dtype", "float32"]
        if given[0] == "unlearn":
            words += ["--forget", str(work / "forget.jsonl"), "--retain", str(work / "retain.jsonl")]
        else:
            words += ["--calibration", str(options.text)]
        if name == "d-pruner":
            words += ["--domain", str(options.text)]
        words += [word for item in (*settings, *FIGURES) for word in ("--set", item)]
        row: dict[str, Any] = {"name": name, "words": words[:4], "settings": settings}
        for device in ("cuda", "cpu"):
            row[device] = llmsurgery(source, words, work / device, device)
        row["predicted_device_bytes"] = predicted(source, words, "cuda")
        row |= distance(work / "cuda", work / "cpu")
        for device in ("cuda", "cpu"):
            shutil.rmtree(work / device)
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def large(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Prune a checkpoint of Llama 7B's shapes, random weights, on the card."""
    from benchmarks.llama_shapes import LLAMA_7B, cut_tokenizer, make_checkpoint
    from llmsurgery.compute.source import resolve_source

    place = options.large / "llama-7b"
    if not (place / "tokenizer.json").is_file():
        make_checkpoint(place, LLAMA_7B)
        cut_tokenizer(resolve_source(options.model), place, LLAMA_7B.vocabulary)
    found = []
    for name in ("wanda", "sparsegpt"):
        if options.command and name not in options.command:
            continue
        words = ["prune", "--method", name, "--sparsity", "0.5", "--calibration", str(options.text)]
        words += ["--set", "samples=16", "--set", "window=1024"]
        words += [word for item in FIGURES for word in ("--set", item)]
        row = {"name": name, **llmsurgery(place, words, options.large / "out", "cuda")}
        shutil.rmtree(options.large / "out")
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    """Measure the parts that are asked for, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--large", type=Path, metavar="DIRECTORY", help="has 30 GB of room")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--command", action="append", choices=list(COMMANDS))
    options = parser.parse_args()
    wanted = options.only or [
        "kernels",
        *(["commands"] if options.model else []),
        *(["large"] if options.large else []),
    ]
    content: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "kernels" in wanted:
            content |= {"columns": columns(), "selection": selection(), "log_probabilities": log_probabilities()}
        if "commands" in wanted:
            content["model"] = options.model.name
            content["commands"] = commands(options, work)
        if "large" in wanted:
            content["large"] = large(options, work)
    write_result("gpu_" + "_".join(wanted), content)


if __name__ == "__main__":
    main()
