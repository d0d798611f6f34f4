"""Tiny checkpoints made in milliseconds, one builder per architecture and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .dense import gemma, gemma2, gemma3, gpt_neox, mistral, olmo2, phi3, qwen2, qwen3
from .gpt2 import gpt2, gpt2_without_prefix
from .llama import sharded_llama, tied_llama
from .moe import deepseek_v2, deepseek_v2_lite, deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3_moe

Builder = Callable[[Path], Path]

MOE_BUILDERS: dict[str, Builder] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2_lite": deepseek_v2_lite,
    "deepseek_v3": deepseek_v3,
}

BUILDERS: dict[str, Builder] = {
    "sharded_llama": sharded_llama,
    "tied_llama": tied_llama,
    "gpt2": gpt2,
    "gpt2_without_prefix": gpt2_without_prefix,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "gpt_neox": gpt_neox,
    **MOE_BUILDERS,
}
