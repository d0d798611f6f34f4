"""Detection: family and roles from config and headers alone, and refusals that name what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmsurgery.arch.detect import detect, find_family, load_families
from llmsurgery.arch.spec import LINEAR_ROLES, Structure
from llmsurgery.checkpoint import Checkpoint, TensorInfo
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import DamagedError, NoEffectError, UnsupportedError, UsageError

from ..builders import BUILDERS

DOWN = "model.layers.1.mlp.down_proj.weight"


def structure(root: Path) -> Structure:
    checkpoint = Checkpoint.open(root)
    return detect(checkpoint.config, checkpoint.tensors)


def parts(root: Path) -> tuple[dict[str, object], dict[str, TensorInfo]]:
    checkpoint = Checkpoint.open(root)
    return dict(checkpoint.config), dict(checkpoint.tensors)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_stored_tensor_has_the_role_of_its_module(architecture: str, checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints[architecture])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[architecture])
    assert found.layers == 2
    assert found.other == ()
    assert {tensor.stored for tensor in found.tensors} == set(Checkpoint.open(checkpoints[architecture]).tensors)
    for tensor in found.tensors:
        module = model.get_submodule(tensor.module)
        assert tuple(weight_view(model, tensor).shape) == tensor.shape
        # Conv1D of GPT-2 holds [inputs, outputs].
        assert tensor.transposed == (type(module).__name__ == "Conv1D" and tensor.part == "weight")
        assert found.role_of(tensor.stored) == tensor.label
    assert found.role_of("no.such.tensor") == "other"


@pytest.mark.parametrize(
    ("architecture", "family", "stored", "dtype"),
    [
        ("sharded_llama", "llama", DOWN, "BF16"),
        ("gpt2", "gpt2", "transformer.h.1.mlp.c_proj.weight", "F32"),
        ("gpt2_without_prefix", "gpt2", "h.1.mlp.c_proj.weight", "F16"),
    ],
)
def test_families_and_prefixes(
    architecture: str, family: str, stored: str, dtype: str, checkpoints: dict[str, Path]
) -> None:
    found = structure(checkpoints[architecture])
    assert found.family.name == family
    (down,) = found.select(["mlp.down"], [1])
    assert (down.stored, down.layer, down.part, down.dtype) == (stored, 1, "weight", dtype)
    assert down.shape == ((32, 64) if family == "llama" else (128, 32))
    assert down.parameters == down.shape[0] * down.shape[1]


@pytest.mark.parametrize("architecture", ["tied_llama", "gpt2", "gpt2_without_prefix"])
def test_tied_head_is_edited_once_under_the_stored_name(architecture: str, checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints[architecture])
    assert found.tied == {"lm_head": "embed"}
    assert "lm_head" not in found.roles
    (embed,) = found.select(["embed"])
    assert embed.stored in Checkpoint.open(checkpoints[architecture]).tensors
    assert found.select(["lm_head"]) == [embed]
    assert found.select(["embed", "lm_head"]) == [embed]


def test_separate_head_is_a_tensor_of_its_own(checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints["sharded_llama"])
    assert found.tied == {}
    assert [tensor.stored for tensor in found.select(["lm_head"])] == ["lm_head.weight"]


def test_stored_copy_of_a_tied_head_keeps_its_role(checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["sharded_llama"])
    found = detect({**config, "tie_word_embeddings": True}, tensors)
    assert found.tied == {}
    # Both copies move together: apart, transformers would not tie them any more.
    for role in ("lm_head", "embed"):
        names = {tensor.stored for tensor in found.select([role])}
        assert names == {"lm_head.weight", "model.embed_tokens.weight"}


def test_gpt2_is_tied_unless_its_config_says_otherwise(checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["gpt2"])
    config.pop("tie_word_embeddings", None)
    assert detect(config, tensors).tied == {"lm_head": "embed"}
    with pytest.raises(DamagedError, match=r"lm_head\.weight"):
        detect({**config, "tie_word_embeddings": False}, tensors)


def test_tensors_without_a_role_are_listed(checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["sharded_llama"])
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    found = detect(config, {**tensors, extra: replace(tensors[DOWN], name=extra)})
    assert found.other == (extra,)
    assert found.role_of(extra) == "other"


@pytest.mark.parametrize("model_type", ["quillformer", "gpt3", None])
def test_unknown_model_type_lists_what_is_supported(model_type: str | None, checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["sharded_llama"])
    with pytest.raises(UnsupportedError) as caught:
        detect({**config, "model_type": model_type}, tensors)
    assert caught.value.exit_code == 4
    assert str(model_type or "model_type") in caught.value.what
    for family in load_families():
        for name in family.model_types:
            assert name in caught.value.why
            assert find_family({"model_type": name}) == family


@pytest.mark.parametrize("missing", [DOWN, "model.norm.weight", "lm_head.weight"])
def test_missing_tensor_is_named(missing: str, checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["sharded_llama"])
    del tensors[missing]
    with pytest.raises(DamagedError) as caught:
        detect(config, tensors)
    assert caught.value.exit_code == 8
    assert missing in caught.value.what


def test_fewer_blocks_than_announced_are_damage(checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["gpt2_without_prefix"])
    # Names are those of this file: without the prefix.
    with pytest.raises(DamagedError, match=r"6 tensors are missing, first h\.2\.ln_1\.weight") as caught:
        detect({**config, "n_layer": 3}, tensors)
    assert "3 layers" in caught.value.why


@pytest.mark.parametrize("layers", [None, 0, -1, "2", 2.0, True])
def test_unusable_number_of_blocks_is_damage(layers: object, checkpoints: dict[str, Path]) -> None:
    config, tensors = parts(checkpoints["sharded_llama"])
    with pytest.raises(DamagedError, match="num_hidden_layers"):
        detect({**config, "num_hidden_layers": layers}, tensors)


def test_names_of_another_family_are_unsupported(checkpoints: dict[str, Path]) -> None:
    llama, _ = parts(checkpoints["sharded_llama"])
    _, tensors = parts(checkpoints["gpt2"])
    for stored in (tensors, {}):
        with pytest.raises(UnsupportedError, match="do not belong to a llama model") as caught:
            detect(llama, stored)
        assert caught.value.exit_code == 4


def test_selection(checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints["gpt2"])
    linear = found.select(["linear"])
    assert {tensor.role for tensor in linear} == {"attn.qkv", "attn.o", "mlp.up", "mlp.down"} <= set(LINEAR_ROLES)
    assert [tensor.layer for tensor in linear] == [0] * 4 + [1] * 4
    # Biases move only where everything does.
    assert all(tensor.part == "weight" for tensor in linear)
    assert {tensor.stored for tensor in found.select(["all"])} == {tensor.stored for tensor in found.tensors}
    assert {tensor.layer for tensor in found.select(["all"], [1])} == {1}
    assert {tensor.label for tensor in found.select(["all"], [0])} >= {"mlp.up", "mlp.up.bias", "norm.attn.bias"}
    assert found.select(["mlp.up", "linear"], [0]) == found.select(["linear"], [0])


def test_selection_errors(checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints["sharded_llama"])
    with pytest.raises(UsageError, match=r"unknown role 'mlp\.dwn'") as caught:
        found.select(["mlp.dwn"])
    assert "mlp.down" in caught.value.why
    # A role of another family is unknown here.
    with pytest.raises(UsageError, match=r"attn\.qkv"):
        found.select(["attn.qkv"])
    for layer in (2, -1):
        with pytest.raises(UsageError, match=f"layer {layer} does not exist") as caught:
            found.select(["linear"], [0, layer])
        assert caught.value.exit_code == 2
        assert "0 to 1" in caught.value.why
    with pytest.raises(NoEffectError, match="embed") as nothing:
        found.select(["embed"], [0])
    assert nothing.value.exit_code == 5
    assert "mlp.down" in nothing.value.why
