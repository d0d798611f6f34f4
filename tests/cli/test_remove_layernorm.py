"""`llmsurgery remove-layernorm` and `llmsurgery linearity`: the demo, both forms, going on, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from llmsurgery.cli.app import run
from llmsurgery.demo import world_path
from llmsurgery.train.loop import _Loop

QUICK = (
    "--set", "batch_size=4", "--set", "held=4", "--set", "eval.text_rows=4", "--set", "window=32", "-q",
)  # fmt: skip
MODEL = str(world_path("layernorm"))
CORPUS = str(world_path("layernorm-world") / "corpus.jsonl")
TEXT = str(world_path("layernorm-world") / "text.jsonl")


@pytest.fixture(scope="module")
def removed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its norms gone in a few steps, and the picture of it."""
    root = tmp_path_factory.mktemp("layernorm")
    words = ["remove-layernorm", "-o", str(root / "out"), "--picture", str(root / "sigma.svg"), *QUICK]
    gates = ["linearity.norm_error<=1e-5", "linearity.attribution_error<=1e-9", "utility.ce<=2x"]
    assert run([*words, "--set", "max_steps=24", *(word for gate in gates for word in ("--require", gate))]) == 0
    return root


def record_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "surgery.json").read_text())
    found: dict[str, Any] = manifest["operations"][0]["record"]
    return found


def test_demo_compares_source_control_and_result(removed: Path) -> None:
    losses = record_of(removed / "out")["losses"]
    # Even here, where all positions have about the same spread, all at once costs a lot; one after the other in
    # training costs little against the same training with all norms.
    assert losses["at_once"] > losses["source"] + 0.2
    assert losses["result"] < losses["control"] + 0.7
    before = json.loads((removed / "out" / "surgery.json").read_text())["metrics"]["linearity.attribution_error"]
    assert before["before"]["value"] > 0.1
    assert before["after"]["value"] < 1e-9
    assert before["direction"] == "lower"


def test_demo_loads_as_a_stock_gpt2_and_its_norms_are_affine(removed: Path) -> None:
    model, report = GPT2LMHeadModel.from_pretrained(removed / "out", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.layer_norm_epsilon == 1e12
    manifest = json.loads((removed / "out" / "surgery.json").read_text())
    (told,) = [notice for notice in manifest["notices"] if "loaded by GPT2LMHeadModel" in notice]
    assert float(told.split("at most ")[1].split()[0]) < 1e-5
    kept = json.loads((removed / "out" / ".llmsurgery" / "layernorm.json").read_text())
    assert len(kept["events"]) == 3 * 4 + 1
    # The stored gain is g s / sigma.
    values = load_file(removed / "out" / "model.safetensors")
    gains = values["transformer.h.1.ln_2.weight"] * kept["sigma"]["norm.mlp 1"] / kept["scale"]
    source = load_file(Path(MODEL) / "model.safetensors")["transformer.h.1.ln_2.weight"]
    assert torch.allclose(gains, source, atol=0.1)
    assert "before the MLP" in (removed / "sigma.svg").read_text()


def test_the_check_tells_source_and_result_apart(removed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linearity", str(removed / "out"), "--source", MODEL, "--text", TEXT]
    assert run([*words, "--json", "--require", "linearity.norm_error<=1e-5"]) == 0
    document = json.loads(capsys.readouterr().out)
    source, model = (document["models"][name] for name in ("source", "model"))
    assert source["figures"]["linearity.norm_error"] == pytest.approx(0.5, abs=0.01)
    assert all(error < 1e-5 for error in model["norms"].values())
    assert len(model["norms"]) == 9
    assert len(model["components"]) == 9
    assert max(model["components"].values()) < 1e-9
    assert min(source["components"].values()) > 1e-3
    assert run([*words, "--require", "linearity.attribution_error<=0.01x"]) == 0
    assert "attention 3" in capsys.readouterr().out
    assert run(["linearity", MODEL, "--text", TEXT, "--require", "linearity.norm_error<=1e-5"]) == 6


def test_both_forms_hold_the_same_model(removed: Path, tmp_path: Path) -> None:
    words = ["remove-layernorm", "--set", "form=folded", "--set", "max_steps=24", "--set", "control=false", *QUICK]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    models = [GPT2LMHeadModel.from_pretrained(root / "out").eval() for root in (removed, tmp_path)]
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits for model in models)
    assert torch.allclose(one, two, atol=1e-3)
    assert bool((models[1].transformer.h[0].ln_1.weight == 1e6).all())
    assert not bool(models[1].transformer.h[0].ln_1.bias.any())


def test_an_interrupted_removal_goes_on_to_the_same_bytes(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["remove-layernorm", str(checkpoints["sharded_llama"]), "--corpus", CORPUS, "--text", TEXT, *QUICK[:-1]]
    words += ["--set", "max_steps=6", "--set", "save_every=2", "--set", "control=true", "--set", "max_rise=0"]
    original, calls = _Loop.advance, []

    def advance(loop: _Loop, loss: Any) -> float:
        calls.append(1)
        # The control has had its six steps, and the removal is in its fourth.
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(loop, loss)

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "advance", advance)
        assert run([*words, "-o", str(tmp_path / "out")]) == 130
    assert run([*words, "-o", str(tmp_path / "out"), "--resume"]) == 0
    assert "experimental" in capsys.readouterr().err
    assert run([*words, "-o", str(tmp_path / "whole")]) == 0
    for name in sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert record_of(tmp_path / "out")["losses"] == record_of(tmp_path / "whole")["losses"]
    sidecars = [(tmp_path / name / ".llmsurgery" / "layernorm.json").read_bytes() for name in ("out", "whole")]
    assert sidecars[0] == sidecars[1]


def test_bad_input_is_refused_before_any_work(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(code: int, *words: str) -> str:
        assert run(["remove-layernorm", *words, "-o", str(tmp_path / "out")]) == code
        assert not list(tmp_path.glob("out*"))
        return capsys.readouterr().err

    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "A word."}\n')
    half = str(checkpoints["gpt2_without_prefix"])
    assert "float16" in refused(4, half, "--corpus", CORPUS)
    assert "--dtype float32" in refused(4, "--dtype", "float16")
    assert "one window takes" in refused(3, MODEL, "--corpus", str(short))
    assert "--corpus is missing" in refused(2, MODEL)
    assert "no such file" in refused(3, MODEL, "--corpus", str(tmp_path / "no.jsonl")).lower()
    assert "--guard" in refused(2, "--guard", "self")
    assert "drop --quantize" in refused(2, "--quantize", "nf4")
    assert "routed experts" in refused(4, str(checkpoints["mixtral"]), "--corpus", CORPUS)
    assert "last norm would go at step" in refused(2, "--set", "preset=xl", "--set", "max_steps=100")
    assert "nothing to draw" in refused(2, "--method", "fold", "--picture", str(tmp_path / "a.svg"))
    assert "--until" in refused(2, "--until", "utility.ce<=1")


def test_dry_run_counts_the_weights_that_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["remove-layernorm", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trained_parameters"] == sum(row["parameters"] for row in plan["targets"].values())
    assert plan["operations"][0]["settings"]["pace"] == 1.0


def test_folding_alone_changes_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["remove-layernorm", "--method", "fold", "-o", str(tmp_path / "out"), "--json"]
    gates = ["--require", "utility.ppl_ratio<=1.0001", "--require", "utility.kl<=1e-6"]
    assert run([*words, *gates]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["operations"][0]["record"]["kept"] == ["norm.final"]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(
        bool((block.ln_1.weight == 1).all()) and not bool(block.ln_1.bias.any()) for block in model.transformer.h
    )
