"""Decoding vectors through the head: the specification's numbers, blocks against a plain reference, every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmsurgery.arch.detect import detect
from llmsurgery.arch.neurons import NeuronVectors, neuron_vectors
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute import decode as module
from llmsurgery.compute.decode import Vocabulary, decode_vectors, norm_gain, read_vectors, trained_rows
from llmsurgery.compute.load import load_model
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import UnsupportedError

HEAD = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.6, 0.8, 0, 0], [0, 0, 0, 1]])
NEURONS = torch.tensor([[0.3, 0.4, 0, 0], [0, 0, -2, 0], [0, 0, 0, 0.01]])


def test_worked_numbers() -> None:
    vocabulary = Vocabulary.of(HEAD, torch.arange(5))
    raw = decode_vectors(NEURONS, vocabulary, 5)
    assert raw.ids[:, 0].tolist() == [3, 0, 4]
    assert raw.p[:, 0].tolist() == pytest.approx([0.254024, 0.241818, 0.201605], abs=1e-6)
    assert raw.z.tolist() == pytest.approx([1.262672, 0.5, 2.0], abs=1e-6)
    # The second neuron only suppresses a token; it names none.
    assert raw.margin.tolist() == pytest.approx([0.1, 0, 0.01], abs=1e-6)
    longer = decode_vectors(8 * NEURONS / NEURONS.norm(dim=1, keepdim=True), vocabulary, 5)
    assert longer.ids[:, 0].tolist() == [3, 0, 4]
    assert longer.p[:, 0].tolist() == pytest.approx([0.804292, 0.249979, 0.998660], abs=1e-6)
    assert longer.z.tolist() == pytest.approx([1.262672, 0.5, 2.0], abs=1e-5)


def test_blocks_give_what_one_product_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, vectors = torch.randn(97, 16, generator=draw), torch.randn(11, 16, generator=draw)
    gain = torch.rand(16, generator=draw) + 0.5
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 11 * 7)
    decoded = decode_vectors(vectors, Vocabulary.of(rows, torch.arange(100, 197), gain), 3)
    logits = (vectors @ (gain * rows).T).double()
    values, ids = logits.topk(3)
    assert torch.equal(decoded.ids, ids + 100)
    assert torch.allclose(decoded.p.double(), logits.softmax(1).gather(1, ids), atol=1e-6)
    scores = (values - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True)
    assert torch.allclose(decoded.scores.double(), scores, atol=1e-5)
    assert torch.allclose(decoded.margin.double(), values[:, 0] - values[:, 1], atol=1e-5)


def test_a_vector_of_zeros_names_nothing() -> None:
    decoded = decode_vectors(torch.zeros(1, 4), Vocabulary.of(HEAD, torch.arange(5)), 2)
    assert (decoded.margin.item(), decoded.z.item()) == (0, 0)


def columns(place: NeuronVectors, matrix: torch.Tensor) -> torch.Tensor:
    """The vectors in the plain orientation [inputs or outputs of all neurons]."""
    upright = matrix.T if place.tensor.transposed else matrix
    if place.side == "out":
        return upright.T
    return upright[place.first : place.first + place.count]


@pytest.mark.parametrize("name", ["sharded_llama", "gpt2", "phi3", "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v2"])
def test_vectors_are_those_of_the_loaded_model(name: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints[name])
    structure = detect(checkpoint.config, checkpoint.tensors)
    model = load_model(checkpoints[name], torch.float32, torch.device("cpu"), buffers=structure.family.buffers)
    for side in ("in", "out") if name in ("gpt2", "gpt_neox") else ("in", "gate", "out"):
        for place in neuron_vectors(structure, side):
            vectors = torch.cat(list(read_vectors(checkpoint, place, 7)))
            assert vectors.shape[1] == model.config.hidden_size
            assert torch.equal(vectors, columns(place, weight_view(model, place.tensor)))


def test_phi3_splits_gate_and_up_as_its_module_does(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["phi3"])
    structure = detect(checkpoint.config, checkpoint.tensors)
    model = load_model(checkpoints["phi3"], torch.float32, torch.device("cpu"))
    mlp = model.get_submodule("model.layers.1.mlp")
    gate, up, down = (
        torch.cat(list(read_vectors(checkpoint, place)))
        for side in ("gate", "in", "out")
        for place in neuron_vectors(structure, side, [1])
    )
    x = torch.randn(3, gate.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    assert torch.allclose(hidden @ down, mlp(x), atol=1e-5)


def test_a_model_without_gates_says_so(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["gpt2"])
    with pytest.raises(UnsupportedError):
        neuron_vectors(detect(checkpoint.config, checkpoint.tensors), "gate")


def test_reserved_rows_are_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    root = shutil.copytree(checkpoints["gpt2"], tmp_path / "model")
    tensors = load_file(root / "model.safetensors")
    embed = tensors["transformer.wte.weight"]
    embed[7] = 1e-6
    embed[9] = embed[12]
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(root)
    used = trained_rows(checkpoint, detect(checkpoint.config, checkpoint.tensors))
    assert (~used).nonzero().squeeze(1).tolist() == [7, 9, 12]


def test_gains_of_gemma_count_from_one(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["gemma2"])
    structure = detect(checkpoint.config, checkpoint.tensors)
    gain = norm_gain(checkpoint, structure, "norm.mlp", 1)
    stored = load_file(checkpoints["gemma2"] / "model.safetensors")
    assert gain is not None
    assert torch.equal(gain, 1 + stored["model.layers.1.pre_feedforward_layernorm.weight"])
    olmo = Checkpoint.open(checkpoints["olmo2"])
    assert norm_gain(olmo, detect(olmo.config, olmo.tensors), "norm.mlp", 1) is None
