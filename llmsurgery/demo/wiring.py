"""The blocks of the demo's third checkpoint, wired by hand; `llmsurgery.demo.letters` says what they do."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsurgery.demo.kinds import KINDS, LETTERS, words_of
from llmsurgery.demo.recipe import shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WIDTH, HEADS, CODE, NEURONS = 128, 4, 32, 32
NEURON = 7
"""The neuron that fires at the colon."""

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
