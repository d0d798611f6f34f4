"""Trade-off of forgetting against its neighbours on SmolLM2, step by step, for several guards.

    python -m benchmarks.guard_curve MODEL ANSWERS.jsonl TEXT.jsonl NAME [GUARD.SETTING=VALUE | SETTING=VALUE ...]

ANSWERS holds the model's own answers: the first 12 are forgotten, the next 48 are unseen neighbours. One run is one
curve: token probability of both sets and perplexity of TEXT, as shares of the values before, every few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.record import write_result
from benchmarks.unlearn_smollm2 import FORGET, NEIGHBOURS

if TYPE_CHECKING:
    from llmsurgery.data.records import Row


TEXTS = 40


def read_pairs(path: Path) -> list[Row]:
    """Read `question` and `answer` of every line."""
    from llmsurgery.data.records import Row

    lines = map(json.loads, path.read_text().splitlines())
    return [Row("qa", line["question"], line["answer"]) for line in lines]


def main() -> None:
    """Train once with the curve written down, and write the result."""
    import torch

    from llmsurgery.arch.detect import detect
    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.compute.device import set_seeds
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.progress import Silent
    from llmsurgery.data.records import read_rows
    from llmsurgery.evaluate.likelihood import score_rows, token_probability
    from llmsurgery.methods.base import Operation
    from llmsurgery.methods.registry import find_method
    from llmsurgery.methods.settings import resolve_config
    from llmsurgery.run.encoding import make_encoder
    from llmsurgery.run.settings import settle_lr
    from llmsurgery.run.source import tensor_reader
    from llmsurgery.train.config import GuardConfig
    from llmsurgery.train.guard import draw_rows, make_guard
    from llmsurgery.train.session import Session

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("name")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--goal", type=float, default=0.15, help="share of forget probability to stop at")
    parser.add_argument("--rows", type=Path, help="drawn rows: read if there, else written")
    options = parser.parse_args()
    given = dict(item.split("=", 1) for item in options.settings)
    guarding = {name.removeprefix("guard."): value for name, value in given.items() if name.startswith("guard.")}
    own = {name: value for name, value in given.items() if not name.startswith("guard.")}
    checkpoint = Checkpoint.open(options.model)
    structure = detect(checkpoint.config, checkpoint.tensors)
    method = find_method("flat", "unlearn")
    guard_config = resolve_config(GuardConfig, guarding)
    config = settle_lr(resolve_config(method.config_type, own, method.spec.presets), structure, guard_config.weight > 0)
    encoder = make_encoder(checkpoint)
    model = load_model(options.model, torch.float32, torch.device("cpu"))
    lines = read_pairs(options.answers)
    sets = {"forget": lines[:FORGET], "neighbours": lines[FORGET : FORGET + NEIGHBOURS]}
    encoded = {name: [encoder.encode(row) for row in rows] for name, rows in sets.items()}
    texts = [encoder.encode_chunks(row, 256) for row in read_rows(options.text)[:TEXTS]]
    plain = [chunks[0] for chunks in texts]

    def scores() -> dict[str, float]:
        result = {}
        for name, rows in encoded.items():
            found = score_rows(model, rows, encoder.pad_id, 8, Silent(), "")
            result[name] = sum(token_probability(s, r) for s, r in zip(found, rows, strict=True)) / len(rows)
        found = score_rows(model, plain, encoder.pad_id, 8, Silent(), "")
        result["ppl"] = math.exp(-sum(float(s.sum()) for s in found) / sum(len(s) for s in found))
        return result

    set_seeds(0)
    started = time.perf_counter()
    before = scores()
    print(before, f"{time.perf_counter() - started:.0f} s", flush=True)
    guard = None
    if guard_config.weight > 0:
        if options.rows and options.rows.exists():
            drawn = read_pairs(options.rows)
            drawn = drawn[: guard_config.prompts]
        else:
            drawn = draw_rows(model, encoder, sets["forget"], guard_config, 0, Silent())
            if options.rows:
                options.rows.write_text(
                    "".join(json.dumps({"question": r.prompt, "answer": r.answer}) + "\n" for r in drawn)
                )
        print(len(drawn), "rows", f"{time.perf_counter() - started:.0f} s", flush=True)
        guard = make_guard(model, encoder, drawn, guard_config, Silent())
    curve: list[dict[str, float]] = []
    training = time.perf_counter()
    steps = 0

    def reached(_: object) -> bool:
        nonlocal steps
        steps += options.every
        model.eval()
        now = {name: value / before[name] for name, value in scores().items()}
        model.train()
        curve.append({"step": steps, "seconds": time.perf_counter() - training, **now})
        print(options.name, {k: round(v, 3) for k, v in curve[-1].items()}, flush=True)
        return bool(now["forget"] <= options.goal)

    config = resolve_config(method.config_type, {**own, "check_every": options.every}, method.spec.presets)
    config = settle_lr(config, structure, guard is not None)
    data = method.prepare(config, encoder, {"forget": sets["forget"]})
    set_seeds(0)
    session = Session(reached=reached, guard=guard)
    method.edit(
        config,
        Operation(structure, checkpoint.config, tensor_reader(checkpoint), model, encoder, sets, 0, Silent(), session),
        data,
    )
    content: dict[str, object] = {"name": options.name, "settings": given, "before": before, "curve": curve}
    write_result("guard_curve", content)


if __name__ == "__main__":
    main()
