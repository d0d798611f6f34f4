"""The prior of answer letters of SmolLM2-135M-Instruct on ARC, before and after each method of `debias`.

    python -m benchmarks.debias_smollm2 MODEL ARC.jsonl TEXT.jsonl [--rows N] [--reloaded N] [--halves N]

The model is asked all questions once, in every cyclic order; what it says (log-probabilities of the letters) is kept.
Estimates are then made on one half of the questions and measured on the other: on `--halves` random halves for the mean
and the spread of each estimator, and on the half of `debias --seed 0` with intervals over questions.

Each method is then run as a user would run it, and its checkpoint is loaded again and asked `--reloaded` questions that
it did not learn from. Where a method adds constant offsets, what the kept log-probabilities predict for these questions
stands beside it. `project` gets made-up sentences about the work of women and men.

Nothing that the source model has said is computed twice: `Kept` hands out what it said to the same prompt before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from benchmarks.record import write_result

Numbers = npt.NDArray[np.float64]

METHODS: dict[str, dict[str, object]] = {
    "pride": {},
    "contextual": {"cap": 8},
    "anchored": {"items": 24, "kl_budget": None},
    "project": {"kl_budget": None},
}
"""Methods that are run, with settings that differ from the defaults."""

ESTIMATORS = {
    "share": ("share", "geometric"),
    "pride": ("pride", "geometric"),
    "pride_arithmetic": ("pride", "arithmetic"),
}

WOMEN = ("nurse", "secretary", "hairdresser", "librarian", "dancer", "housekeeper", "midwife", "receptionist")
MEN = ("engineer", "carpenter", "mechanic", "surgeon", "farmer", "pilot", "plumber", "judge")
SAYINGS = (
    "The {} said that {} was tired.", "When the {} came home, {} slept.", "I met the {} before {} left.",
    "The {} knew what {} had to do.",
)  # fmt: skip


def contrast_rows() -> list[dict[str, object]]:
    """Return pairs in the layout of CrowS-Pairs: the pronoun that goes with a work's reputation, and the other one."""
    rows: list[dict[str, object]] = []
    for works, more, less in ((WOMEN, "she", "he"), (MEN, "he", "she")):
        for work in works:
            for saying in SAYINGS:
                rows.append(
                    {
                        "sent_more": saying.format(work, more),
                        "sent_less": saying.format(work, less),
                        "stereo_antistereo": "stereo" if more == "she" else "antistereo",
                        "bias_type": "gender",
                    }
                )
    return rows


class Kept:
    """What models have said already, by weights and prompt."""

    def __init__(self) -> None:
        from llmsurgery.evaluate import letters, likelihood

        self.letters: dict[tuple[str, tuple[int, ...]], tuple[Numbers, Any]] = {}
        self.texts: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.forwards = 0
        self._score, self._text = letters.score_letters, likelihood.text_hidden

    def score_letters(
        self, model: Any, data: Any, pad_id: int, batch_size: int, progress: Any, keep_states: bool = False
    ) -> Any:
        """Stand in for `llmsurgery.evaluate.letters.score_letters`."""
        import dataclasses

        import torch

        from llmsurgery.evaluate.letters import LetterScores

        name, letters = fingerprint(model), len(data.letters)
        missing = [prompt for prompt in data.prompts if (name, prompt.ids) not in self.letters]
        # Whole questions: the function takes every order of each.
        wanted = {prompt.ids for prompt in missing}
        asked = [
            number
            for number in range(len(data.questions))
            if any(prompt.ids in wanted for prompt in data.prompts[number * letters : (number + 1) * letters])
        ]
        if asked:
            part = dataclasses.replace(
                data,
                questions=tuple(data.questions[number] for number in asked),
                prompts=[p for n in asked for p in data.prompts[n * letters : (n + 1) * letters]],
            )
            self.forwards += len(part.prompts)
            found = self._score(model, part, pad_id, batch_size, progress, True)
            assert found.states is not None
            rows = found.log_probabilities.reshape(-1, letters)
            states = found.states.reshape(len(part.prompts), -1)
            for prompt, row, state in zip(part.prompts, rows, states, strict=True):
                self.letters[name, prompt.ids] = (row, state)
        both = [self.letters[name, prompt.ids] for prompt in data.prompts]
        scores = np.stack([row for row, _ in both]).reshape(len(data.questions), letters, letters)
        kept = torch.stack([state for _, state in both]).reshape(len(data.questions), letters, -1)
        return LetterScores(scores, kept if keep_states else None)

    def text_hidden(self, model: Any, rows: Sequence[Any], pad_id: int, batch_size: int, progress: Any) -> list[Any]:
        """Stand in for `llmsurgery.evaluate.likelihood.text_hidden`."""
        name = fingerprint(model)
        missing = [row for row in rows if (name, row.ids) not in self.texts]
        if missing:
            for row, states in zip(missing, self._text(model, missing, pad_id, batch_size, progress), strict=True):
                self.texts[name, row.ids] = states
        return [self.texts[name, row.ids] for row in rows]

    def patches(self) -> list[Any]:
        """Return what puts the stand-ins in place."""
        return [
            mock.patch("llmsurgery.evaluate.letters.score_letters", self.score_letters),
            mock.patch("llmsurgery.evaluate.figures.score_letters", self.score_letters),
            mock.patch("llmsurgery.evaluate.figures.text_hidden", self.text_hidden),
        ]


