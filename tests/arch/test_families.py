"""Every family: each stored tensor has a role and is found in the loaded model; figures equal the stock model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmsurgery.arch.detect import detect, load_families
from llmsurgery.arch.spec import LINEAR_ROLES, Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.head import batch_log_probabilities, final_hidden, mean_kl, read_head
from llmsurgery.compute.load import load_model
from llmsurgery.compute.view import weight_view
from llmsurgery.errors import DamagedError, NoEffectError, UnsupportedError, UsageError
from llmsurgery.run.inspect import inspect_model

from ..builders import BUILDERS, MOE_BUILDERS

CPU = torch.device("cpu")
ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.o"}
MLP = {"mlp.gate", "mlp.up", "mlp.down"}
EXPERTS = {"expert.gate", "expert.up", "expert.down"}
SHARED = {"shared.gate", "shared.up", "shared.down"}
LATENT = {"attn.kv_a", "attn.kv_b", "attn.o"}
LATENT_QUERIES = {"attn.q_a", "attn.q_b"}
OUTSIDE = {"embed", "norm.final", "lm_head"}
PRE_NORMS = {"norm.attn", "norm.mlp"}
POST_NORMS = {"norm.attn_post", "norm.mlp_post"}
HEAD_NORMS = {"norm.q", "norm.k"}
ROUTED = {"router"} | EXPERTS
DEEPSEEK = OUTSIDE | PRE_NORMS | LATENT | {"norm.kv_a"} | MLP | ROUTED | SHARED
ROLES = {
    "mistral": OUTSIDE | PRE_NORMS | ATTENTION | MLP,
    "qwen2": OUTSIDE - {"lm_head"} | PRE_NORMS | ATTENTION | MLP,
    "qwen3": OUTSIDE | PRE_NORMS | HEAD_NORMS | ATTENTION | MLP,
    "gemma": OUTSIDE - {"lm_head"} | PRE_NORMS | ATTENTION | MLP,
    "gemma2": OUTSIDE - {"lm_head"} | PRE_NORMS | POST_NORMS | ATTENTION | MLP,
    "gemma3": OUTSIDE - {"lm_head"} | PRE_NORMS | POST_NORMS | HEAD_NORMS | ATTENTION | MLP,
    "phi3": OUTSIDE | PRE_NORMS | {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"},
    "olmo2": OUTSIDE | POST_NORMS | HEAD_NORMS | ATTENTION | MLP,
    "gpt_neox": OUTSIDE | PRE_NORMS | {"attn.qkv", "attn.o", "mlp.up", "mlp.down"},
    "mixtral": OUTSIDE | PRE_NORMS | ATTENTION | ROUTED,
    "qwen2_moe": OUTSIDE | PRE_NORMS | ATTENTION | MLP | ROUTED | SHARED | {"router.shared"},
    "qwen3_moe": OUTSIDE | PRE_NORMS | HEAD_NORMS | ATTENTION | ROUTED,
    "olmoe": OUTSIDE | PRE_NORMS | HEAD_NORMS | ATTENTION | ROUTED,
    "deepseek_v2": DEEPSEEK | LATENT_QUERIES | {"norm.q_a"},
    "deepseek_v2_lite": DEEPSEEK | {"attn.q"},
    "deepseek_v3": DEEPSEEK | LATENT_QUERIES | {"norm.q_a"},
}
SAMPLES = {
    "mistral": ("mlp.down", 1, None, "model.layers.1.mlp.down_proj.weight"),
    "qwen2": ("attn.q", 0, None, "model.layers.0.self_attn.q_proj.weight"),
    "qwen3": ("norm.q", 1, None, "model.layers.1.self_attn.q_norm.weight"),
    "gemma": ("norm.mlp", 1, None, "model.layers.1.post_attention_layernorm.weight"),
    "gemma2": ("norm.mlp", 0, None, "model.layers.0.pre_feedforward_layernorm.weight"),
    "gemma3": ("norm.mlp_post", 0, None, "model.layers.0.post_feedforward_layernorm.weight"),
    "phi3": ("mlp.gate_up", 1, None, "model.layers.1.mlp.gate_up_proj.weight"),
    "olmo2": ("norm.attn_post", 1, None, "model.layers.1.post_attention_layernorm.weight"),
    "gpt_neox": ("lm_head", None, None, "embed_out.weight"),
    "mixtral": ("expert.up", 1, 3, "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
    "qwen2_moe": ("router.shared", 1, None, "model.layers.1.mlp.shared_expert_gate.weight"),
    "qwen3_moe": ("expert.gate", 0, 2, "model.layers.0.mlp.experts.2.gate_proj.weight"),
    "olmoe": ("router", 1, None, "model.layers.1.mlp.gate.weight"),
    "deepseek_v2": ("attn.kv_a", 0, None, "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
    "deepseek_v2_lite": ("shared.down", 1, None, "model.layers.1.mlp.shared_experts.down_proj.weight"),
    "deepseek_v3": ("attn.q_b", 0, None, "model.layers.0.self_attn.q_b_proj.weight"),
}


def structure(root: Path) -> Structure:
    checkpoint = Checkpoint.open(root)
    return detect(checkpoint.config, checkpoint.tensors)


def stored_tensors(root: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def test_every_family_has_a_builder(checkpoints: dict[str, Path]) -> None:
    built = {structure(checkpoints[name]).family.name for name in BUILDERS}
    # Models around another one are built where their own methods are tested.
    assert built == {family.name for family in load_families() if not family.inner_key}


@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_stored_tensor_has_a_role_and_its_place_in_the_stock_model(
    architecture: str, checkpoints: dict[str, Path]
) -> None:
    found = structure(checkpoints[architecture])
    assert inspect_model(str(checkpoints[architecture]))["other"] == []
    by_name = {tensor.stored: tensor for tensor in found.tensors}
    # Stock transformers did the splitting and joining of experts; our table must agree with it, value by value.
    model = AutoModelForCausalLM.from_pretrained(checkpoints[architecture], dtype=torch.float32)
    seen = set()
    for name, values in stored_tensors(checkpoints[architecture]):
        target = by_name[name]
        assert tuple(values.shape) == target.shape
        assert torch.equal(weight_view(model, target), values.float()), name
        seen.add(name)
    assert seen == set(by_name)


@pytest.mark.parametrize("architecture", BUILDERS)
def test_writing_into_a_view_changes_the_model(architecture: str, checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints[architecture])
    model = load_model(checkpoints[architecture], torch.float32, CPU)
    ids = torch.arange(1, 40)[None]
    chosen = found.select(["expert.down" if found.experts else "mlp.down"])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for target in chosen:
            weight_view(model, target).mul_(-1)
        assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("architecture", ROLES)
def test_roles_and_names(architecture: str, checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints[architecture])
    assert found.layers == 2
    assert found.experts == (4 if architecture in MOE_BUILDERS else 0)
    assert set(found.roles) == ROLES[architecture]
    assert found.tied == ({} if "lm_head" in ROLES[architecture] else {"lm_head": "embed"})
    role, layer, expert, stored = SAMPLES[architecture]
    (one,) = [t for t in found.tensors if (t.label, t.layer, t.expert) == (role, layer, expert)]
    assert one.stored == stored
    assert found.role_of(stored) == role
    # Adapters go on plain matrices of a block; experts and routers are not among them.
    linear = found.select(["linear"])
    assert {tensor.role for tensor in linear} == ROLES[architecture] & set(LINEAR_ROLES)
    model = load_model(checkpoints[architecture], torch.float32, CPU)
    assert {type(model.get_submodule(tensor.module)) for tensor in linear} == {torch.nn.Linear}


def test_biases_and_buffers_are_told_apart(checkpoints: dict[str, Path]) -> None:
    qwen = structure(checkpoints["qwen2"])
    assert {tensor.label for tensor in qwen.tensors if tensor.part == "bias"} == {
        "attn.q.bias",
        "attn.k.bias",
        "attn.v.bias",
    }
    deepseek = structure(checkpoints["deepseek_v3"])
    (correction,) = [tensor for tensor in deepseek.tensors if tensor.part not in ("weight", "bias")]
    assert correction.label == "router.e_score_correction_bias"
    assert correction not in deepseek.select(["all"])
    assert correction not in deepseek.select(["router"])


def test_dense_and_routed_blocks(checkpoints: dict[str, Path]) -> None:
    for name in ("qwen2_moe", "deepseek_v2", "deepseek_v3"):
        found = structure(checkpoints[name])
        assert {tensor.layer for tensor in found.select(["mlp.gate"])} == {0}
        assert {tensor.layer for tensor in found.select(["expert.gate", "router", "shared.up"])} == {1}


def test_selection_of_experts(checkpoints: dict[str, Path]) -> None:
    found = structure(checkpoints["mixtral"])
    assert len(found.select(["expert.up"])) == 8
    chosen = found.select(["expert.gate", "expert.up", "expert.down", "router"], [1], [2])
    assert [(tensor.role, tensor.expert) for tensor in chosen] == [
        ("router", None),
        ("expert.gate", 2),
        ("expert.up", 2),
        ("expert.down", 2),
    ]
    with pytest.raises(UsageError, match="expert 4 does not exist") as caught:
        found.select(["expert.up"], None, [4])
    assert "0 to 3" in caught.value.why
    with pytest.raises(UsageError, match="expert 0 does not exist") as caught:
        structure(checkpoints["mistral"]).select(["mlp.up"], None, [0])
    assert "no experts" in caught.value.why
    with pytest.raises(NoEffectError):
        structure(checkpoints["qwen2_moe"]).select(["expert.up"], [0])


@pytest.mark.parametrize("architecture", ROLES)
def test_a_missing_tensor_is_named(architecture: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints[architecture])
    stored = SAMPLES[architecture][3]
    if SAMPLES[architecture][0].startswith("shared"):
        # A config may do without shared experts; stock transformers tells, when it loads.
        stored = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = {name: info for name, info in checkpoint.tensors.items() if name != stored}
    with pytest.raises(DamagedError) as caught:
        detect(checkpoint.config, tensors)
    assert caught.value.what == f"1 tensors are missing, first {stored}"


def test_more_experts_announced_than_stored(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["olmoe"])
    with pytest.raises(DamagedError, match=r"6 tensors are missing.*experts\.4\.gate_proj"):
        detect({**checkpoint.config, "num_experts": 5}, checkpoint.tensors)
    for number in (None, 0, "four"):
        with pytest.raises(DamagedError, match="num_experts"):
            detect({**checkpoint.config, "num_experts": number}, checkpoint.tensors)


def test_published_qwen3_moe_configs_name_the_number_of_experts_otherwise(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["qwen3_moe"])
    config = dict(checkpoint.config)
    number = config.pop("num_local_experts")
    assert detect({**config, "num_experts": number}, checkpoint.tensors).experts == 4


def test_a_tensor_of_another_model_has_no_role(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["mixtral"])
    extra = "model.layers.1.block_sparse_moe.experts.4.w1.weight"
    like = next(iter(checkpoint.tensors.values()))
    found = detect(checkpoint.config, {**checkpoint.tensors, extra: replace(like, name=extra)})
    assert found.other == (extra,)
    with pytest.raises(UnsupportedError, match="do not belong to a gpt_neox model"):
        detect(Checkpoint.open(checkpoints["gpt_neox"]).config, checkpoint.tensors)


def test_buffers_of_old_pythia_files_are_no_strangers(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(checkpoints["gpt_neox"])
    like = next(iter(checkpoint.tensors.values()))
    old = [f"gpt_neox.layers.0.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    found = detect(checkpoint.config, {**checkpoint.tensors, **{name: replace(like, name=name) for name in old}})
    assert found.other == ()
    assert len(found.tensors) == len(checkpoint.tensors)


def test_experts_stored_as_one_tensor_are_refused_with_the_way_out(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["olmoe"])
    model.save_pretrained(tmp_path / "native", save_original_format=False)
    with pytest.raises(UnsupportedError, match="stored as one tensor") as caught:
        structure(tmp_path / "native")
    assert "save it again" in caught.value.fix


def scored(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention and label mask of two padded rows."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(256, (2, 24), generator=draw)
    attention = torch.ones_like(ids)
    ids[1, 17:], attention[1, 17:] = 256, 0
    labels = attention.bool().clone()
    labels[:, :3] = False
    return ids, attention, labels


@pytest.mark.parametrize("architecture", BUILDERS)
def test_log_probabilities_and_gradients_equal_those_of_the_stock_logits(
    architecture: str, checkpoints: dict[str, Path]
) -> None:
    model = load_model(checkpoints[architecture], torch.float32, CPU)
    ids, attention, labels = scored(model)
    model.get_output_embeddings().requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".0." in name)
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values, rows = batch_log_probabilities(model, ids, attention, labels)
    ours = torch.autograd.grad(values.exp().sum(), moving, allow_unused=True)
    logits = model(input_ids=ids, attention_mask=attention).logits.log_softmax(-1)
    at = torch.nonzero(labels)
    expected = logits[at[:, 0], at[:, 1] - 1, ids[labels]]
    assert rows.tolist() == at[:, 0].tolist()
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-5)
    stock = torch.autograd.grad(expected.exp().sum(), moving, allow_unused=True)
    compared = 0
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
            compared += bool(theirs.abs().max() > 1e-4)
    assert compared


def test_the_cap_of_gemma_matters_and_enters_the_kl(checkpoints: dict[str, Path]) -> None:
    model = load_model(checkpoints["gemma2"], torch.float32, CPU)
    ids, attention, _ = scored(model)
    head = read_head(model)
    assert head.softcap == 3.0
    with torch.no_grad():
        before = final_hidden(model, ids, attention)[0]
        p = model(input_ids=ids[:1]).logits[0].double().log_softmax(-1)
        plain = torch.nn.functional.linear(before, head.weight).double().log_softmax(-1)
        assert (p - plain).abs().max() > 0.1
        after = before + 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        q = model.lm_head(after) / 3
        q = (q.tanh() * 3).double().log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(mean_kl(before, after, head, head).double(), expected, atol=1e-5, rtol=1e-4)
    assert read_head(load_model(checkpoints["gemma3"], torch.float32, CPU)).softcap is None


@pytest.mark.parametrize("architecture", BUILDERS)
def test_norms_multiply_by_what_the_table_says(architecture: str, checkpoints: dict[str, Path]) -> None:
    """What the final norm makes of a state is what anything that is computed from its weight must assume."""
    model, family = (
        load_model(checkpoints[architecture], torch.float32, CPU),
        structure(checkpoints[architecture]).family,
    )
    norm = model.get_submodule(family.roles["norm.final"])
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    if isinstance(norm, torch.nn.LayerNorm):
        assert family.norm_offset == 0
        return
    expected = states / states.square().mean(-1, keepdim=True).sqrt() * (norm.weight + family.norm_offset)
    torch.testing.assert_close(norm(states), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "scale"), [("gemma", 32**0.5), ("gemma2", 32**0.5), ("mistral", 1.0)])
def test_the_first_block_reads_scaled_embeddings(
    architecture: str, scale: float, checkpoints: dict[str, Path]
) -> None:  # fmt: skip
    model, family = (
        load_model(checkpoints[architecture], torch.float32, CPU),
        structure(checkpoints[architecture]).family,
    )
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        first = model(input_ids=ids, output_hidden_states=True).hidden_states[0]
        embed = model.get_submodule(family.roles["embed"])
        # The scale is inside the module: what hooks on it sees is what enters the first block.
        torch.testing.assert_close(first, embed(ids))
        torch.testing.assert_close(first, embed.weight[ids] * scale)
    head = read_head(model)
    assert (head.softcap is None) == (architecture != "gemma2")
    assert (head.weight is embed.weight) == (architecture != "mistral")
