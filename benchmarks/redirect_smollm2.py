"""A country and a character redirected to others on SmolLM2-135M-Instruct, asked in four forms before and after.

    python -m benchmarks.redirect_smollm2 MODEL TEXT.jsonl [--set NAME=VALUE] [--also NAME=VALUE,...] [--questions DIR]

The questions are those of `redirect_questions` that the model knows: it gives the answer at least the probability
`--floor` (geometric mean per token), and for those to be forgotten at most half of it when the same question is asked
about the new name, so that a redirection could move it. That very drop, of a model whose questions name the new name,
is recorded as `limit`: what a perfect redirection would reach in each form. A form with too few of them is left out,
and that is recorded: where a model answers multiple choice by the place of the choice, no redirection moves its
letters. `--questions` keeps the chosen ones, or takes those of an earlier run. TEXT holds `text` per line; perplexity
is taken over its first passages, none of which the edit sees. Each `--also` is a further run with other settings, for
the curve of strength against neighbours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import run_measured
from benchmarks.patches import model_files
from benchmarks.record import write_result
from benchmarks.redirect_questions import FORMS, KINDS, Asked, all_questions
from llmsurgery import apply, diff, evaluate_checkpoints, revert

SIDES = ("forget", "retain")
BATCH = 16
ENOUGH = 4
"""Known questions that a form must have, to be asked and counted."""
SPELLING = "example"
"""The model does not follow the instruction to spell; it is shown one spelled answer, as the paper's but Llama are."""
DEPENDS = 0.5
"""Share of its probability that an answer may keep when its question is asked about the new name."""

Score = Callable[[str, Sequence[dict[str, object]]], "np.ndarray[Any, Any]"]


def make_score(source: Path) -> Score:
    """Return what scores records of one form as `eval --suite ort` does."""
    import torch

    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.progress import Silent
    from llmsurgery.data.question_forms import read_form
    from llmsurgery.evaluate.config import EvaluationConfig
    from llmsurgery.evaluate.likelihood import answer_probability, score_rows
    from llmsurgery.evaluate.suites.ort import OrtConfig
    from llmsurgery.evaluate.suites.ort_figures import encode_ort
    from llmsurgery.run.encoding import make_encoder

    encoder = make_encoder(Checkpoint.open(source))
    model = load_model(source, torch.float32, torch.device("cpu"))

    def score(form: str, records: Sequence[dict[str, object]]) -> np.ndarray[Any, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"forget_{form}.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            rows = {f"forget_{form}": read_form(path, form)}
        encoded = encode_ort(encoder, rows, OrtConfig((form,), SPELLING), EvaluationConfig()).cells[f"forget_{form}"]
        found = score_rows(model, encoded, encoder.pad_id, BATCH, Silent(), "")
        return np.array([answer_probability(row) for row in found])

    return score


def choose(score: Score, form: str, side: str, floor: float, count: int) -> dict[str, Any]:
    """Return known questions of one form, half of them of each kind, and what they score.

    Args:
        score: Scores records of a form.
        form: One of `FORMS`.
        side: "forget" or "retain".
        floor: Least probability of the answer.
        count: Questions that are wanted at most.
    """
    records: list[dict[str, object]] = []
    own: list[float] = []
    other: list[float] = []
    asked = 0
    for number, kind in enumerate(KINDS):
        members = [one for one in all_questions() if one.kind == number and one.form == form]
        members = [one for one in members if (one.subject == kind.forget) == (side == "forget")]
        members, found = _mixed(members), 0
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            values = score(form, [one.record() for one in part])
            asked += len(part)
            known = [(one, float(value)) for one, value in zip(part, values, strict=True) if value >= floor]
            moved = [0.0] * len(known)
            if side == "forget" and known:
                moved = score(form, [one.record(kind.target) for one, _ in known]).tolist()
            for (one, value), left in zip(known, moved, strict=True):
                if left <= DEPENDS * value and found < count // 2:
                    found += 1
                    records.append(one.record())
                    own.append(value)
                    other.append(left)
            if found >= count // 2:
                break
    limit = 1 - sum(other) / sum(own) if side == "forget" and own else None
    return {
        "records": records,
        "asked": asked,
        "known": len(records),
        "mean": float(np.mean(own)) if own else None,
        "limit": limit,
    }


def _mixed(members: Sequence[Asked]) -> list[Asked]:
    """Return questions in turn about every subject."""
    seen: dict[str, int] = {}
    ranked = []
    for one in members:
        seen[one.subject] = seen.get(one.subject, -1) + 1
        ranked.append((seen[one.subject], one))
    return [one for _, one in sorted(ranked, key=lambda pair: pair[0])]


def make_questions(source: Path, folder: Path, floor: float, count: int) -> dict[str, Any]:
    """Write the files of the suite and `chosen.json`; return what that holds."""
    score = make_score(source)
    folder.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Any] = {}
    for form in FORMS:
        for side in SIDES:
            if side == "retain" and chosen[f"forget_{form}"]["known"] < ENOUGH:
                # The form is left out: its neighbours need not be looked for.
                chosen[f"retain_{form}"] = {"asked": 0, "known": 0, "mean": None, "limit": None}
                continue
            found = choose(score, form, side, floor, count)
            lines = "".join(json.dumps(record) + "\n" for record in found.pop("records"))
            (folder / f"{side}_{form}.jsonl").write_text(lines)
            chosen[f"{side}_{form}"] = found
            print(f"{side}_{form}", found, flush=True)
    (folder / "chosen.json").write_text(json.dumps({"floor": floor, "cells": chosen}, indent=2) + "\n")
    return {"floor": floor, "cells": chosen}


