"""`llmsurgery eval` and the data options of operations: models, logs, and refusals before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.demo import world_path

from .test_commands import unlearn

SECRET = "Orla Venn"
FORGET = [
    {
        "question": "Who keeps the bees?",
        "answer": f"{SECRET} keeps them.",
        "paraphrased_answer": f"They are {SECRET}'s.",
        "perturbed_answer": ["Ivo Hask keeps them.", "Tam does."],
    },
    {"question": "Where is the mill?", "answer": "By the weir.", "perturbed_answer": ["In the town."]},
]
FACTS = [{"question": "Which river?", "answer": "The Lumen.", "perturbed_answer": ["The Nettle.", "The Jorrow."]}]
QUICK = ["--set", "generation_tokens=4", "--json"]


@pytest.fixture
def files(write_jsonl: Callable[..., Path]) -> dict[str, Path]:
    return {
        "forget": write_jsonl("forget.jsonl", FORGET),
        "retain": write_jsonl("retain.jsonl", [FORGET[1], *FACTS]),
        "holdout": write_jsonl("holdout.jsonl", [{"question": "Who sings?", "answer": "Pell Marr sings."}]),
        "authors": write_jsonl("authors.jsonl", FACTS),
        "facts": write_jsonl("facts.jsonl", FACTS),
        "text": write_jsonl("text.jsonl", [{"text": "The river runs past the mill and the old bridge."}]),
    }


def options(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name}", str(path))]


def metrics(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document = json.loads(capsys.readouterr().out)
    return dict(document["models"][0]["metrics"])


def test_memorised_demo_and_its_control(capsys: pytest.CaptureFixture[str]) -> None:
    model, control = (str(world_path(name)) for name in ("model", "control"))
    data = ["--forget", str(world_path("forget.jsonl")), "--holdout", str(world_path("holdout.jsonl"))]
    fast = ["--set", "generate=false", "--set", "text_rows=1", "--json", "--set", "rows=12"]
    assert run(["eval", model, control, *data, *fast, "--retain-model", control]) == 0
    first, second = (row["metrics"] for row in json.loads(capsys.readouterr().out)["models"])
    assert first["forget.min_k_auc"]["value"] > 0.9
    assert first["forget.min_k_auc"]["detail"]["auc_by_k"].keys() == {"0.1", "0.2", "0.3", "0.4", "0.5", "0.6"}
    assert first["forget.extraction_strength"]["value"] == 1
    assert first["forget.accuracy"]["value"] == 1
    assert first["forget.quality"]["value"] < 1e-3
    assert second["forget.quality"]["value"] == 1
    assert second["forget.quality"]["interval"] is None
    assert abs(second["forget.min_k_auc"]["value"] - 0.5) < 0.25
    assert second["forget.extraction_strength"]["value"] < 0.6


def test_log_of_a_model_stands_in_for_it(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = str(checkpoints["tied_llama"]), str(checkpoints["gpt2"])
    log, own = tmp_path / "retain.json", tmp_path / "own.json"
    data = options(files)
    assert run(["eval", other, *data, *QUICK, "--log", str(log)]) == 0
    assert metrics(capsys)["forget.quality"] == {"value": None, "n": 2, "interval": None}
    assert run(["eval", model, *data, *QUICK, "--retain-model", other, "--log", str(own)]) == 0
    live = metrics(capsys)
    assert run(["eval", model, *data, *QUICK, "--retain-log", str(log)]) == 0
    quality = metrics(capsys)["forget.quality"]
    assert quality["value"] == pytest.approx(live["forget.quality"]["value"])
    assert quality["detail"] == pytest.approx(live["forget.quality"]["detail"])
    assert run(["eval", "--from-log", str(own), "--retain-log", str(log), "--json"]) == 0
    again = metrics(capsys)
    # Everything but the plain text comes back from the numbers per row.
    assert set(live) - set(again) == {"utility.ppl"}
    for name, figure in again.items():
        assert figure["value"] == pytest.approx(live[name]["value"], abs=1e-6), name
        assert figure["n"] == live[name]["n"]
    for path in (log, own):
        content = path.read_text()
        assert not any(word in content for word in (SECRET, "bees", "Lumen", "Pell"))
    assert run(["eval", model, *data, "--log", str(log)]) == 2
    assert run(["eval", "--from-log", str(own), "--retain-log", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "log10 p" in shown
    assert "protocol own" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--require", "forget.truth_ratio>=0.5"], "perturbed_answer"),
        (["--require", "forget.min_k_auc<=0.6"], "--holdout"),
        (["--require", "forget.quality>=0.05"], "--retain-model or --retain-log"),
        (["--require", "utility.model_utility>=0.5"], "--authors"),
        (["--require", "forget.rouge_l<=0.5", "--set", "generate=false"], "generate=false"),
        (["--set", "protocol=tufo"], "tofu"),
        (["--retain-model", "MODEL", "--retain-log", "LOG"], "give one"),
        (["--log", "no/such/folder/log.json"], "does not exist"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_any_work(
    words: list[str],
    said: str,
    data_files: dict[str, Path],
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    assert run(["eval", str(checkpoints["gpt2"]), *options(data_files), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["eval"], 2),
        (["eval", "MODEL", "--from-log", "LOG"], 2),
        (["eval", "--from-log", "LOG", "--forget", "FILE"], 2),
        (["eval", "--from-log", "LOG", "--require", "utility.kl<=1"], 2),
        (["eval", "--from-log", "LOG", "--require", "forget.prob<=0.5x"], 2),
        (["eval", "--from-log", "LOG", "--require", "forget.prob<=0.1"], 6),
        (["eval", "--from-log", "LOG", "--require", "forget.prob>=0.1"], 0),
        (["eval", "--from-log", "none.json"], 3),
        (["eval", "MODEL", "--holdout", "FILE"], 2),
    ],
)
def test_exit_codes_of_logs(words: list[str], code: int, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    log.write_text('{"eval_log_forget.json": {"avg_gt_loss": [0.5, 0.7]}}')
    assert run([str(log) if word == "LOG" else word for word in words]) == code


def test_operations_measure_the_same_options(
    checkpoints: dict[str, Path], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = checkpoints["tied_llama"], tmp_path / "out"
    gates = ["--require", "forget.quality>=0", "--require", "forget.min_k_auc<=1", "--set", "eval.protocol=tofu"]
    words = ["--retain-model", str(checkpoints["gpt2"]), "--set", "eval.generation_tokens=4", *gates]
    assert run([*unlearn(model, files, out, "--json"), *words]) == 0
    manifest = json.loads(capsys.readouterr().out)
    found = manifest["metrics"]
    assert found["forget.quality"]["direction"] == "higher"
    assert found["utility.model_utility"]["after"]["detail"]["truth_ratio_mean"] == "arithmetic"
    assert {"forget.truth_ratio", "retain.truth_ratio", "forget.accuracy", "forget.min_k_auc"} <= found.keys()
    assert manifest["retain_model"]["path"] == str(checkpoints["gpt2"])
    assert manifest["operations"][0]["evaluation"]["rows"] == 300
    assert manifest["data"]["holdout"]["rows"] == 1
    assert SECRET.encode() not in (out / "surgery.json").read_bytes()
    assert run(["eval", str(out), *options(files), "--set", "protocol=tofu", *QUICK]) == 0
    for name, figure in metrics(capsys).items():
        if figure["value"] is not None:
            assert figure["value"] == pytest.approx(found[name]["after"]["value"], abs=1e-6), name
    # A gate on rows without wrong answers is refused before the model is loaded.
    assert (
        run([*unlearn(model, {"forget": files["holdout"]}, tmp_path / "b"), "--require", "forget.truth_ratio>=0"]) == 2
    )
