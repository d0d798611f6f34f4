"""Clamp: neurons found by a word, exact storage in every form, what is refused, and biases that nobody announced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmsurgery
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.clamping import Clamp, WordScorer, clamped
from llmsurgery.compute.decode import Vocabulary, decode_vectors
from llmsurgery.edits.kinds import Add, Config, Edit
from llmsurgery.errors import DamagedError, SurgeryError, UnsupportedError, UsageError
from llmsurgery.methods import mlp_biases
from llmsurgery.methods.clamp_neurons import neuron_places, parse_address
from llmsurgery.methods.mlp_biases import require_announced
from llmsurgery.methods.redirect.clamp import ClampConfig

from ..builders.tokenizer import byte_tokenizer

FAST: dict[str, object] = {"eval.generate": False, "sweep": False}
IDS = torch.arange(1, 25)[None]


def doubled(root: Path, path: Path, fill: float = 0.0, **settings: object) -> Path:
    """A copy in fp64 whose results have no rounding but that of fp64; configuration as given."""
    shutil.copytree(root, path)
    for file in path.glob("*.safetensors"):
        tensors = {name: tensor.double() + fill * (".mlp." in name) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = {**json.loads((root / "config.json").read_text()), "dtype": "float64", **settings}
    (path / "config.json").write_text(json.dumps(config))
    return path


def run_clamp(model: Path, out: Path, **settings: object) -> dict[str, Any]:
    outcome = llmsurgery.redirect(model, method="clamp", source="q", out=out, settings={**FAST, **settings})
    return dict(outcome.manifest)


def logits_of(root: Path, hold: Callable[[Any], Any] | None = None) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float64, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        if hold is None:
            return model(input_ids=IDS).logits  # type: ignore[no-any-return]
        with hold(model):
            return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def held(root: Path, where: str, neurons: list[tuple[int, int, float]]) -> Callable[[Any], Any]:
    """Clamp neurons (layer, number, value) of a checkpoint by hooks."""
    checkpoint = Checkpoint.open(root)
    reads, writes = neuron_places(ClampConfig(), detect(checkpoint.config, checkpoint.tensors))
    clamps = [Clamp(reads[layer], writes[layer], neuron, where, value) for layer, neuron, value in neurons]
    return lambda model: clamped(model, clamps)


CASES = [
    ("tied_llama", "post", {}),
    ("tied_llama", "up", {}),
    ("gpt2", "post", {}),
    ("gpt_neox", "post", {}),
    ("mistral", "up", {"sliding_window": None}),
    ("mistral", "post", {"sliding_window": None}),
    ("qwen2", "post", {}),
    ("qwen2", "up", {}),
]


@pytest.mark.parametrize(("name", "where", "config"), CASES)
def test_the_stored_result_is_the_clamped_model(
    name: str, where: str, config: dict[str, object], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = doubled(checkpoints[name], tmp_path / "source", **config)
    settings = {"where": where, "value": 2.5, "absolute": True, "neurons": "1:5,0:3,1:9", "as_llama": True}
    manifest = run_clamp(source, tmp_path / "out", **settings)
    expected = logits_of(source, held(source, where, [(1, 5, 2.5), (0, 3, 2.5), (1, 9, 2.5)]))
    assert float((logits_of(tmp_path / "out") - expected).abs().max()) < 1e-10
    assert float((logits_of(source) - expected).abs().max()) > 1e-3
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    if name not in ("gpt2", "gpt_neox"):
        assert (stored["model_type"], stored["mlp_bias"]) == ("llama", True)
    assert manifest["export"] == "plain"
    assert [one["neuron"] for one in manifest["operations"][0]["record"]["neurons"]] == [5, 3, 9]
    llmsurgery.verify(tmp_path / "out", base=source)
    llmsurgery.revert(tmp_path / "out", out=tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "where"),
    # Both where they differ, else in turn.
    [
        ("gemma2", "post"),
        ("gemma2", "up"),
        ("olmo2", "post"),
        ("phi3", "post"),
        ("phi3", "up"),
        ("qwen3", "up"),
        ("mistral", "post"),
        ("gpt2", "post"),
        ("gpt2", "up"),
    ],
)
def test_every_family_can_switch_a_neuron_off(
    name: str, where: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    if (name, where) == ("gpt2", "up"):
        with pytest.raises(UnsupportedError, match="no gate"):
            run_clamp(checkpoints[name], tmp_path / "out", where=where, neurons="1:5")
        return
    source = doubled(checkpoints[name], tmp_path / "source")
    run_clamp(source, tmp_path / "out", where=where, neurons="1:5")
    expected = logits_of(source, held(source, where, [(1, 5, 0.0)]))
    assert float((logits_of(tmp_path / "out") - expected).abs().max()) < 1e-10


def test_a_bias_that_up_has_already_is_set(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = doubled(checkpoints["tied_llama"], tmp_path / "source")
    run_clamp(source, tmp_path / "one", where="up", value=2.0, absolute=True, neurons="1:5")
    run_clamp(tmp_path / "one", tmp_path / "two", where="up", value=0.0, neurons="1:5")
    expected = logits_of(source, held(source, "up", [(1, 5, 0.0)]))
    assert float((logits_of(tmp_path / "two") - expected).abs().max()) < 1e-10
    run_clamp(tmp_path / "one", tmp_path / "three", where="post", value=3.0, absolute=True, neurons="0:2")
    expected = logits_of(tmp_path / "one", held(tmp_path / "one", "post", [(0, 2, 3.0)]))
    assert float((logits_of(tmp_path / "three") - expected).abs().max()) < 1e-10


def test_experts_can_be_switched_off_and_nothing_more(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    run_clamp(checkpoints["mixtral"], tmp_path / "out", neurons="1:5@2")
    checkpoint = Checkpoint.open(tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    assert not checkpoint.read(name)[:, 5].any()
    assert checkpoint.read(name)[:, 6].any()
    with pytest.raises(UnsupportedError, match="switched off"):
        run_clamp(checkpoints["mixtral"], tmp_path / "two", neurons="1:5@2", value=1.0, absolute=True)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gemma2", {}, "has no biases"),
        ("qwen3", {"as_llama": True}, "has no biases"),
        ("qwen2", {}, "has no biases"),
        ("mistral", {"as_llama": True}, "sliding window"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(
    name: str, settings: dict[str, object], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        run_clamp(checkpoints[name], tmp_path / "out", value=1.0, absolute=True, neurons="1:5", **settings)
    assert not (tmp_path / "out").exists()


def test_a_bias_that_nobody_announces_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias: Edit = Add("model.layers.0.mlp.up_proj.bias", np.zeros(64))
    announced: Edit = Config(("config.json", "mlp_bias"), True)
    require_announced([bias, announced], {"model_type": "llama"})
    require_announced([bias], {"model_type": "llama", "mlp_bias": True})
    for edits, config in (([bias], {"model_type": "llama"}), ([bias, announced], {"model_type": "mistral"})):
        with pytest.raises(SurgeryError, match="would be dropped"):
            require_announced(edits, config)
    # And if that check were not there, the reloaded result would not pass either.
    whole = mlp_biases.bias_edits
    monkeypatch.setattr(
        mlp_biases, "bias_edits", lambda *given: [edit for edit in whole(*given) if not isinstance(edit, Config)]
    )
    with pytest.raises(DamagedError, match="does not"):
        run_clamp(checkpoints["tied_llama"], tmp_path / "out", value=2.0, absolute=True, neurons="1:5")
    assert not (tmp_path / "out").exists()


def test_a_result_that_is_not_the_clamped_model_is_not_published(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = mlp_biases.bias_edits

    def wrong(structure: Any, model: Any, values: Any) -> Any:
        return whole(structure, model, {key: 0 * bias for key, bias in values.items()})

    monkeypatch.setattr(mlp_biases, "bias_edits", wrong)
    with pytest.raises(DamagedError, match="not the clamped model"):
        run_clamp(checkpoints["tied_llama"], tmp_path / "out", value=20.0, absolute=True, neurons="1:5")
    assert not (tmp_path / "out").exists()


def test_the_neuron_of_a_word_is_found_and_swept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints["gpt2"], source)
    tensors = load_file(source / "model.safetensors")
    token = int(byte_tokenizer()("q")["input_ids"][0])
    row = tensors["transformer.wte.weight"][token]
    tensors["transformer.h.1.mlp.c_fc.weight"][:, 7] = row
    tensors["transformer.h.1.mlp.c_proj.weight"][7] = row
    # Only reads it, and is no use.
    tensors["transformer.h.0.mlp.c_fc.weight"][:, 8] = row
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    manifest = run_clamp(source, tmp_path / "out", sweep=True, value=5.0)
    record = manifest["operations"][0]["record"]
    (neuron,) = record["neurons"]
    assert (neuron["layer"], neuron["neuron"]) == (1, 7)
    assert neuron["value"] == pytest.approx(5 * neuron["percentile"])
    assert [row["value"] for row in record["sweep"]] == [-10, -5, -2, -1, 0, 1, 2, 5, 10]
    chances = [row["concept.prob"] for row in record["sweep"]]
    assert chances == sorted(chances)
    figures = manifest["metrics"]["concept.prob"]
    assert figures["after"]["value"] > figures["before"]["value"]
    assert figures["after"]["value"] == pytest.approx(chances[7], abs=1e-5)
    assert any("reads and writes it" in notice for notice in manifest["notices"])


def test_scores_of_a_word_are_those_of_decoding() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, vectors = torch.randn(60, 12, generator=draw), torch.randn(9, 12, generator=draw)
    vocabulary = Vocabulary.of(rows, torch.arange(60))
    decoded = decode_vectors(vectors, vocabulary, 60)
    scores = WordScorer(vocabulary, [3, 17]).scores(vectors)
    places = torch.stack([(decoded.ids == token).float().argmax(1) for token in (3, 17)], 1)
    assert torch.allclose(scores.float(), decoded.scores.gather(1, places).amax(1), atol=1e-5)


def test_addresses(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert parse_address("27:34") == (27, 34, None)
    assert parse_address("3:12@5") == (3, 12, 5)
    for text in ("27", "a:b", "1:2:3"):
        with pytest.raises(UsageError):
            parse_address(text)
    for text in ("9:1", "1:64", "1:5@2"):
        with pytest.raises(UsageError, match="does not exist"):
            run_clamp(checkpoints["tied_llama"], tmp_path / "out", neurons=text)
