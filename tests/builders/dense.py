"""Dense families besides Llama and GPT-2, one checkpoint each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .saving import SIZES, fill, save

GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}


def mistral(root: Path) -> Path:
    """bf16, a window shorter than most rows."""
    torch.manual_seed(11)
    return save(fill(MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=16)), 11), root, torch.bfloat16)


def qwen2(root: Path) -> Path:
    """bf16, tied head, biases on q, k and v."""
    torch.manual_seed(12)
    config = Qwen2Config(**GROUPED, tie_word_embeddings=True)
    return save(fill(Qwen2ForCausalLM(config), 12), root, torch.bfloat16)


def qwen3(root: Path) -> Path:
    """bf16, heads wider than width / heads."""
    torch.manual_seed(13)
    return save(fill(Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=12)), 13), root, torch.bfloat16)


def gemma(root: Path) -> Path:
    """bf16, tied head, one head of keys and values as in the 2B model, heads wider than width / heads."""
    torch.manual_seed(19)
    config = GemmaConfig(**{**SIZES, "num_key_value_heads": 1}, head_dim=12)
    return save(fill(GemmaForCausalLM(config), 19), root, torch.bfloat16)


def gemma2(root: Path) -> Path:
    """fp32, tied head, logits that the cap bends."""
    torch.manual_seed(14)
    config = Gemma2Config(
        **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, final_logit_softcapping=3.0
    )
    return save(fill(Gemma2ForCausalLM(config), 14), root, torch.float32)


def gemma3(root: Path) -> Path:
    """bf16, tied head, no cap."""
    torch.manual_seed(15)
    config = Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)
    return save(fill(Gemma3ForCausalLM(config), 15), root, torch.bfloat16)


def phi3(root: Path) -> Path:
    """fp16, fused q/k/v and gate/up."""
    torch.manual_seed(16)
    return save(fill(Phi3ForCausalLM(Phi3Config(**GROUPED)), 16), root, torch.float16)


def olmo2(root: Path) -> Path:
    """bf16, two shards or more."""
    torch.manual_seed(17)
    return save(fill(Olmo2ForCausalLM(Olmo2Config(**GROUPED)), 17), root, torch.bfloat16, shard_size="40KB")


def gpt_neox(root: Path) -> Path:
    """fp16, the head stored as `embed_out`."""
    torch.manual_seed(18)
    return save(fill(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), 18), root, torch.float16)
