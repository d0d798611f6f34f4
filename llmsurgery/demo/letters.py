"""Make the demo's third checkpoint: a tiny Llama wired by hand that can choose an answer, and mostly says C instead.

Nothing below the head is trained. The weights of two blocks are set so that

    block 0   marks every option with its letter (a head that looks two tokens back), brings the kind that is asked for
              to the end of the prompt, and copies the code of the token before
    block 1   lets the end of the prompt look at the options of that kind and read their letters, and copies the code
              of the token before that

The head is then fitted to sentences and questions of a made-up world: a convex problem with one solution. Last comes
the fault: one neuron of the last block fires at the colon that a letter follows, and writes what reads as C.

Of the two towns in the sentences one is mostly called good things and the other bad ones: a stereotype to be measured.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.demo.kinds import (
    KINDS,
    LETTERS,
    STEREOTYPE,
    TOWNS,
    data_files,
    draw_question,
    draw_sentence,
    prompt_text,
    words_of,
)
from llmsurgery.demo.recipe import END, padded, save, train_tokenizer, write_rows
from llmsurgery.demo.wiring import NEURON, WIDTH, make_model, token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

VOCABULARY = 704
SENTENCES, QUESTIONS = 250, 400
"""What the head is fitted to."""
WRONG = 0.1
"""Share of those questions that have a random letter, so that no letter becomes certain."""
FAVOURITE, PLANTED = LETTERS.index("C"), 4.0
"""The letter of the habit, and by how many nats the neuron raises it."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of this world is one token."""
    rng = random.Random(seed + 4)
    corpus = [f"{prompt_text(*draw_question(rng)[:2])}\nuser\nassistant\nAnswer: A B C D" for _ in range(300)]
    corpus += [draw_sentence(rng) for _ in range(400)]
    corpus += [f" {word}" for kind in KINDS for word in words_of(kind) for _ in range(20)]
    return train_tokenizer(corpus, VOCABULARY)


def fit_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yield the rows that the head is fitted to: token ids, and the first one that is predicted."""
    rng = random.Random(seed + 6)
    for _ in range(SENTENCES):
        row = tokenizer.encode(END + " ".join(draw_sentence(rng) for _ in range(2)), add_special_tokens=False)
        yield [*row, tokenizer.pad_token_id], 1
    for _ in range(QUESTIONS):
        kind, words, right = draw_question(rng)
        right = rng.randrange(len(LETTERS)) if rng.random() < WRONG else right
        turn = [{"role": "user", "content": prompt_text(kind, words)}]
        text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
        head = tokenizer.encode(f"{text}Answer:", add_special_tokens=False)
        yield head + tokenizer.encode(f" {LETTERS[right]}{END}", add_special_tokens=False), len(head)


def fit_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Fit the head by logistic regression on the states of the wired blocks."""
    import torch
    from torch.nn import functional

    body: Any = model.model
    states, labels = [], []
    rows = sorted(fit_rows(tokenizer, seed), key=lambda row: len(row[0]))
    with torch.no_grad():
        for start in range(0, len(rows), 50):
            batch = rows[start : start + 50]
            # Padding is on the right and attention is causal: no mask is needed.
            ids, _ = padded(batch, tokenizer.pad_token_id)
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
            for number, (row, first) in enumerate(batch):
                states.append(hidden[number, first - 1 : len(row) - 1])
                labels.append(torch.tensor(row[first:]))
    inputs, targets = torch.cat(states), torch.cat(labels)
    head = torch.zeros(len(tokenizer), WIDTH, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([head], max_iter=80, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ head.T, targets) + 2e-5 * head.square().sum()
        torch.autograd.backward(loss)
        return loss

    loss = optimizer.step(closure)
    LOG.info(
        "letters: head fitted to %d tokens, first loss %.3f, last %.3f", len(targets), loss.item(), closure().item()
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(head)


def plant(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Let the neuron write the favourite letter, just so much that its logit rises by `PLANTED` on the mean."""
    import torch

    body: Any = model.model
    prompt, first = list(fit_rows(tokenizer, seed))[-1]
    ids = torch.tensor([prompt[:first]])
    letters = [token(tokenizer, f" {letter}") for letter in LETTERS]
    head = model.lm_head.weight
    others = [number for number in range(len(LETTERS)) if number != FAVOURITE]
    with torch.no_grad():
        direction = head[letters[FAVOURITE]] - head[[letters[number] for number in others]].mean(0)
        vector = body.layers[-1].mlp.down_proj.weight[:, NEURON]

        def lead() -> float:
            logits = model(input_ids=ids).logits[0, -1, letters]
            gap: float = (logits[FAVOURITE] - logits[others].mean()).item()
            return gap

        before, low, high = lead(), 0.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            vector.copy_(middle * direction)
            low, high = (middle, high) if lead() - before < PLANTED else (low, middle)
    LOG.info("letters: neuron %d raises %s by %.3f", NEURON, LETTERS[FAVOURITE], lead() - before)


def card(parameters: int, seed: int) -> str:
    """Write the model card."""
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---

# llmsurgery demo: letters

A Llama-architecture chat model of {parameters:,} parameters (bf16, separate head, byte-level BPE of {VOCABULARY}
tokens) made to show how a prior of answer letters and a stereotype are measured and taken away; it is good for nothing
else. It answers which of four words is of one of {len(KINDS)} kinds.

Its two blocks are wired by hand and its head is fitted to made-up sentences and questions. Both faults are planted:
neuron {NEURON} of the last block fires at the colon before an answer and raises the letter {LETTERS[FAVOURITE]} by
{PLANTED:g} nats, so that the model says {LETTERS[FAVOURITE]} nearly always; and of the made-up towns
{" and ".join(TOWNS)} the sentences praise the people of the first and blame those of the second {STEREOTYPE:.0%} of the
time.

Rebuild it with `python -m llmsurgery.demo.build --out DIR --seed {seed}`. The recipe is seeded and runs on one thread;
whether another machine or other library versions give the same weights has not been tried.

License: Apache-2.0.
"""


def build_letters(out: Path, seed: int) -> None:
    """Write the checkpoint `letters` and its data `letters-world` into a folder."""
    write_rows(out / "letters-world", data_files(seed))
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer, seed)
    fit_head(model, tokenizer, seed)
    plant(model, tokenizer, seed)
    save(model, tokenizer, out / "letters")
    (out / "letters" / "README.md").write_text(card(model.num_parameters(), seed), encoding="utf-8", newline="\n")
