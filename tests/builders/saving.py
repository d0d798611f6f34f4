"""How every builder writes its checkpoint, and what their configs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .tokenizer import byte_tokenizer

VOCABULARY = 262
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 256,
}
"""Names that most configs of transformers share."""


def save(model: PreTrainedModel, root: Path, dtype: torch.dtype, shard_size: str = "1GB") -> Path:
    """Write a model with tokenizer and card as stock transformers would, in files of at most `shard_size`."""
    model.to(dtype).save_pretrained(root, max_shard_size=shard_size)
    byte_tokenizer().save_pretrained(root)
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# tiny model\n")
    return root


def fill(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give norms, biases and buffers values of their own; as made they are all ones or zeros and hide mistakes."""
    draw = torch.Generator().manual_seed(seed)
    stored = dict(model.state_dict())
    with torch.no_grad():
        for tensor in stored.values():
            if tensor.ndim == 1:
                tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
    return model
