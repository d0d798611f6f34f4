"""FLAT on SmolLM2-135M-Instruct: its own greedy answers to questions, some forgotten, their neighbours watched.

    python -m benchmarks.unlearn_smollm2 MODEL QUESTIONS.jsonl TEXT.jsonl [--measure SCRIPT]

QUESTIONS holds `question` per line; the first 12 are forgotten, the next 48 are unseen neighbours of the same form.
TEXT holds `text` per line. SCRIPT, if given, is an independent scorer that takes MODEL, --qa FILE and --ppl FILE and
prints one JSON object; its figures are recorded beside the project's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

FORGET, NEIGHBOURS = 12, 48


def own_answers(model_path: Path, questions: Path, target: Path) -> None:
    """Write the model's greedy answers of at most 20 tokens, first line only."""
    import torch

    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.progress import Silent
    from llmsurgery.data.records import Row
    from llmsurgery.evaluate.generation import greedy_answers
    from llmsurgery.run.encoding import make_encoder

    rows = [json.loads(line) for line in questions.read_text().splitlines() if line.strip()][: FORGET + NEIGHBOURS]
    encoder = make_encoder(Checkpoint.open(model_path))
    model = load_model(model_path, torch.bfloat16, torch.device("cpu"))
    prompts = [encoder.encode_prompt(Row("qa", row["question"], "x")) for row in rows]
    # One at a time: in bfloat16 a padded batch can choose another token where two are nearly equal.
    answers = greedy_answers(model, encoder, prompts, 20, 1, Silent(), "")
    lines = [{"question": row["question"], "answer": a.split("\n")[0]} for row, a in zip(rows, answers, strict=True)]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines))


def outside(script: Path, model: Path, files: list[Path], text: Path) -> dict[str, float]:
    """Score a checkpoint with the independent script."""
    words = [word for file in files for word in ("--qa", str(file))]
    done = subprocess.run(
        [sys.executable, str(script), str(model), *words, "--ppl", str(text)],
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Run and write the result."""
    from llmsurgery import evaluate_checkpoints, unlearn
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--answers", type=Path, help="answers made earlier; skips making them")
    parser.add_argument("--dtype", default="auto", help="compute dtype of the run")
    parser.add_argument("--guard", default="none", help="none, self or a data file")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    source = resolve_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        answers = options.answers or work / "answers.jsonl"
        if options.answers is None:
            own_answers(source, options.questions, answers)
        lines = answers.read_text().splitlines(keepends=True)
        forget, neighbours = work / "forget.jsonl", work / "neighbours.jsonl"
        forget.write_text("".join(lines[:FORGET]))
        neighbours.write_text("".join(lines[FORGET : FORGET + NEIGHBOURS]))
        outcome = unlearn(
            source,
            method="flat",
            forget=forget,
            retain=neighbours,
            text=options.text,
            out=work / "out",
            dtype=options.dtype,
            guard=options.guard,
            settings=dict(item.split("=", 1) for item in options.set),
        )
        manifest: Any = outcome.manifest
        result: dict[str, object] = {
            "model": options.model.name,
            "metrics": manifest["metrics"],
            "operation": {**manifest["operations"][0], "require": []},
            "cost": manifest["cost"],
        }
        if options.measure:
            files = [forget, neighbours]
            # As the outside scorer does it: bfloat16, one row at a time.
            scored: Any = evaluate_checkpoints(
                [source, work / "out"],
                forget=forget,
                retain=neighbours,
                text=options.text,
                dtype="bfloat16",
                batch_size=1,
                settings={"generate": False},
            )
            result["bfloat16"] = {
                when: model["metrics"] for when, model in zip(("before", "after"), scored["models"], strict=True)
            }
            result["outside"] = {
                "before": outside(options.measure, source, files, options.text),
                "after": outside(options.measure, work / "out", files, options.text),
            }
    write_result("unlearn_smollm2" if options.guard == "none" else "unlearn_smollm2_guard", result)
    for name, metric in manifest["metrics"].items():
        print(f"{name}: {metric['before']['value']:.4f} -> {metric['after']['value']:.4f}")


if __name__ == "__main__":
    main()
