"""GPT-2 in two layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .saving import VOCABULARY, save


def gpt2(root: Path) -> Path:
    """fp32, transposed matrices, tied head, biases everywhere."""
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=257,
        eos_token_id=257,
        pad_token_id=256,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    return save(GPT2LMHeadModel(config), root, torch.float32)


def gpt2_without_prefix(root: Path) -> Path:
    """fp16, names without `transformer.`, as the published GPT-2 files have them."""
    from safetensors.torch import load_file, save_file

    gpt2(root)
    file = root / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = (root / "config.json").read_text().replace('"float32"', '"float16"')
    (root / "config.json").write_text(config)
    return root
