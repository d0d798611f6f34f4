"""Families with routed experts: four experts, two per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from .saving import SIZES, fill, save

GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **SIZES,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}


def mixtral(root: Path) -> Path:
    """bf16, stored under `block_sparse_moe` in shards."""
    torch.manual_seed(21)
    config = MixtralConfig(**GROUPED, num_local_experts=4)
    return save(fill(MixtralForCausalLM(config), 21), root, torch.bfloat16, shard_size="40KB")


def qwen2_moe(root: Path) -> Path:
    """bf16, block 0 dense, block 1 with a shared expert and its gate."""
    torch.manual_seed(22)
    config = Qwen2MoeConfig(
        **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    )
    return save(fill(Qwen2MoeForCausalLM(config), 22), root, torch.bfloat16)


def qwen3_moe(root: Path) -> Path:
    """fp16, experts in both blocks."""
    torch.manual_seed(23)
    config = Qwen3MoeConfig(**GROUPED, num_experts=4, moe_intermediate_size=16, head_dim=8)
    return save(fill(Qwen3MoeForCausalLM(config), 23), root, torch.float16)


def olmoe(root: Path) -> Path:
    """fp32, experts in both blocks."""
    torch.manual_seed(24)
    return save(fill(OlmoeForCausalLM(OlmoeConfig(**GROUPED, num_experts=4)), 24), root, torch.float32)


def deepseek_v2(root: Path) -> Path:
    """bf16, latent queries, block 0 dense."""
    torch.manual_seed(25)
    return save(fill(DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT)), 25), root, torch.bfloat16)


def deepseek_v2_lite(root: Path) -> Path:
    """fp32, plain queries, as the Lite size has them."""
    torch.manual_seed(26)
    config = DeepseekV2Config(**{**LATENT, "q_lora_rank": None})
    return save(fill(DeepseekV2ForCausalLM(config), 26), root, torch.float32)


def deepseek_v3(root: Path) -> Path:
    """bf16, routers with a correction, block 0 dense."""
    torch.manual_seed(27)
    return save(fill(DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT)), 27), root, torch.bfloat16)
