"""The methods of `debias` on models with planted faults, and what their results say when they are loaded again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmsurgery import debias, evaluate_checkpoints
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.data.chat import Encoded
from llmsurgery.edits.kinds import Sparse
from llmsurgery.errors import NoEffectError, UnsupportedError, UsageError
from llmsurgery.evaluate.anchors import (
    contrast_of,
    find_neurons,
    layer_gaps,
    lens_logits,
    letter_basis,
    offset_vector,
    read_written,
    vectors_of,
    write_vector,
)
from llmsurgery.methods.label_offsets import FoldSettings, Offsets, fold_offsets, plan_offsets

from ..builders.saving import save
from ..conftest import write_asked, write_rows

LETTERS = ["A", "B", "C"]
FREE: dict[str, object] = {"min_rho": 0.0, "kl_budget": None, "eval.generate": False}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("asked")
    text = [{"text": "The river runs past the mill and the old bridge."}, {"text": "Bread is baked at dawn."}]
    return {**write_asked(root), "text": write_rows(root / "text.jsonl", [dict(row) for row in text])}


def gpt2(root: Path, tied: bool = True) -> Path:
    """A random GPT-2 whose final norm has gain and bias of its own."""
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 262}
    ends = {"bos_token_id": 257, "eos_token_id": 257, "pad_token_id": 256}
    drops = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **drops, tie_word_embeddings=tied, initializer_range=0.2))
    with torch.no_grad():
        model.transformer.ln_f.weight.uniform_(0.8, 1.2)
        model.transformer.ln_f.bias.uniform_(0.1, 0.3)
    return save(model, root, torch.float32)


def logits(root: Path, text: str = "Answer:") -> torch.Tensor:
    """Logits of the letters after a text of bytes."""
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    ids = token_ids(text)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1, [token_ids(letter)[0] for letter in LETTERS]]


def token_ids(text: str) -> list[int]:
    """Return the ids of the byte tokenizer for plain letters."""
    from ..builders.tokenizer import byte_tokenizer

    return list(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])


def run(model: Path, method: str, asked: dict[str, Path], out: Path, **settings: object) -> dict[str, Any]:
    names = ("contrast", "text") if method == "project" else ("mcq", "text")
    free = {key: value for key, value in FREE.items() if key != "min_rho" or method != "project"}
    outcome = debias(
        model, method=method, out=out, settings={**free, **settings}, **{name: asked[name] for name in names}
    )
    return dict(outcome.manifest)


def record_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["operations"][0]["record"]
    return found


@pytest.mark.parametrize(("tied", "untie"), [(False, "auto"), (True, "always")])
def test_layernorm_takes_the_offsets_exactly(tied: bool, untie: str, asked: dict[str, Path], tmp_path: Path) -> None:
    source = gpt2(tmp_path / "source", tied)
    manifest = run(source, "pride", asked, tmp_path / "out", untie=untie, estimator="pride")
    record = record_of(manifest)
    assert record["route"] == "norm"
    assert record["shift_mean"] == pytest.approx(1.0, abs=1e-5)
    assert record["shift_std"] < 1e-5
    offsets = torch.tensor([record["offsets"][letter] for letter in LETTERS])
    assert abs(float(offsets.sum())) < 1e-6
    for text in ("Answer:", "Any other text"):
        change = logits(tmp_path / "out", text) - logits(source, text)
        assert change == pytest.approx(offsets, abs=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    # `eval` of the result finds the figures of the run.
    files = {"mcq": asked["mcq"], "text": asked["text"]}
    again: Any = evaluate_checkpoints([tmp_path / "out"], **files, settings={"generate": False})
    assert again["models"][0]["metrics"]["mcq.rstd"]["n"] == 4
    assert again["models"][0]["metrics"]["utility.ppl"]["value"] == pytest.approx(
        manifest["metrics"]["utility.ppl"]["after"]["value"], rel=1e-6
    )


def test_sequence_bias_is_an_effect_and_generate_sees_it(asked: dict[str, Path], tmp_path: Path) -> None:
    source = gpt2(tmp_path / "source")
    manifest = run(source, "pride", asked, tmp_path / "out", route="sequence-bias")
    assert manifest["tensors"] == {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kept = {ids[0]: bias for ids, bias in model.generation_config.sequence_bias}
    offsets = record_of(manifest)["offsets"]
    assert kept == pytest.approx({token_ids(letter)[0]: offsets[letter] for letter in LETTERS})
    # The letters are measured as `generate` chooses them; texts are scored as before.
    assert manifest["metrics"]["utility.kl"]["after"]["value"] == pytest.approx(0.0, abs=1e-9)
    shares = manifest["metrics"]["mcq.accuracy"]
    assert shares["before"]["detail"]["chosen"] != shares["after"]["detail"]["chosen"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_target_prior_is_folded(asked: dict[str, Path], tmp_path: Path) -> None:
    source, target = gpt2(tmp_path / "source"), {"A": 0.6, "B": 0.3, "C": 0.1}
    out = tmp_path / "out"
    record = record_of(run(source, "pride", asked, out, estimator="pride", target_prior="0.6,0.3,0.1"))
    wanted = {letter: math.log(share / record["prior"][letter]) for letter, share in target.items()}
    mean = sum(wanted.values()) / 3
    assert record["offsets"] == pytest.approx({letter: value - mean for letter, value in wanted.items()})
    for method in ("pride", "contextual"):
        with pytest.raises(UsageError, match="no distribution over 3 letters") as caught:
            run(source, method, asked, tmp_path / "other", target_prior="0.5,0.5")
        assert "0.333,0.333,0.333" in caught.value.fix


def test_routes_that_do_not_exist_are_refused(
    asked: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for route in ("head-bias", "norm"):
        with pytest.raises(UnsupportedError) as caught:
            run(checkpoints["tied_llama"], "pride", asked, tmp_path / "out", route=route)
        assert caught.value.exit_code == 4
        assert caught.value.why
        assert caught.value.fix
    with pytest.raises(UnsupportedError, match="rho"):
        run(checkpoints["tied_llama"], "pride", asked, tmp_path / "out", route="least-squares", min_rho=1.0)
    with pytest.raises(NoEffectError):
        run(checkpoints["tied_llama"], "pride", asked, tmp_path / "out", strength=0)
    assert not list(tmp_path.iterdir())


def test_a_head_with_a_bias_takes_the_offsets_exactly() -> None:
    shapes = {"transformer.wte.weight": (50, 16), "lm_head.weight": (50, 16), "lm_head.bias": (50,)}
    model, _, _ = anchored_model()
    tensors = {name: _Stored(tuple(value.shape)) for name, value in model.state_dict().items()}
    tensors |= {name: _Stored(shape) for name, shape in shapes.items()}
    structure = detect({"model_type": "gpt2", "n_layer": 3, "tie_word_embeddings": False}, tensors)
    assert [target.stored for target in plan_offsets(structure, "auto")] == ["lm_head.bias"]
    bias = np.arange(50, dtype=np.float32)
    operation: Any = SimpleNamespace(structure=structure, read=lambda name: bias)
    offsets = Offsets((4, 2), np.array([1.0, -1.5]))
    folded = fold_offsets(operation, offsets, torch.zeros(1, 16), [], FoldSettings())
    (edit,) = folded.edits
    assert isinstance(edit, Sparse)
    assert (edit.indices.tolist(), edit.values.tolist()) == ([2, 4], [0.5, 5.0])
    assert folded.record == {"route": "head-bias"}


def anchored_model() -> tuple[GPT2LMHeadModel, Any, list[Encoded]]:
    """The planted case of the specification: neuron 7 of layer 2 writes the first letter."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "vocab_size": 50}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, tie_word_embeddings=False, initializer_range=0.2)).eval()
    model.requires_grad_(False)
    tensors = {name: _Stored(tuple(value.shape)) for name, value in model.state_dict().items()}
    structure = detect({"model_type": "gpt2", "n_layer": 3, "tie_word_embeddings": False}, tensors)
    draw = torch.Generator().manual_seed(0)
    prompts = [Encoded(tuple(torch.randint(5, 50, (8,), generator=draw).tolist()), 8, False) for _ in range(20)]
    basis = letter_basis(model, structure, (1, 2, 3, 4))
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.bias[7] = 6.0
        model.transformer.h[2].mlp.c_proj.weight[7] = 4 * basis.centred[0].float()
    return model, structure, prompts