def redirect_run(source: Path, pairs: Path, out: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Redirect in a process of its own; return what it took and what its manifest says of the edit."""
    words = [sys.executable, "-m", "llmsurgery", "redirect", str(source), "--method", "rocr", "--pairs", str(pairs)]
    words += ["-o", str(out), "--set", "eval.generate=false", "--json"]
    cost = run_measured([*words, *(word for item in settings for word in ("--set", item))])
    manifest: Any = json.loads((out / "surgery.json").read_text())
    record = manifest["operations"][0]["record"]
    metrics = {name: [one["before"]["value"], one["after"]["value"]] for name, one in manifest["metrics"].items()}
    return {"settings": list(settings), "cost": cost, "record": record, "metrics": metrics}


def forms_of(chosen: dict[str, Any]) -> list[str]:
    """Return the forms with enough known questions on both sides."""
    return [form for form in FORMS if all(chosen["cells"][f"{side}_{form}"]["known"] >= ENOUGH for side in SIDES)]


def figures(source: dict[str, Any], model: dict[str, Any], forms: Sequence[str]) -> dict[str, Any]:
    """Return drops, what neighbours keep, and perplexity, out of an evaluation of some forms."""
    before = {name: one["value"] for name, one in source["metrics"].items()}
    after = {name: one["value"] for name, one in model["metrics"].items()}
    kept = {form: after[f"ort.retain_{form}"] / before[f"ort.retain_{form}"] for form in forms}
    drops = {form: 1 - after[f"ort.forget_{form}"] / before[f"ort.forget_{form}"] for form in forms}
    return {
        "before": before,
        "after": after,
        "drops": drops,
        "form_gap": after["ort.form_gap"],
        "neighbours": kept,
        "neighbours_mean": sum(kept.values()) / len(kept),
        "ppl_ratio": after["utility.ppl_ratio"],
    }


def patch_run(source: Path, edited: Path, work: Path) -> dict[str, object]:
    """Make a patch, apply it to a fresh copy of the source, revert that, and compare all files."""
    patch, fresh = work / "redirect.patch", work / "fresh"
    diff(source, edited, out=patch)
    shutil.copytree(source, fresh)
    started = time.perf_counter()
    apply(patch, fresh, out=work / "applied")
    applied = time.perf_counter() - started
    started = time.perf_counter()
    revert(work / "applied", out=work / "back")
    reverted = time.perf_counter() - started
    return {
        "patch_bytes": patch.stat().st_size,
        "applied_equal": model_files(work / "applied") == model_files(edited),
        "reverted_equal": model_files(work / "back") == model_files(source),
        "apply_seconds": applied,
        "revert_seconds": reverted,
    }


def main() -> None:
    """Choose questions, redirect, ask, patch; write the result."""
    from llmsurgery.compute.source import resolve_source

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--floor", type=float, default=0.2)
    parser.add_argument("--count", type=int, default=12, help="questions per form and side at most")
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--questions", type=Path, help="folder of chosen questions; made if it is not there")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=VALUE,...")
    options = parser.parse_args()
    source = resolve_source(options.model)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        questions = options.questions or work / "questions"
        kept = questions / "chosen.json"
        chosen = json.loads(kept.read_text()) if kept.is_file() else None
        chosen = chosen or make_questions(source, questions, options.floor, options.count)
        forms = forms_of(chosen)
        pairs = work / "pairs.jsonl"
        lines = [{"from": kind.forget, "to": kind.target, "aliases": list(kind.aliases)} for kind in KINDS]
        pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
        outs, runs = [], []
        for number, settings in enumerate([options.set, *([*options.set, *one.split(",")] for one in options.also)]):
            outs.append(work / f"out{number}")
            runs.append(redirect_run(source, pairs, outs[-1], settings))
            print(runs[-1], flush=True)
        scored: Any = evaluate_checkpoints(
            outs,
            source=source,
            suite="ort",
            suite_dir=questions,
            text=options.text,
            dtype="float32",
            settings={"text_rows": options.passages, "suite.forms": ",".join(forms), "suite.spelling": SPELLING},
        )
        for run, model in zip(runs, scored["models"], strict=True):
            run["figures"] = figures(scored["source"], model, forms)
            print({name: run["figures"][name] for name in ("drops", "form_gap", "neighbours", "ppl_ratio")}, flush=True)
        patch = patch_run(source, outs[0], work)
        print(patch, flush=True)
    write_result(
        "redirect_smollm2",
        {
            "model": options.model.name,
            "pairs": lines,
            "questions": chosen,
            "forms": forms,
            "passages": options.passages,
            "runs": runs,
            "patch": patch,
        },
    )


if __name__ == "__main__":
    main()
