"""Llama in two layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .saving import SIZES, save


def llama_config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


def sharded_llama(root: Path) -> Path:
    """bf16, five shards, separate head."""
    torch.manual_seed(1)
    return save(LlamaForCausalLM(llama_config(tied=False)), root, torch.bfloat16, shard_size="18KB")


def tied_llama(root: Path) -> Path:
    """bf16, one file, head tied to the embedding and not stored."""
    torch.manual_seed(2)
    return save(LlamaForCausalLM(llama_config(tied=True)), root, torch.bfloat16)
