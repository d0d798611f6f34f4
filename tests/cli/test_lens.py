"""`llmsurgery lens`: the last layer is the model's answer; documents, pictures, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llmsurgery
from llmsurgery.cli.app import run
from llmsurgery.compute.load import load_model
from llmsurgery.errors import UsageError

PROMPT = "the mill of Al is"


@pytest.mark.parametrize("name", ["gpt2", "tied_llama", "gemma2", "gpt_neox", "mixtral"])
def test_the_last_layer_is_what_the_model_says(
    name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lens", str(checkpoints[name]), PROMPT, "--token", "q", "--top", "3", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [reading["layer"] for reading in document["readings"]] == ["embedding", "0", "1"]
    assert document["tokens"] == list(PROMPT)
    # A word after a word has a blank, which is a token of its own here.
    wanted = document["token"]["id"]
    assert document["token"]["text"] == " "
    model = load_model(checkpoints[name], torch.float32, torch.device("cpu"))
    from ..builders.tokenizer import byte_tokenizer

    ids = torch.tensor([byte_tokenizer()(PROMPT)["input_ids"]])
    with torch.inference_mode():
        p = model(input_ids=ids).logits[0].softmax(-1)
    for position, expected in zip(document["readings"][-1]["positions"], p, strict=True):
        assert position["top"][0]["id"] == int(expected.argmax())
        assert position["top"][0]["p"] == pytest.approx(float(expected.max()), abs=1e-5)
        assert position["p"] == pytest.approx(float(expected[wanted]), abs=1e-5)
        assert position["rank"] == int((expected > expected[wanted]).sum()) + 1
    assert all(len(position["top"]) == 3 for reading in document["readings"] for position in reading["positions"])


def test_sites_that_are_added_and_sites_that_do_not_exist(checkpoints: dict[str, Path]) -> None:
    block, mlp = (llmsurgery.lens(checkpoints["tied_llama"], PROMPT, site=site) for site in ("block", "mlp"))
    assert len(mlp["readings"]) == 2  # type: ignore[arg-type]
    assert mlp["readings"][1] != block["readings"][2]  # type: ignore[index]
    assert run(["lens", str(checkpoints["gpt_neox"]), PROMPT, "--site", "middle"]) == 4


def test_table_and_pictures(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    model = str(checkpoints["tied_llama"])
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert run(["lens", model, "cost $ of $x", "--last", "4", "--picture", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    out = capsys.readouterr().out
    assert "first token and its p" in out
    assert "embedding" in out
    assert run(["lens", model, PROMPT, "--token", "x", "-q"]) == 0
    p, rank = capsys.readouterr().out.split()
    assert 0 < float(p) < 1 <= int(rank)
    with pytest.raises(UsageError):
        llmsurgery.lens(model, PROMPT, picture=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "code"), [(["", "--top", "1"], 2), ([PROMPT, "--site", "head"], 2), ([PROMPT, "--token", ""], 2)]
)
def test_errors_have_their_codes(
    words: list[str], code: int, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["lens", str(checkpoints["tied_llama"]), *words]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_bundles_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(checkpoints["tied_llama"], tmp_path / "bundle")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({"target": config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    assert run(["lens", str(root), PROMPT]) == 4
