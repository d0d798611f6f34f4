"""`llmsurgery neurons`: planted neurons are found, checkpoints are compared, documents, pictures, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmsurgery
from llmsurgery.cli.app import run
from llmsurgery.errors import UsageError

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Path:
    """A Llama whose neuron 1:5 reads and writes the token "q", and whose neuron 1:6 writes it."""
    root = shutil.copytree(checkpoints["tied_llama"], tmp_path_factory.mktemp("planted") / "model")
    tensors = load_file(root / "model.safetensors")
    row = tensors["model.embed_tokens.weight"][token_of("q")]
    tensors[UP][5] = 3 * row
    tensors[DOWN][:, 5] = 2 * row
    tensors[DOWN][:, 6] = row
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def token_of(symbol: str) -> int:
    from ..builders.tokenizer import byte_tokenizer

    return int(byte_tokenizer()(symbol)["input_ids"][0])


def document_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["neurons", *words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_planted_neuron_is_found_first(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of([str(planted), "--find", "q", "--top", "3"], capsys)
    first = document["neurons"][0]
    assert (first["layer"], first["neuron"], first["side"], first["token"]) == (1, 5, "in", "q")
    assert first["margin"] > 0
    assert first["z"] == max(neuron["z"] for neuron in document["neurons"])
    assert document["forms"] == ["Q", "q"]
    assert document["decoded"] == {"in": 128}
    chart = document["map"]
    assert chart["z"][chart["tokens"].index("q")][1] == pytest.approx(first["z"])
    assert llmsurgery.neurons(planted, find="q", top=3) == document


def test_both_sides_and_where_they_agree(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of([str(planted), "--find", "q", "--side", "both", "--tokens", "1", "--top", "0"], capsys)
    found = {(one["layer"], one["neuron"], one["side"]): one["sides_agree"] for one in document["neurons"]}
    assert found[1, 5, "in"]
    assert found[1, 5, "out"]
    assert not found[1, 6, "out"]
    assert document["agreeing"] >= 1
    assert len(document["neurons"]) == document["found"]


def test_special_and_broken_tokens_are_never_named(planted: Path) -> None:
    document = llmsurgery.neurons(planted, top=0, side="out")
    # 256 bytes, of which 128 are no text alone, three special tokens and three rows without a token.
    assert document["vocabulary"] == {"tokens": 262, "named": 128}


def test_two_checkpoints_are_compared(
    planted: Path, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    same = document_of([str(planted), "--compare", str(planted), "--side", "both"], capsys)["compare"]
    assert (same["share"], same["neurons"], same["layers"]) == (1.0, 256, {"0": 1.0, "1": 1.0})
    words = [str(planted), "--compare", str(checkpoints["tied_llama"])]
    other = document_of(words, capsys)["compare"]
    assert other["share"] == 127 / 128
    assert other["layers"] == {"0": 1.0, "1": 63 / 64}
    assert run(["neurons", *words]) == 0
    assert "same first token in" in capsys.readouterr().out
    assert run(["neurons", str(planted), "--compare", str(checkpoints["mixtral"])]) == 3


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "qwen2_moe", "gemma2", "olmo2"])
def test_every_layout_is_read(name: str, checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of([str(checkpoints[name]), "--side", "both", "--fold-norms", "--layers", "1"], capsys)
    assert document["layers"] == [1]
    assert document["decoded"]["in"] == document["decoded"]["out"]
    assert len(document["neurons"]) == 20
    scores = [neuron["z"] for neuron in document["neurons"]]
    assert scores == sorted(scores, reverse=True)
    experts = {neuron["expert"] for neuron in document["neurons"] if neuron["part"] == "expert"}
    assert bool(experts) == (name in ("mixtral", "qwen2_moe"))


def test_folding_norms_changes_what_a_row_means(checkpoints: dict[str, Path]) -> None:
    plain, folded = (llmsurgery.neurons(checkpoints["qwen3"], fold_norms=fold, top=0) for fold in (False, True))
    assert plain["neurons"] != folded["neurons"]


def test_pictures_and_tables(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert run(["neurons", str(planted), "--find", "q", "--picture", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    out = capsys.readouterr().out
    assert "1:5" in out
    assert "z, not p, compares neurons" in out
    assert run(["neurons", str(planted), "--top", "1", "-q"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(UsageError):
        llmsurgery.neurons(planted, picture=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--find", "philosophy"], 3),
        (["--layers", "2"], 2),
        (["--layers", "one"], 2),
        (["--layers", "1-0"], 2),
        (["--side", "up"], 2),
        (["--compare", "missing"], 3),
        (["--picture", "a.txt"], 2),
    ],
)
def test_errors_have_their_codes(
    words: list[str], code: int, planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["neurons", str(planted), *words]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_the_model_is_never_loaded(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmsurgery.compute import load

    def refuse(*_words: object, **_options: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(load, "load_with", refuse)
    assert llmsurgery.neurons(planted, top=1)["neurons"]
    assert torch.get_default_dtype() == torch.float32
