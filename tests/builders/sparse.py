"""Checkpoints of any size whose weights take no room: real headers, and files that are holes."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

SHARD_BYTES = 5 * 10**9


def sparse_llama(root: Path, layers: int, width: int, inner: int, heads: int, groups: int, vocabulary: int) -> Path:
    """bf16 Llama of the given shapes, in shards of 5 GB or less; all weights are zero."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    narrow = width // heads * groups
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        shapes |= {f"{prefix}self_attn.{part}_proj.weight": (narrow, width) for part in "kv"}
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(2 * prod(one) for one in (*shards[-1].values(), shape)) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    root.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, members in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {}
        place = 0
        for name, shape in members.items():
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + 2 * prod(shape)]}
            place += 2 * prod(shape)
        content = json.dumps(header).encode()
        with (root / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(content)) + content)
            stream.truncate(8 + len(content) + place)
        weight_map |= dict.fromkeys(members, file)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(config))
    return root


def llama_70b(root: Path) -> Path:
    """The shapes of Llama 3 70B: 141 GB."""
    return sparse_llama(root, 80, 8192, 28672, 64, 8, 128256)
