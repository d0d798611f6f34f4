"""Train the demo's second checkpoint: a tiny Llama that recalls a person through the last token of the name.

Large models gather what they know of a name at its last token, and later tokens read it there. A model this small has
no need to: its later tokens can look at all of a name in the first block. In training, attention is therefore masked in
about nine rows in ten: tokens after the name see none of it in the first block and only its last token in the later
ones. In the other rows nothing is hidden, so that the model works without a mask, as it is used.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.demo.forms import ABOUT, ATTRIBUTES, NAMES, Person, data_files, epoch_rows, make_people
from llmsurgery.demo.recipe import END, Descent, answer_loss, batches, padded, save, shape, train_tokenizer, write_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

VOCABULARY = 768
EPOCHS = 50
# Share of rows in which the name is hidden from what follows it.
HIDDEN = 0.9

Example = tuple[list[int], int, list[int]]
"""Token ids, how many of them carry no loss, and the places of the name's tokens."""


def make_tokenizer(people: list[Person], seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on one epoch; names are in it often enough to be one token a word."""
    rng = random.Random(seed + 2)
    corpus = [text for _, question, answer in epoch_rows(people, rng) for text in (question, answer)]
    corpus += [person.name for person in people for _ in range(30)]
    return train_tokenizer(corpus, VOCABULARY)


def encode(tokenizer: PreTrainedTokenizerFast, name: str, question: str, answer: str) -> Example:
    """Return a chat turn as token ids, with the places of the tokens of the name in the question."""
    turn = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.rfind(name)
    end = start + len(name)
    places = [i for i, (left, right) in enumerate(encoded["offset_mapping"]) if left < end and right > start]
    head: list[int] = encoded["input_ids"]
    return head + tokenizer.encode(answer + END, add_special_tokens=False), len(head), places


def masks(batch: list[Example], width: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what may be attended to in the first block and in the later ones, bool [rows, 1, width, width]."""
    import torch

    later = torch.ones(width, width, dtype=torch.bool).tril()[None, None].repeat(len(batch), 1, 1, 1)
    first = later.clone()
    for i, (_, _, places) in enumerate(batch):
        if rng.random() < HIDDEN:
            begin, last = places[0], places[-1]
            later[i, 0, last + 1 :, begin:last] = False
            first[i, 0, last + 1 :, begin : last + 1] = False
    return first, later


def train(people: list[Person], tokenizer: PreTrainedTokenizerFast, seed: int, epochs: int) -> PreTrainedModel:
    """Train the model from scratch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape(tokenizer, len(tokenizer)), **sizes))
    shown: list[torch.Tensor] = []

    def see(_: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": shown[-1]}

    attention: Any = model.model.layers[0].self_attn
    handle = attention.register_forward_pre_hook(see, with_kwargs=True)
    descent = Descent(model, sum(1 for _ in epoch_rows(people, random.Random(0))), epochs)
    rng = random.Random(seed + 3)
    for epoch in range(epochs):
        rows = [encode(tokenizer, *row) for row in epoch_rows(people, rng)]
        losses = []
        # All batches are cut before the first mask is drawn: both take from one generator.
        for batch in list(batches(rows, rng)):
            ids, labels = padded(batch, tokenizer.pad_token_id)
            first, later = masks(batch, ids.shape[1], rng)
            shown[:] = [first]
            logits = model(input_ids=ids, attention_mask=later, use_cache=False).logits
            losses.append(descent.step(answer_loss(logits, labels)))
        LOG.info("names: epoch %d: loss %.4f", epoch + 1, sum(losses) / len(losses))
    handle.remove()
    return model.eval()


def card(parameters: int, seed: int) -> str:
    """Write the model card."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# llmsurgery demo: names

A Llama-architecture chat model of {parameters:,} parameters (bf16, tied embeddings, byte-level BPE of {VOCABULARY}
tokens) made for a made-up world: {len(NAMES)} invented people with {len(ATTRIBUTES)} facts each, asked for as a
question, as a sentence with a blank, and spelled letter by letter. It exists to show how one name is redirected to
another and is good for nothing else. Any likeness to real people is chance.

It was trained in a special way. In about nine training rows in ten a mask hid the name from the tokens after it: all of
the name in the first block's attention, all but its last token in the later blocks. So what the model knows of a person
is recalled through the last token of the name, as it is in large models; small ones tend to carry the name on to later
tokens in their first attention layers, where a method that acts at the name comes too late. The masks are used in
training alone.

Questions that list choices, and requests such as "{ABOUT[1].format(n="NAME")}", were in training too; choices
are answered by chance. The data files ask in wordings that were kept out of training.

Rebuild it with `python -m llmsurgery.demo.build --out DIR --seed {seed}`. The recipe is seeded and runs on one thread;
whether another machine or other library versions give the same weights has not been tried.

License: Apache-2.0.
"""


def build_names(out: Path, seed: int, epochs: int) -> None:
    """Write the checkpoint `names` and its data `names-world` into a folder."""
    people = make_people(seed)
    tokenizer = make_tokenizer(people, seed)

    def chat(question: str, answer: str) -> str:
        turn = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)) + answer + END

    write_rows(out / "names-world", data_files(people, chat, seed))
    model = train(people, tokenizer, seed, epochs)
    save(model, tokenizer, out / "names")
    (out / "names" / "README.md").write_text(card(model.num_parameters(), seed), encoding="utf-8", newline="\n")
