"""Tiny checkpoints made in milliseconds, one builder per architecture and layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from .tokenizer import byte_tokenizer

VOCABULARY = 262
Builder = Callable[[Path], Path]


def save(model: PreTrainedModel, root: Path, dtype: torch.dtype, shards: bool = False) -> Path:
    """Write a model with tokenizer and card as stock transformers would."""
    size = "40KB" if shards else "1GB"
    model.to(dtype).save_pretrained(root, max_shard_size=size)
    byte_tokenizer().save_pretrained(root)
    (root / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# tiny model\n")
    return root


def llama_config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=256,
    )


def sharded_llama(root: Path) -> Path:
    """bf16, five shards or so, separate head."""
    torch.manual_seed(1)
    return save(LlamaForCausalLM(llama_config(tied=False)), root, torch.bfloat16, shards=True)


def tied_llama(root: Path) -> Path:
    """bf16, one file, head tied to the embedding and not stored."""
    torch.manual_seed(2)
    return save(LlamaForCausalLM(llama_config(tied=True)), root, torch.bfloat16)


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


BUILDERS: dict[str, Builder] = {
    "sharded_llama": sharded_llama,
    "tied_llama": tied_llama,
    "gpt2": gpt2,
    "gpt2_without_prefix": gpt2_without_prefix,
}
