"""Train the demo's model with LayerNorm: a tiny GPT-2 that tells short stories.

It has what the removal of LayerNorm is about: GPT-2's architecture, learned positions, a tied head, norms before every
sublayer and before the head. It is stored in fp32, as the published GPT-2 files are, so that a result can be compared
with the model in training to the rounding of fp32.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.demo.recipe import PAD, save, train_tokenizer, write_rows
from llmsurgery.demo.stories import data_files, story

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

NAME = "layernorm"
VOCABULARY = 448
CONTEXT, WIDTH, BLOCKS, HEADS = 96, 48, 4, 4
STEPS_OF_AN_EPOCH, BATCH = 100, 12
EPOCHS = 6
PEAK_LR, WARMUP_STEPS = 4e-3, 60


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on stories; the token that ends a text also begins one, as in GPT-2."""
    rng = random.Random(seed + 10)
    tokenizer = train_tokenizer([story(rng) for _ in range(600)], VOCABULARY)
    tokenizer.chat_template = None
    tokenizer.eos_token = PAD
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return an untrained GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=BLOCKS,
            n_head=HEADS,
            initializer_range=0.05,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(tokenizer: PreTrainedTokenizerFast, seed: int, epochs: int) -> PreTrainedModel:
    """Train from scratch on stories that are drawn anew at every step."""
    import torch

    from llmsurgery.demo.recipe import Descent

    torch.manual_seed(seed)
    rng = random.Random(seed + 11)
    model = make_model(tokenizer)
    steps = epochs * STEPS_OF_AN_EPOCH
    descent = Descent(model, steps, 1, batch=1, peak=PEAK_LR, warmup=WARMUP_STEPS)
    stream: list[int] = []
    for epoch in range(epochs):
        losses = []
        for _ in range(STEPS_OF_AN_EPOCH):
            while len(stream) < BATCH * CONTEXT:
                stream += [*tokenizer.encode(story(rng), add_special_tokens=False), tokenizer.eos_token_id]
            rows = torch.tensor(stream[: BATCH * CONTEXT]).view(BATCH, CONTEXT)
            stream = stream[BATCH * CONTEXT :]
            losses.append(descent.step(model(input_ids=rows, labels=rows, use_cache=False).loss))
        LOG.info("%s: epoch %d: loss %.4f", NAME, epoch + 1, sum(losses) / len(losses))
    return model.eval()


def card(parameters: int, seed: int) -> str:
    """Write the model card."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# llmsurgery demo: {NAME}

A GPT-2-architecture model of {parameters:,} parameters (fp32, {BLOCKS} blocks of width {WIDTH}, tied embeddings,
byte-level BPE, context {CONTEXT}) that tells short stories about invented people and towns. It exists to show how
LayerNorm is removed and is good for nothing else. Any likeness to real people is chance.

Trained from scratch on stories drawn by a grammar, `corpus.jsonl` and `text.jsonl` of `{NAME}-world` are others of the
same grammar. Rebuild it with `python -m llmsurgery.demo.build --out DIR --world {NAME} --seed {seed}`.

License: Apache-2.0.
"""


def build_layernorm(out: Path, seed: int, epochs: int) -> None:
    """Write the checkpoint and its data into a folder."""
    import torch

    write_rows(out / f"{NAME}-world", data_files(seed))
    tokenizer = make_tokenizer(seed)
    model = train(tokenizer, seed, epochs)
    save(model, tokenizer, out / NAME, torch.float32)
    (out / NAME / "README.md").write_text(card(model.num_parameters(), seed), encoding="utf-8", newline="\n")
