"""Time and peak memory of a FLAT step, lean head against plain full logits, on the same rows and weights.

    python -m benchmarks.flat_step MODEL

Every measurement runs in a process of its own, because a peak never comes down again; the two variants alternate.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import write_result

CASES = {"short": (4, 32, 32), "long": (4, 32, 96)}
"""Name -> pairs per step, prompt tokens, answer tokens."""

STEPS = 4


def worker(model_path: str, variant: str, case: str, dtype: str) -> dict[str, float]:
    """Measure one variant: seconds per step after a warm-up step, peak memory above the loaded model."""
    import torch

    from llmsurgery.compute.device import DTYPES
    from llmsurgery.compute.head import batch_log_probabilities, final_hidden, read_head
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.source import resolve_source
    from llmsurgery.methods.unlearn.flat import FlatConfig, flat_loss

    torch.manual_seed(0)
    device = torch.device("cpu")
    model = load_model(resolve_source(model_path), DTYPES[dtype], device)
    from peft import LoraConfig, get_peft_model

    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=roles))
    model.train()
    pairs, prompt, answer = CASES[case]
    ids = torch.randint(10, 40000, (2 * pairs, prompt + answer))
    attention = torch.ones_like(ids)
    labels = torch.arange(prompt + answer) >= prompt
    label_mask = labels.expand_as(ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def lean() -> tuple[torch.Tensor, torch.Tensor]:
        return batch_log_probabilities(model, ids, attention, label_mask)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        head = read_head(model)
        logits = head.logits(final_hidden(model, ids, attention))
        scores = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        rows, columns = torch.nonzero(label_mask, as_tuple=True)
        return scores[rows, columns - 1], rows

    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, losses = [], []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        scores, rows = lean() if variant == "lean" else plain()
        loss, _, _ = flat_loss(scores.exp(), rows, pairs, FlatConfig())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        losses.append(loss.item())
    grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    return {"seconds": statistics.median(times[1:]), "peak_bytes": float(grown), "first_loss": losses[0]}


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "CASE"))
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(str(options.model), options.worker[0], options.worker[1], options.dtype)))
        return
    results: dict[str, object] = {}
    for case, (pairs, prompt, answer) in CASES.items():
        runs: dict[str, list[dict[str, float]]] = {"lean": [], "plain": []}
        for _ in range(options.repeats):
            for variant in runs:
                words = [str(options.model), "--dtype", options.dtype, "--worker", variant, case]
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.flat_step", *words], capture_output=True, text=True, check=True
                )
                runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
        median = {
            variant: {key: statistics.median(run[key] for run in many) for key in many[0]}
            for variant, many in runs.items()
        }
        results[case] = {
            "pairs": pairs,
            "prompt_tokens": prompt,
            "answer_tokens": answer,
            "runs": runs,
            "median": median,
            "time_ratio": median["lean"]["seconds"] / median["plain"]["seconds"],
            "memory_ratio": median["lean"]["peak_bytes"] / median["plain"]["peak_bytes"],
        }
        print(case, json.dumps(median), file=sys.stderr)
    write_result("flat_step", {"model": options.model.name, "dtype": options.dtype, "results": results})


if __name__ == "__main__":
    main()
