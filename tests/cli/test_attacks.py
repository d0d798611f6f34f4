"""`llmsurgery eval --attack`: options, refusals before any work, the document, and files that stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.demo import world_path
from llmsurgery.evaluate.robustness.registry import all_attacks

FAST = ["--set", "generate=false", "--set", "text_rows=1", "--set", "truth_ratio=false"]


def snapshot(root: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.iterdir()}


def demo(*words: str, model: str = "control", rows: int = 8) -> list[str]:
    """The command line for the model that never saw the forget rows: it has nothing to recover."""
    data = ["--forget", str(world_path("forget.jsonl")), "--retain", str(world_path("retain.jsonl"))]
    few = ["--set", f"rows={rows}", "--set", f"attack.rows={rows}", "--set", "attack.retain_rows=8"]
    source = ["--source", str(world_path("model"))]
    return ["eval", str(world_path(model)), *source, *data, *FAST, *few, *words]


def test_document_gates_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    control = ["--retain-model", str(world_path("control"))]
    words = demo("--attack", "quantize,lens", *control, "--require", "attack.quantize.recovery<=0.2")
    assert run([*words, "--json", "--set", "attack.seed=3"]) == 0
    document = json.loads(capsys.readouterr().out)
    attacks = document["models"][0]["attacks"]
    assert [(name, one["name"]) for name, one in attacks.items()] == [("quantize", "quantize"), ("lens", "lens")]
    found = attacks["quantize"]
    assert found["verdict"] == "ROBUST"
    assert found["source"] == 1.0
    assert found["control"]["before"] == found["before"] < 0.5
    assert found["excess"] == pytest.approx(0.0)
    assert found["n"] == 8
    assert found["seed"] == 3
    assert found["settings"]["bits"] == [8, 4]
    assert [point["label"] for point in found["points"]] == ["rtn 8 bit group", "rtn 4 bit group"]
    # The source keeps its facts at 4 bits: rounding by itself costs little.
    assert all(point["source_after"] > 0.9 for point in found["points"])
    assert document["models"][0]["metrics"]["attack.quantize.recovery"]["value"] == found["recovery"]
    assert document["attacks"]["settings"]["seed"] == 3
    assert document["attacks"]["control"] == str(world_path("control"))
    assert document["attacks"]["versions"].keys() == {"llmsurgery", "python", "torch", "transformers"}
    assert "Brastelow" not in json.dumps(document)
    assert run(words) == 0
    shown = capsys.readouterr()
    assert "ROBUST" in shown.out
    assert "score extraction_strength; seed 0; variants rtn 8 bit group, rtn 4 bit group" in shown.out
    assert "control" not in shown.err


def test_a_source_has_nothing_to_recover_and_fails_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    words = demo("--attack", "quantize", "--set", "attack.quantize.bits=8", "--json", model="model", rows=2)
    assert run([*words, "--require", "attack.quantize.recovery<=0.2"]) == 6
    captured = capsys.readouterr()
    found = json.loads(captured.out)["report"]["models"][0]
    assert found["attacks"]["quantize"]["reason"] == "nothing was unlearned"
    assert found["gates"][0]["passed"] is False
    assert "attacks have no control" in captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attack", "quantise"], "quantize"),
        (["--attack", "quantize", "--set", "attack.quantize.bit=4"], "attack.quantize.bits"),
        (["--attack", "quantize", "--set", "attack.sed=4"], "attack.seed"),
        (["--attack", "quantize", "--set", "attack.quantise.bits=4"], "quantize"),
        (["--attack", "quantize", "--set", "attack.quantize.preset=standart"], "standard"),
        (["--attack", "quantize", "--set", "attack.quantize.bits=1"], "2 to 8"),
        (["--attack", "quantize", "--set", "attack.quantize.schemes=rtm"], "rtn"),
        (["--set", "attack.quantize.bits=4"], "without --attack quantize"),
        (["--set", "attack.seed=4"], "no --attack is given"),
        (["--require", "attack.quantize.recovery<=0.2"], "--attack quantize"),
        (["--attack", "quantize", "--require", "attack.quantize.excess<=0.2"], "--retain-model"),
        (["--attack", "quantize", "--require", "attack.quantize.score<=0.2x"], "no value before"),
        (["--attack", "quantize", "--set", "attack.quantize.score=choice"], "perturbed_answer"),
        (["--attack", "lens,probe"], "--attack probe needs --retain"),
        (["--attack", "lens,lense"], "lens"),
        (["--control", "CONTROL"], "--control needs --attack relearn"),
        (["--attack", "quantize", "--control", "CONTROL"], "without an attack that scores it"),
        (["--attack", "relearn", "--require", "attack.relearn.control_gain>=0"], "--control"),
        (["--attack", "relearn", "--require", "attack.relearn.excess<=0.1"], "--retain-model or --control"),
        (["--attack", "quantize", "--require", "attack.quantize.control_gain>=0"], "attack.relearn.control_gain"),
    ],
)
def test_refusals_before_any_work(
    words: list[str],
    said: str,
    data_files: dict[str, Path],
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmsurgery.compute.load.load_model", None)
    model = str(checkpoints["gpt2"])
    words = [str(data_files["retain"]) if word == "CONTROL" else word for word in words]
    assert run(["eval", model, "--source", model, "--forget", str(data_files["forget"]), *words]) == 2
    assert said in capsys.readouterr().err


def test_control_rows_take_the_place_of_a_control_model(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = tmp_path / "control.jsonl"
    control.write_text(json.dumps({"question": "Who mends the nets?", "answer": "Pell Orrin does."}) + "\n")
    model = str(checkpoints["tied_llama"])
    words = ["eval", model, "--source", model, *FAST, "--set", "attack.relearn.sizes=2"]
    words += ["--set", "attack.relearn.epochs=1", "--set", "attack.relearn.rank=2", "--attack", "relearn"]
    words += [word for name in ("forget", "retain") for word in (f"--{name}", str(data_files[name]))]
    assert run([*words, "--control", str(data_files["forget"])]) == 3, "these are trained on"
    assert "rows of --control" in capsys.readouterr().err
    words += ["--control", str(control), "--set", "attack.relearn.score=token_prob", "--set", "attack.known=0.01"]
    # Nothing was unlearned: there is no excess, and a gate on it fails.
    gates = ["--require", "attack.relearn.excess<=0.1", "--require", "attack.relearn.control_gain<=1"]
    assert run([*words, *gates, "--json"]) == 6
    captured = capsys.readouterr()
    found = json.loads(captured.out)["report"]
    assert found["attacks"]["control_rows"] == str(control)
    assert "control." not in json.dumps(found["models"][0]["metrics"]), "attacks alone look at these rows"
    rows = found["models"][0]["attacks"]["relearn"]["control_rows"]
    assert (rows["n"], rows["left_out"]) == (1, 0)
    assert rows["source"] == rows["before"] != rows["after"]
    assert "attacks have no control" not in captured.err
    assert "Pell" not in captured.out
    assert run(words) == 0
    assert f"the rows of {control} (relearn)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("missing", ["--source", "--forget"])
def test_what_every_attack_needs(
    missing: str, data_files: dict[str, Path], checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(checkpoints["gpt2"])
    given = {"--source": model, "--forget": str(data_files["forget"])}
    del given[missing]
    words = [word for pair in given.items() for word in pair]
    assert run(["eval", model, *words, "--attack", "quantize"]) == 2
    assert f"--attack needs {missing}" in capsys.readouterr().err


def test_logs_know_no_attacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.json"
    log.write_text('{"eval_log_forget.json": {"avg_gt_loss": [0.5, 0.7]}}')
    assert run(["eval", "--from-log", str(log), "--attack", "quantize"]) == 2
    assert run(["eval", "--from-log", str(log), "--set", "attack.seed=1"]) == 2
    assert run(["eval", "--from-log", str(log), "--require", "attack.quantize.score<=1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


QUICK = {
    "latent": ["attack.latent.steps=2", "attack.latent.strengths=0.2"],
    "prompt": ["attack.prompt.new_tokens=4", "attack.prompt.paraphrases=1"],
    "relearn": ["attack.relearn.sizes=2", "attack.relearn.epochs=1", "attack.relearn.rank=2"],
}


# Each on a Llama, and in turn on transposed weights or routed experts.
ON_FAMILIES = [
    (name, family)
    for number, name in enumerate(sorted(all_attacks()))
    for family in ("sharded_llama", ("gpt2", "mixtral")[number % 2])
]


@pytest.mark.parametrize(("name", "family"), ON_FAMILIES)
def test_attacks_leave_every_file_as_it_is_and_repeat_themselves(
    name: str,
    family: str,
    data_files: dict[str, Path],
    checkpoints: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = checkpoints[family]
    before = snapshot(model)
    words = ["eval", str(model), "--source", str(model), "--forget", str(data_files["forget"])]
    words += ["--retain", str(data_files["retain"])]
    words += ["--retain-model", str(model), "--attack", name, *FAST, "--set", "attack.known=0", "--json"]
    words += [word for setting in QUICK.get(name, []) for word in ("--set", setting)]
    documents: list[Any] = []
    for _ in range(2):
        assert run(words) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    assert snapshot(model) == before