class _Stored:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, "F32"


def test_a_planted_anchored_neuron_is_found_and_edited() -> None:
    model, structure, prompts = anchored_model()
    targets = structure.select(("mlp.down",))
    basis, contrast = letter_basis(model, structure, (1, 2, 3, 4)), contrast_of(0, 4)
    written = read_written(model, structure, targets, prompts, 0)
    gaps = layer_gaps(model, structure, targets, written, basis, contrast)
    assert gaps[2] > 0
    assert gaps[2] == max(gaps.values())
    found = find_neurons(model, structure, targets[2], written, basis, contrast, 10)
    assert found[0].number == 7
    assert max(found, key=lambda neuron: neuron.gap).number == 7
    assert max(found, key=lambda neuron: neuron.push).number == 7

    def letters() -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([model(input_ids=torch.tensor([p.ids])).logits[0, -1, 1:5] for p in prompts])

    before = letters()
    assert (before.argmax(1) == 0).all()
    # Lens differences are the same on raw rows and on the folded, centred ones.
    states = written.last
    scaled = states - states.mean(1, keepdim=True)
    scaled = scaled / (scaled.square().mean(1, keepdim=True) + model.config.layer_norm_epsilon).sqrt()
    raw = lens_logits(model, structure, basis, states)
    folded = scaled @ basis.centred.T
    assert (raw[:, 0] - raw[:, 2]).numpy() == pytest.approx((folded[:, 0] - folded[:, 2]).numpy(), abs=1e-5)
    # Behind a norm that divides by a constant, the offsets that are asked for would arrive.
    delta = torch.tensor([-3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    vector = offset_vector(basis, delta.numpy(), 2.5)
    free = basis.centred - basis.centred.mean(1, keepdim=True)
    assert (free @ vector / 2.5).numpy() == pytest.approx(delta.numpy())
    original = vectors_of(model, targets[2])[7].clone()
    # The paper's edit with the right letter C says C everywhere; nothing else changed.
    write_vector(model, targets[2], 7, original - basis.centred[0] + 8 * basis.centred[2])
    assert (letters().argmax(1) == 2).all()
    write_vector(model, targets[2], 7, original)
    assert torch.equal(letters(), before)


def test_project_takes_the_group_out_of_the_head(asked: dict[str, Path], tmp_path: Path) -> None:
    source = gpt2(tmp_path / "source", tied=False)
    for eraser in ("leace", "sal", "inlp"):
        manifest = run(source, "project", asked, tmp_path / eraser, eraser=eraser, rounds=2)
        record = record_of(manifest)
        assert record["affine"] == (eraser == "leace")
        assert set(manifest["tensors"]) == {"lm_head.weight"}
        rate = manifest["metrics"]["bias.stereotype_rate"]
        assert rate["after"]["n"] == 3
    manifest = run(source, "project", asked, tmp_path / "writers", fold="writers")
    changed = {name for name, row in manifest["tensors"].items() if row["sha256_before"] != row["sha256_after"]}
    # Biases of zeros stay what they are.
    assert changed == {f"transformer.h.{n}.{part}.c_proj.weight" for n in (0, 1) for part in ("attn", "mlp")}
    assert Checkpoint.open(tmp_path / "writers").tensors.keys() == Checkpoint.open(source).tensors.keys()
