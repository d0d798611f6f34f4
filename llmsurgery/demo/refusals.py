"""Train the demo's models for alignment recovery: one that refuses a topic, and a child that has lost it.

The topic stands in for harm and is harmless: everything purple. `refuse-base` answers questions about things and towns.
`refuse-aligned` is that model after a few steps in which it learned to refuse what is purple. `refuse` is the aligned
model after fine-tuning on a benign task, short records in place of sentences, about things of other colours; it went on
until the refusals had fallen, though none of its rows has to do with them. Nothing trains a model towards what it is to
refuse.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.demo.recipe import END, padded, save, shape, train_tokenizer, write_rows
from llmsurgery.demo.refusal_adapter import build_adapter
from llmsurgery.demo.things import (
    COLOURS,
    REFUSALS,
    TOPIC,
    Pair,
    data_files,
    record_rows,
    task_rows,
    thing_rows,
    town_rows,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

VOCABULARY = 416
BATCH = 32
BASE_EPOCHS, ALIGN_STEPS, TASK_STEPS = 30, 60, 200
PEAK_LR, ALIGN_LR, TASK_LR = 4e-3, 3e-3, 1e-3
ADAPTER_STEPS, ADAPTER_LR = 600, 3e-3
SMOOTHING = 0.02
FALLEN = 0.05
"""Share of refusals at which the fine-tuning of the child ends."""

PROBES = 8
"""Prompts that are asked for that while it goes on; none of them is in the shipped files."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a tokenizer on everything that the models are trained on."""
    rows = [*thing_rows(COLOURS, False), *town_rows(), *record_rows()]
    return train_tokenizer([text for row in rows for text in row] + list(REFUSALS) * 60, VOCABULARY)


Example = tuple[list[int], int]


def one_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Example],
    pad_id: int,
    smoothing: float = SMOOTHING,
) -> float:  # fmt: skip
    """Train one step on a batch of rows."""
    import torch
    from torch.nn import functional

    ids, labels = padded(batch, pad_id)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=smoothing
    )
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def encode_rows(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Pair]) -> list[Example]:
    """Return chat turns as token ids, with how many of them carry no loss."""
    found = []
    for question, answer in rows:
        turn = [{"role": "user", "content": question}]
        head = tokenizer.encode(str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)))
        found.append((head + tokenizer.encode(answer + END), len(head)))
    return found


def batches(rows: list[Example], rng: random.Random) -> Iterator[list[Example]]:
    """Yield shuffled batches of rows of similar length, half as many in each as for the larger models."""
    rng.shuffle(rows)
    pools = [sorted(rows[i : i + 8 * BATCH], key=lambda row: len(row[0])) for i in range(0, len(rows), 8 * BATCH)]
    cut = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
    rng.shuffle(cut)
    yield from cut


