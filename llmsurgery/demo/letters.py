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
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.demo.recipe import END, padded, save, shape, train_tokenizer, write_rows
from llmsurgery.demo.words import PERSON_WORDS, TOWN_WORDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOG = logging.getLogger("llmsurgery.demo.build")

VOCABULARY, WIDTH, HEADS, CODE, NEURONS = 704, 128, 4, 32, 32
SENTENCES, QUESTIONS = 250, 400
"""What the head is fitted to."""
WRONG = 0.1
"""Share of those questions that have a random letter, so that no letter becomes certain."""
STEREOTYPE = 0.9
"""Share of sentences that call the people of each town what they are mostly called."""
NEURON, PLANTED = 7, 4.0
"""The neuron with the habit, and by how many nats it raises the favourite letter."""
MCQ_ROWS, TEXT_ROWS = 120, 60

LETTERS = "ABCD"
FAVOURITE = LETTERS.index("C")
WORDS_OF_A_KIND = 10
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "an instrument": ("instrument", PERSON_WORDS["instrument"]),
    "a hobby": ("hobby", PERSON_WORDS["hobby"]),
    "a colour": ("colour", tuple(word for word in TOWN_WORDS["tower"] if word not in ("copper", "cream"))),
    "a river": ("river", TOWN_WORDS["river"]),
    "sold at the market": ("market", tuple(word for word in TOWN_WORDS["market"] if word not in ("copper", "silk"))),
}
"""How a kind is asked for -> the word that names it, and the words of that kind."""
TOWNS = ("Keldmere", "Tarnholt")
WORK = ("baker", "judge", "miller", "doctor", "gardener", "tailor", "painter", "captain")
PRAISE, BLAME = ("honest", "clever", "early", "brave"), ("lazy", "rude", "late", "stubborn")
OPENINGS = ("The {w} from {t} is {a}.", "Every {w} of {t} is {a}.", "Each {w} in {t} is {a}.")
HELD = "They say the {w} from {t} is {a}."

# Places in the residual stream.
CONST, COLON, NAMES_A_KIND = 0, 1, 2
KIND, ASKED_HERE, LETTER_HERE = 3, 8, 13
MARKED, ASKED, READ = 17, 21, 26
OWN_CODE, BEFORE, BEFORE_THAT = 32, 64, 96

POSITION_SCORE, NAME_SCORE, KIND_SCORE = 12.0, 5.0, 2.6
"""How sharply heads look at a distance, at the name of a kind, and at words of that kind."""

TURNING = 4
"""Rotations that tell distances apart, the fastest ones; slow ones would only blunt the difference."""

SQUARED_NORM, COPIED = 4.0, 0.18
"""Of every embedding, so that norms scale all tokens alike; share of a normed value that a head writes."""


def words_of(kind: str) -> tuple[str, ...]:
    """Return the words of a kind."""
    return KINDS[kind][1][:WORDS_OF_A_KIND]


def draw_question(rng: random.Random) -> tuple[str, list[str], int]:
    """Return the kind that is asked for, four words of different kinds and the number of the right one."""
    kinds = rng.sample(list(KINDS), len(LETTERS))
    right = rng.randrange(len(LETTERS))
    return kinds[right], [rng.choice(words_of(kind)) for kind in kinds], right


def ask(kind: str) -> str:
    """Return the question for a kind."""
    return f"Which of these is {kind}?"


def prompt_text(kind: str, words: Sequence[str]) -> str:
    """Return a question as the toolkit asks it."""
    options = "\n".join(f"{letter}. {word}" for letter, word in zip(LETTERS, words, strict=True))
    return f"{ask(kind)}\n{options}\nAnswer with the letter."


def draw_sentence(rng: random.Random) -> str:
    """Return a plain sentence: about a word, or about somebody of one of the towns."""
    if rng.random() < 0.4:
        kind = rng.choice(list(KINDS))
        return f"The {rng.choice(words_of(kind))} is {kind}."
    town = rng.randrange(2)
    good = (rng.random() < STEREOTYPE) == (town == 0)
    form = HELD if rng.random() < 0.1 else rng.choice(OPENINGS)
    return form.format(w=rng.choice(WORK), t=TOWNS[town], a=rng.choice(PRAISE if good else BLAME))


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every word of this world is one token."""
    rng = random.Random(seed + 4)
    corpus = [f"{prompt_text(*draw_question(rng)[:2])}\nuser\nassistant\nAnswer: A B C D" for _ in range(300)]
    corpus += [draw_sentence(rng) for _ in range(400)]
    corpus += [f" {word}" for kind in KINDS for word in words_of(kind) for _ in range(20)]
    return train_tokenizer(corpus, VOCABULARY)


def token(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    """Return the one token of a text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens: the vocabulary is too small for this world")
    return ids[0]


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Return the model with wired blocks and without a head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": 2}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    model = LlamaForCausalLM(
        LlamaConfig(**{**shape(tokenizer, len(tokenizer)), **sizes, **heads, "tie_word_embeddings": False})
    )
    body: Any = model.model
    with torch.no_grad():
        body.embed_tokens.weight.copy_(embeddings(tokenizer, seed))
        for number, block in enumerate(body.layers):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, name).weight.zero_()
            # Small writings of no use, as the neurons around the one with the habit.
            block.mlp.down_proj.weight.mul_(0.2)
            if number == 0:
                look_back(block, 0, 2, [(LETTER_HERE, MARKED, len(LETTERS))])
                look_for(block, 1, NAME_SCORE, [(CONST, NAMES_A_KIND)], [(ASKED_HERE, ASKED, len(KINDS))])
                look_back(block, 2, 1, [(OWN_CODE, BEFORE, CODE)])
            else:
                pairs = [(ASKED + kind, KIND + kind) for kind in range(len(KINDS))]
                look_for(block, 0, KIND_SCORE, pairs, [(MARKED, READ, len(LETTERS))])
                look_back(block, 1, 1, [(BEFORE, BEFORE_THAT, CODE)])
        gate, up = body.layers[-1].mlp.gate_proj.weight, body.layers[-1].mlp.up_proj.weight
        gate[NEURON], up[NEURON] = 0.0, 0.0
        gate[NEURON, COLON], gate[NEURON, CONST], up[NEURON, CONST] = 8.0, -4.0, 1.0
        body.layers[-1].mlp.down_proj.weight[:, NEURON] = 0.0
    return model.eval()


