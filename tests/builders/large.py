"""A Llama that is large where nobody looks: blocks of zeros, which take no disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS = 24


def write_large(root: Path, vocabulary: int = 64, positions: int = 64) -> LlamaForCausalLM:
    """Write a Llama of 24 blocks, all but the last of them zeros without disk; return one of that last block alone.

    Args:
        root: Directory to write config and weights into, in bf16; no tokenizer is written.
        vocabulary: Size of the vocabulary.
        positions: Longest sequence.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
        "num_key_value_heads": 8, "max_position_embeddings": positions, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(**settings, num_hidden_layers=1)).to(torch.bfloat16).eval()
    LlamaConfig(**settings, num_hidden_layers=BLOCKS, architectures=["LlamaForCausalLM"]).save_pretrained(root)
    tensors = {name: tensor for name, tensor in small.state_dict().items() if name != "lm_head.weight"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    filled, end = [], 0
    for name, tensor in tensors.items():
        numbers = range(BLOCKS) if ".0." in name else [0]
        for number in numbers:
            start, end = end, end + 2 * tensor.numel()
            stored = name.replace(".0.", f".{number}.")
            header[stored] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
            if number == numbers[-1]:
                filled.append((start, tensor))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (root / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start, tensor in filled:
            file.seek(8 + len(head) + start)
            file.write(tensor.contiguous().view(torch.int16).numpy().tobytes())
        file.truncate(8 + len(head) + end)
    return small