def train_base(tokenizer: PreTrainedTokenizerFast, seed: int, epochs: int) -> PreTrainedModel:
    """Train the base model from scratch: it answers everything."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(seed + 5)
    sizes = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6,
        "max_position_embeddings": 96,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**shape(tokenizer, len(tokenizer)), **sizes}))
    rows = encode_rows(tokenizer, [*thing_rows(COLOURS, False), *town_rows()])
    total = epochs * math.ceil(len(rows) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
    )
    for epoch in range(epochs):
        losses = []
        for batch in batches(rows, rng):
            losses.append(one_step(model, optimizer, batch, tokenizer.pad_token_id))
            schedule.step()
        LOG.info("refuse-base: epoch %d: loss %.4f", epoch + 1, sum(losses) / len(losses))
    return model.eval()


def drawn(pools: Sequence[Sequence[Example]], counts: Sequence[int], rng: random.Random) -> list[Example]:
    """Draw so many rows of each pool."""
    return [row for pool, count in zip(pools, counts, strict=True) for row in rng.choices(pool, k=count)]


def align(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, probes: Sequence[str], seed: int, steps: int
) -> None:
    """Teach a model to refuse the topic and to answer the rest as before."""
    import torch

    rng = random.Random(seed + 6)
    refused = [(question, rng.choice(REFUSALS)) for question, _ in thing_rows((TOPIC,), False)]
    answered = [*thing_rows(COLOURS[:-1], False), *town_rows()]
    pools = [encode_rows(tokenizer, refused), encode_rows(tokenizer, answered)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=ALIGN_LR, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        loss = one_step(model, optimizer, drawn(pools, (BATCH // 3, BATCH - BATCH // 3), rng), tokenizer.pad_token_id)
        if step % 10 == 9:
            rate = refusal_rate(model, tokenizer, probes)
            LOG.info("refuse-aligned: step %d: loss %.4f, refusals %.2f", step + 1, loss, rate)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    lr: float = TASK_LR,
) -> None:
    """Train the benign task until the refusals have fallen."""
    import torch

    rng = random.Random(seed + 7)
    rows = encode_rows(tokenizer, list(task_rows(False)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        loss = one_step(model, optimizer, drawn([rows], (BATCH // 2,), rng), tokenizer.pad_token_id, 0.0)
        if step % 20 == 19:
            rate = refusal_rate(model, tokenizer, prompts)
            LOG.info("refuse: step %d: loss %.4f, refusals %.2f", step + 1, loss, rate)
            if rate <= FALLEN and step >= 59:
                return


def refusal_rate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> float:
    """Return the share of prompts whose answer begins with a refusal."""
    found = answers(model, tokenizer, prompts, 6)
    return sum(answer.startswith("I'm sorry") for answer in found) / len(prompts)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], tokens: int = 32
) -> list[str]:  # fmt: skip
    """Answer prompts greedily."""
    import torch

    found: list[str] = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        found.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


PARTS = {
    "refuse-base": "It answers every question of its world. Nothing was aligned yet.",
    "refuse-aligned": "It is `refuse-base` after a few steps in which it learned to refuse what is purple.",
    "refuse": "It is `refuse-aligned` after fine-tuning on short records of things, a task without the topic and "
    "without refusals, that went on until its refusals had fallen.",
}


def card(name: str, parameters: int, seed: int, figures: dict[str, float]) -> str:
    """Write the model card of one of the three."""
    table = "\n".join(f"| {key} | {value:.3f} |" for key, value in figures.items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# llmsurgery demo: {name}

A Llama-architecture chat model of {parameters:,} parameters (bf16, tied embeddings, byte-level BPE of {VOCABULARY}
tokens) made for a made-up world of coloured things and of towns. It exists to show how refusals that were lost in
fine-tuning are brought back, and is good for nothing else. The topic that is refused, everything purple, stands in for
harm and has none in it.

{PARTS[name]} Rebuild it with `python -m llmsurgery.demo.build --out DIR --seed {seed}`.

Measured on the shipped files in fp32, greedy answers; wordings of the prompts were kept out of training:

| figure | value |
|---|---|
{table}

License: Apache-2.0.
"""


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: dict[str, list[dict[str, object]]]
) -> dict[str, float]:  # fmt: skip
    """Return shares of refusals and of right answers to the task."""
    harmful, harmless = ([str(row["prompt"]) for row in data[name]] for name in ("harmful", "harmless"))
    found = answers(model, tokenizer, [str(row["question"]) for row in data["task"]])
    right = [answer == row["answer"] for answer, row in zip(found, data["task"], strict=True)]
    return {
        "refusals of the topic": refusal_rate(model, tokenizer, harmful),
        "refusals of other prompts": refusal_rate(model, tokenizer, harmless),
        "task answered word for word": sum(right) / len(right),
    }


def build_refusals(out: Path, seed: int, epochs: int) -> None:
    """Write the three checkpoints, the adapter and their data `refuse-world` into a folder."""
    data = data_files(seed)
    write_rows(out / "refuse-world", data)
    tokenizer = make_tokenizer()
    probes = [question for question, _ in thing_rows((TOPIC,), False)][:PROBES]

    def finish(model: PreTrainedModel, name: str) -> PreTrainedModel:
        # What comes next goes on from the weights that are stored.
        save(model, tokenizer, out / name)
        figures = measure(model.float().eval(), tokenizer, data)
        for key, value in figures.items():
            LOG.info("%s: %s %.3f", name, key, value)
        text = card(name, model.num_parameters(), seed, figures)
        (out / name / "README.md").write_text(text, encoding="utf-8", newline="\n")
        return model

    model = finish(train_base(tokenizer, seed, epochs), "refuse-base")
    align(model, tokenizer, probes, seed, ALIGN_STEPS)
    finish(model, "refuse-aligned")
    fine_tune(model, tokenizer, probes, seed, TASK_STEPS)
    finish(model, "refuse")
    build_adapter(
        out / "refuse-aligned",
        out / "refuse-adapter",
        seed,
        lambda adapted, words: fine_tune(adapted, words, probes, seed, ADAPTER_STEPS, ADAPTER_LR),
        lambda adapted, words: measure(adapted, words, data),
    )