def fingerprint(model: Any) -> str:
    """Return a hash of all that decides what a model says: its values, and what generation adds."""
    import torch

    digest = hashlib.sha256(repr(getattr(model.generation_config, "sequence_bias", None)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def figures_of(scores: Numbers, answers: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return accuracy, spread and recalls of log-probabilities [questions, orders, letters], with intervals."""
    from llmsurgery.evaluate.intervals import bootstrap_interval, resampled_interval
    from llmsurgery.evaluate.letters import hits_of, recall_spread

    hits, chosen = hits_of(scores, answers)
    return {
        "questions": len(hits),
        "accuracy": float(hits.mean()),
        "accuracy_interval": bootstrap_interval(hits.mean(1).tolist()),
        "rstd": recall_spread(hits),
        "rstd_interval": resampled_interval(lambda draw: recall_spread(hits[draw(len(hits))])),
        "recall": hits.mean(0).tolist(),
        "chosen": (np.bincount(chosen.reshape(-1), minlength=hits.shape[1]) / chosen.size).tolist(),
    }


def accuracy_change(before: Numbers, after: Numbers, answers: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return the change of accuracy, with an interval over questions."""
    from llmsurgery.evaluate.intervals import bootstrap_interval
    from llmsurgery.evaluate.letters import hits_of

    gain = (hits_of(after, answers)[0] - hits_of(before, answers)[0]).mean(1)
    return {"change": float(gain.mean()), "interval": bootstrap_interval(gain.tolist())}


def over_halves(scores: Numbers, answers: npt.NDArray[np.int64], halves: int) -> dict[str, Any]:
    """Return accuracy and spread of each estimator over random halves: mean, deviation and the middle 95%."""
    from llmsurgery.evaluate.letters import hits_of, recall_spread
    from llmsurgery.methods.priors import estimate_offsets

    names = ("base", *ESTIMATORS)
    values: dict[str, dict[str, list[float]]] = {name: {"rstd": [], "accuracy": []} for name in names}
    for seed in range(halves):
        order = np.random.default_rng(seed).permutation(len(scores))
        given, held = order[: len(order) // 2], order[len(order) // 2 :]
        for name in names:
            delta = np.zeros(scores.shape[-1])
            if name != "base":
                delta, _ = estimate_offsets(scores[given], *ESTIMATORS[name])
            hits, _ = hits_of(scores[held] + delta, answers[held])
            values[name]["rstd"].append(recall_spread(hits))
            values[name]["accuracy"].append(float(hits.mean()))
    return {
        name: {
            metric: {
                "mean": float(np.mean(found)), "deviation": float(np.std(found, ddof=1)) if halves > 1 else 0.0,
                "middle_95": [float(value) for value in np.percentile(found, (2.5, 97.5))],
            }
            for metric, found in both.items()
        }
        for name, both in values.items()
    }  # fmt: skip


def run_method(
    name: str, source: Path, files: Mapping[str, Path], out: Path, reloaded: int, text_rows: int
) -> dict[str, Any]:  # fmt: skip
    """Run one method as a user would, and return its figures before and after, its record and its cost."""
    from llmsurgery import debias

    contrast = files["contrast"] if name == "project" else None
    settings: dict[str, object] = {**METHODS[name], "eval.mcq_rows": reloaded, "eval.text_rows": text_rows}
    started = time.perf_counter()
    outcome = debias(
        source,
        method=name,
        text=files["text"],
        out=out,
        settings=settings,
        undo=False,
        mcq=files["mcq"],
        contrast=contrast,
    )
    manifest: Any = outcome.manifest
    return {
        "settings": manifest["operations"][0]["settings"],
        "record": manifest["operations"][0]["record"],
        "metrics": manifest["metrics"],
        "notices": manifest["notices"],
        "seconds": time.perf_counter() - started,
        "bytes_written": manifest["cost"]["bytes_written"],
    }


def predicted(scores: Numbers, record: Mapping[str, Any]) -> Numbers:
    """Return log-probabilities with the offsets of a run."""
    return np.asarray(scores + np.array(list(record["offsets"].values())))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=160, help="questions that are asked")
    parser.add_argument("--reloaded", type=int, default=32, help="held-out questions that every result is asked")
    parser.add_argument("--halves", type=int, default=20)
    parser.add_argument("--text-rows", type=int, default=16)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--name", default="debias_smollm2", help="name of the result")
    options = parser.parse_args(arguments)
    from llmsurgery.compute.source import resolve_source

    source, kept = resolve_source(options.model), Kept()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        files = {"mcq": work / "mcq.jsonl", "contrast": work / "contrast.jsonl", "text": options.text}
        usable = first_usable(options.questions, options.rows)
        files["mcq"].write_text("".join(json.dumps(row) + "\n" for row in usable))
        files["contrast"].write_text("".join(json.dumps(row) + "\n" for row in contrast_rows()))
        for patch in kept.patches():
            patch.start()
        try:
            result = measure(source, files, work, kept, options)
        finally:
            mock.patch.stopall()
    result |= {"model": options.model.name, "rows": len(usable), "forwards": kept.forwards}
    write_result(options.name, result)
    show(result)
    return result


def first_usable(path: Path, count: int) -> list[dict[str, object]]:
    """Return the first questions of the commonest number of options, as question, choices and answer."""
    from llmsurgery.data.mcq import read_choices

    found = read_choices(path).questions[:count]
    return [{"question": one.question, "choices": list(one.choices), "answer": one.answer} for one in found]


def measure(
    source: Path, files: Mapping[str, Path], work: Path, kept: Kept, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """Ask everything once, estimate on halves, then run every method and ask its result."""
    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.compute.device import resolve_device, resolve_dtype
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.progress import Silent
    from llmsurgery.data.mcq import read_choices, read_template
    from llmsurgery.evaluate.letters import encode_letters
    from llmsurgery.run.encoding import make_encoder
    from llmsurgery.run.source import stored_dtype

    started = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    encoder, device = make_encoder(checkpoint), resolve_device("auto")
    # The dtype that `debias` computes in, so that what is kept here is what its runs would compute.
    model = load_model(source, resolve_dtype("auto", stored_dtype(checkpoint), device), device)
    data = encode_letters(encoder, read_choices(files["mcq"]), read_template(""))
    scores = kept.score_letters(model, data, encoder.pad_id, 8, Silent(), True).log_probabilities
    del model
    answers = data.answers
    held = held_out(len(answers))
    asked = held[: options.reloaded]
    result: dict[str, Any] = {
        "seconds_asking": time.perf_counter() - started,
        "template_sha256": data.template,
        "base": figures_of(scores[held], answers[held]),
        "halves": over_halves(scores, answers, options.halves),
        "methods": {},
    }
    for name in options.methods.split(","):
        found = run_method(name, source, files, work / name, options.reloaded, options.text_rows)
        if "offsets" in found["record"]:
            after = predicted(scores, found["record"])
            found["held_out"] = figures_of(after[held], answers[held])
            found["accuracy_change"] = accuracy_change(scores[held], after[held], answers[held])
            found["predicted"] = figures_of(after[asked], answers[asked])
        result["methods"][name] = found
    return result


def held_out(count: int) -> list[int]:
    """Return the numbers of the questions that `debias --seed 0` holds out, in order."""
    return sorted(random.Random(0).sample(range(count), min(max(round(0.5 * count), 1), count - 1)))


def show(result: Mapping[str, Any]) -> None:
    """Print the figures."""
    base = result["base"]
    print(f"base: rstd {base['rstd']:.1f}, accuracy {base['accuracy']:.4f}, chosen {base['chosen']}")
    for name, found in result["halves"].items():
        spread, right = found["rstd"], found["accuracy"]
        print(f"halves, {name}: rstd {spread['mean']:.1f} +- {spread['deviation']:.1f}, accuracy {right['mean']:.4f}")
    for name, found in result["methods"].items():
        metrics = found["metrics"]
        for metric in ("mcq.rstd", "mcq.accuracy", "utility.ppl_ratio", "utility.kl", "bias.stereotype_rate"):
            if metric in metrics:
                before, after = metrics[metric]["before"]["value"], metrics[metric]["after"]["value"]
                print(f"{name}: {metric} {before:.4g} -> {after:.4g}")
        if "predicted" in found:
            print(f"{name}: predicted for the same questions: rstd {found['predicted']['rstd']:.4g}")


if __name__ == "__main__":
    main()
