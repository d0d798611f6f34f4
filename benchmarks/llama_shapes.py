"""Write a checkpoint of random weights with the shapes and names of Llama 7B: 13.5 GB of bf16 in 3 shards.

    python -m benchmarks.llama_shapes DIRECTORY [--tokenizer FOLDER] [--small]

Matrices are cut out of one pool of random numbers, so that writing takes little time. A tokenizer of a larger
vocabulary is cut to the checkpoint's. `make_checkpoint` with holes writes files of any size whose weights take no room.
"""

from __future__ import annotations

import argparse
import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llmsurgery.checkpoint.dtypes import encode

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
SHARD_BYTES = 5 * 10**9
_BLOCK_ENTRIES = 1 << 22
POOL_ENTRIES = (1 << 26) + 1
"""Numbers that are drawn: more than a block matrix has. Drawing billions takes longer than writing them."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """Numbers that decide the shapes of a Llama; `groups` of `heads` share keys and values."""

    vocabulary: int = 32000
    width: int = 4096
    inner: int = 11008
    layers: int = 32
    heads: int = 32
    groups: int = 32
    shard_bytes: int = SHARD_BYTES

    def config(self) -> dict[str, object]:
        """Return the checkpoint's config."""
        return CONFIG | {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
        }


LLAMA_7B = Size()
LLAMA_70B = Size(128256, 8192, 28672, 80, 64, 8)
SMALL = Size(32000, 256, 688, 32, 8, 8, 35 * 10**6)


def llama_shapes(size: Size) -> Shapes:
    """Return name and shape of every stored tensor, in the order in which transformers stores them."""
    vocabulary, width, inner = size.vocabulary, size.width, size.inner
    narrow = width // size.heads * size.groups
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}self_attn.{part}_proj.weight": (narrow if part in "kv" else width, width) for part in "qkvo"
        }
        shapes |= {f"{prefix}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{prefix}{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def split_shards(shapes: Shapes, limit: int = SHARD_BYTES) -> list[Shapes]:
    """Fill shards in order, as transformers does, each up to the limit."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def write_header(stream: BinaryIO, shapes: Shapes) -> int:
    """Write the header of a safetensors file; return the bytes of data that are to follow."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    stream.write(struct.pack("<Q", len(content)) + content)
    return position


def draw_pool(count: int, seed: int) -> npt.NDArray[np.uint16]:
    """Return normal numbers of standard deviation 0.02 as bf16 bit patterns."""
    random = np.random.default_rng(seed)
    parts = []
    for start in range(0, count, _BLOCK_ENTRIES):
        values = random.standard_normal(min(_BLOCK_ENTRIES, count - start), dtype=np.float32)
        parts.append(encode(values * np.float32(0.02), "BF16"))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def write_values(stream: BinaryIO, shapes: Shapes, pool: npt.NDArray[np.uint16], random: np.random.Generator) -> None:
    """Write tensors: norms are one, everything else is cut out of the pool, each tensor from another place on."""
    for shape in shapes.values():
        if len(shape) == 1:
            stream.write(encode(np.ones(shape, np.float32), "BF16").tobytes())
            continue
        left, start = prod(shape), int(random.integers(len(pool)))
        while left:
            part = pool[start : start + left]
            stream.write(part.data)
            left, start = left - len(part), 0


def make_checkpoint(place: Path, size: Size = LLAMA_7B, seed: int = 0, holes: bool = False) -> None:
    """Write the checkpoint into a new directory.

    Args:
        place: The directory.
        size: Decides the shapes.
        seed: Of the weights.
        holes: Write no weights: the files are as long as they should be, and read as zeros.
    """
    place.mkdir(parents=True)
    shards = split_shards(llama_shapes(size), size.shard_bytes)
    weight_map: dict[str, str] = {}
    pool, random = draw_pool(0 if holes else POOL_ENTRIES, seed), np.random.default_rng(seed)
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (place / file).open("xb") as stream:
            data = write_header(stream, shapes)
            if holes:
                stream.truncate(stream.tell() + data)
            else:
                write_values(stream, shapes, pool, random)
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(2 * prod(shape) for shapes in shards for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (place / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (place / "config.json").write_text(json.dumps(size.config(), indent=2) + "\n")


def cut_tokenizer(source: Path, place: Path, vocabulary: int) -> None:
    """Copy a byte-pair tokenizer that was trained merge by merge, its last tokens left out.

    Args:
        source: Directory of the tokenizer.
        place: Directory of the checkpoint.
        vocabulary: Tokens that are kept, the first.
    """
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < vocabulary}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    (place / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (place / name).write_bytes((source / name).read_bytes())


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer")
    parser.add_argument("--small", action="store_true", help="the same number of layers, 71 MB in all")
    options = parser.parse_args()
    size = SMALL if options.small else LLAMA_7B
    make_checkpoint(options.directory, size)
    if options.tokenizer is not None:
        cut_tokenizer(options.tokenizer, options.directory, size.vocabulary)


if __name__ == "__main__":
    main()