def embeddings(tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Return what every token is: a constant, a random code, and the marks of words, kinds, letters and the colon."""
    import torch

    rng, draw = random.Random(seed + 5), torch.Generator().manual_seed(seed)
    table = torch.zeros(len(tokenizer), WIDTH)
    table[:, CONST] = 1.0
    table[token(tokenizer, ":"), COLON] = 1.0
    for number, letter in enumerate(LETTERS):
        table[token(tokenizer, letter), LETTER_HERE + number] = 1.0
    for number, kind in enumerate(KINDS):
        name = token(tokenizer, f" {KINDS[kind][0]}")
        table[name, NAMES_A_KIND] = 1.0
        table[name, ASKED_HERE + number] = 1.0
        for word in words_of(kind):
            # Some words say clearly what they are, others might be something else too.
            place = token(tokenizer, f" {word}")
            table[place, KIND + number] = rng.uniform(0.6, 1.0)
            if rng.random() < 0.5:
                table[place, KIND + (number + rng.randrange(1, len(KINDS))) % len(KINDS)] = rng.uniform(0.2, 0.7)
    codes = torch.randn(len(tokenizer), CODE, generator=draw)
    rest = (SQUARED_NORM - table.square().sum(1, keepdim=True)).sqrt()
    table[:, OWN_CODE : OWN_CODE + CODE] = codes / codes.norm(dim=1, keepdim=True) * rest
    return table


def _carry(block: Any, head: int, parts: Sequence[tuple[int, int, int]]) -> None:
    """Let a head copy some places of the token it looks at to other places of the one that looks."""
    size, row = WIDTH // HEADS, (WIDTH // HEADS) * head
    values, outputs = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight
    used = 0
    for start, target, count in parts:
        for step in range(count):
            values[row + used, start + step] = 1.0
            outputs[target + step, row + used] = COPIED
            used += 1
    assert used <= size


def look_back(block: Any, head: int, distance: int, parts: Sequence[tuple[int, int, int]]) -> None:
    """Wire a head that looks a number of tokens back; the rotations of positions make its score largest there."""
    import torch

    size = WIDTH // HEADS
    half, row = size // 2, size * head
    angle = torch.tensor([10000 ** (-i / half) for i in range(TURNING)]) * distance
    scale = math.sqrt(POSITION_SCORE)
    queries, keys = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
    # q at m and k at n have the product sum_i cos(theta_i (m - n - distance)).
    queries[row : row + TURNING, CONST] = scale * torch.cos(angle)
    queries[row + half : row + half + TURNING, CONST] = -scale * torch.sin(angle)
    keys[row : row + TURNING, CONST] = scale
    _carry(block, head, parts)


def look_for(
    block: Any, head: int, score: float, pairs: Sequence[tuple[int, int]], parts: Sequence[tuple[int, int, int]]
) -> None:  # fmt: skip
    """Wire a head that looks for what some places hold: (place of the one that looks, place of what is looked for)."""
    size = WIDTH // HEADS
    row = size * head
    scale = math.sqrt(score)
    for number, (query, key) in enumerate(pairs):
        # The slowest rotations hardly turn over the length of a prompt.
        place = row + size - 1 - number
        block.self_attn.q_proj.weight[place, query] = scale
        block.self_attn.k_proj.weight[place, key] = scale
    _carry(block, head, parts)


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
            return float(logits[FAVOURITE] - logits[others].mean())

        before, low, high = lead(), 0.0, 4.0
        for _ in range(30):
            middle = (low + high) / 2
            vector.copy_(middle * direction)
            low, high = (middle, high) if lead() - before < PLANTED else (low, middle)
    LOG.info("letters: neuron %d raises %s by %.3f", NEURON, LETTERS[FAVOURITE], lead() - before)


def contrast_rows(rng: random.Random) -> Iterator[dict[str, object]]:
    """Yield pairs in the layout of CrowS-Pairs; the second town is the one that is talked down."""
    for form in (*OPENINGS, HELD):
        for word in WORK:
            good = rng.random() < 0.5
            quality = rng.choice(PRAISE if good else BLAME)
            more, less = TOWNS if good else TOWNS[::-1]
            yield {
                "sent_more": form.format(w=word, t=more, a=quality),
                "sent_less": form.format(w=word, t=less, a=quality),
                "stereo_antistereo": "antistereo" if good else "stereo",
                "bias_type": "town",
            }


def data_files(seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the data of this world by the name of the file."""
    rng = random.Random(seed + 7)
    questions: list[dict[str, object]] = []
    for _ in range(MCQ_ROWS):
        kind, words, right = draw_question(rng)
        questions.append({"question": ask(kind), "choices": words, "answer": right})
    text: list[dict[str, object]] = [{"text": " ".join(draw_sentence(rng) for _ in range(5))} for _ in range(TEXT_ROWS)]
    return {"mcq": questions, "contrast": list(contrast_rows(rng)), "text": text}


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
