"""What the removal of LayerNorm costs and brings, on the embedded GPT-2, and a few steps of it on a model given.

    python -m benchmarks.layernorm [MODEL CORPUS] [--steps N] [--seeds N]

On the demo: the loss of the source, of the same training with all norms, with all norms off at once and with the norms
gone one by one, for several seeds, with and without the auxiliary loss, in both stored forms. With MODEL, a Llama say,
the same once, in N steps of four windows of 256 tokens: an experiment, far too short to judge the method at that size.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

FIGURES = ("linearity.norm_error", "linearity.attribution_error", "utility.ce", "utility.ppl_ratio")


def one_run(model: str | None, corpus: str | None, seed: int, settings: dict[str, object]) -> dict[str, Any]:
    """Return losses, figures and cost of one removal."""
    from llmsurgery import remove_layernorm

    with tempfile.TemporaryDirectory() as folder:
        outcome = remove_layernorm(
            model,
            corpus=corpus,
            seed=seed,
            out=Path(folder) / "out",
            undo=False,
            settings={"control": True, **settings},
        )
    manifest: Any = outcome.manifest
    record = manifest["operations"][0]["record"]
    logits = next(notice for notice in manifest["notices"] if notice.startswith("loaded by"))
    print(seed, settings, {name: round(value, 4) for name, value in record["losses"].items()}, flush=True)
    return {
        "seed": seed,
        "settings": settings,
        "losses": record["losses"],
        "first_over_rest": record["first_over_rest"],
        "metrics": {name: manifest["metrics"][name] for name in FIGURES},
        "logits": logits,
        "seconds": manifest["cost"]["seconds"],
        "steps": record["steps"],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layernorm")
    parser.add_argument("model", nargs="?", help="checkpoint for the experiment")
    parser.add_argument("corpus", nargs="?", help="its training text")
    parser.add_argument("--steps", type=int, default=30, help="steps on MODEL")
    parser.add_argument("--seeds", type=int, default=3, help="runs on the demo")
    options = parser.parse_args(arguments)
    runs = [one_run(None, None, seed, {}) for seed in range(options.seeds)]
    if options.seeds:
        runs.append(one_run(None, None, 0, {"aux": 0.0, "control": False}))
        runs.append(one_run(None, None, 0, {"form": "folded", "control": False}))
    result: dict[str, Any] = {"runs": runs}
    if options.model is not None:
        quick = {"max_steps": options.steps, "batch_size": 4, "window": 256, "held": 4, "eval.text_rows": 8}
        result["experiment"] = one_run(options.model, options.corpus, 0, quick)
    write_result("layernorm", result)
    return result


if __name__ == "__main__":
    main()
