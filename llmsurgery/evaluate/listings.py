"""Does the order of the options decide? Multiple choice by a model's own attention and by position-invariant inference.

Both read the very same tokens: the text before the options, each line of an option, and the text behind them, tokenized
apart (see `llmsurgery.compute.position_invariant`). Each question of n options is asked in two ways:

    orders      letters stay in their places and options move, as for `mcq.accuracy`: n cyclic orders. Answers change
                by the position of an option and by the letter before it
    listings    every option keeps its letter and whole lines move: n cyclic listings. Answers change by position alone

Figures, `pine.` for position-invariant inference; their detail `causal` is the model's own attention on these tokens:

    pine.accuracy, pine.rstd    as `mcq.accuracy` and `mcq.rstd`
    pine.order_flips            share of questions whose chosen option is not the same in all orders. What is left of it
                                is the prior of the letters, which calibration takes away (`debias --method pride`)
    pine.listing_flips          the same over listings; nothing but rounding can make it more than 0
    mcq.listing_flips           the same by the model's own attention
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import read_head
from llmsurgery.compute.position_invariant import invariant_states
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.segments import Segments
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.choices import Question
from llmsurgery.data.collate import length_buckets
from llmsurgery.data.mcq import Choices, option_lines, rotated
from llmsurgery.errors import InputError
from llmsurgery.evaluate.intervals import Figure, mean_figure, resampled_interval
from llmsurgery.evaluate.letters import (
    Numbers,
    chosen_options,
    flips_figure,
    hits_of,
    last_states,
    letter_log_probabilities,
    recall_spread,
    render_lines,
    sequence_offsets,
)

PLACE = "\N{SYMBOL FOR UNIT SEPARATOR}options\N{SYMBOL FOR UNIT SEPARATOR}"
"""Stands for the options while a prompt is rendered."""


@dataclass(frozen=True)
class ListingSet:
    """Questions with their options apart.

    Attributes:
        questions: The questions.
        prompts: Each question's n orders, then the listings of its first order but the first one.
        tokens: Tokens of each letter.
        shortened: Prompts that lost their first tokens.
    """

    questions: tuple[Question, ...]
    prompts: list[list[Segments]]
    tokens: tuple[tuple[int, ...], ...]
    shortened: int = 0

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """Number of the right option of each question [questions]."""
        return np.array([question.answer for question in self.questions])


def encode_listings(
    encoder: Encoder, choices: Choices, template: str, tokens: tuple[tuple[int, ...], ...]
) -> ListingSet:
    """Encode questions in every order and listing.

    Args:
        encoder: The model's encoder.
        choices: The questions.
        template: How they are asked.
        tokens: Tokens of each letter; see `llmsurgery.evaluate.letters.letter_tokens`.

    Raises:
        InputError: No token is left of what stands before the options.
    """
    prompts, shortened = [], 0
    for question in choices.questions:
        found = []
        for order in range(choices.options):
            options = rotated(question.choices, order)
            prompt, cut = split_prompt(encoder, template, question.question, options, question.where)
            found.append(prompt)
            shortened += cut
        places = list(range(choices.options))
        found += [found[0].reordered([*places[number:], *places[:number]]) for number in places[1:]]
        prompts.append(found)
    return ListingSet(choices.questions, prompts, tokens, shortened)


def split_prompt(
    encoder: Encoder, template: str, question: str, options: Sequence[str], where: str
) -> tuple[Segments, bool]:
    """Return a question as prefix, lines of options and suffix, and whether the prefix lost tokens.

    Lines end in a line feed each, the last one too: it is taken from what follows the options where it has one.

    Raises:
        InputError: As for `encode_listings`.
    """
    text = render_lines(encoder, template, question, PLACE, where)
    prefix, found, suffix = text.partition(PLACE)
    if not found or not prefix:
        raise InputError(
            f"{where}: nothing stands before the options",
            "segments need something before them, at least a line of instruction",
            "put the question, or a sentence, before {options} in the template",
        )
    lines = [tuple(encoder.text_ids(f"{line}\n")) for line in option_lines(options)]
    tail = tuple(encoder.text_ids(suffix.removeprefix("\n")))
    room = sum(map(len, lines)) + len(tail)
    encoded, lost = encoder.encode_plain_prompt(prefix, room, where)
    return Segments(encoded.ids, tuple(lines), tail), lost > 0


@torch.inference_mode()
def listing_figures(
    model: PreTrainedModel, data: ListingSet, pad_id: int, batch_size: int, progress: Progress
) -> dict[str, Figure]:
    """Ask every question in both ways and by both kinds of attention.

    Args:
        model: A causal language model in eval mode, with rotary positions.
        data: The questions.
        pad_id: Token id for padding.
        batch_size: Rows per forward of the model's own attention; position-invariant prompts go one by one.
        progress: Told of every batch.

    Returns:
        The figures named above.
    """
    flat = [prompt for prompts in data.prompts for prompt in prompts]
    own, found = np.empty((2, len(flat), len(data.tokens)))
    head, offsets = read_head(model), sequence_offsets(model)
    rows = [Encoded(prompt.ids, len(prompt.ids), False) for prompt in flat]
    batches = list(length_buckets(rows, batch_size))
    with progress.task("asking for letters in every listing", len(batches) + len(flat)) as advance:
        for indices in batches:
            states = last_states(model, [rows[i] for i in indices], pad_id)
            own[indices] = letter_log_probabilities(states, head, data.tokens, offsets)
            advance(1)
        for number, prompt in enumerate(flat):
            states = invariant_states(model, prompt)[-1:]
            found[number] = letter_log_probabilities(states, head, data.tokens, offsets)
            advance(1)
    shape = (len(data.questions), -1, len(data.tokens))
    return order_figures(own.reshape(shape), found.reshape(shape), data)


def order_figures(own: Numbers, found: Numbers, data: ListingSet) -> dict[str, Figure]:
    """Return the figures.

    Args:
        own: Scores by the model's own attention [questions, orders + further listings, letters].
        found: The same by position-invariant inference.
        data: The questions.
    """
    orders = len(data.tokens)
    hits, causal = (hits_of(scores[:, :orders], data.answers)[0] for scores in (found, own))
    flips, own_flips = (chosen_options(scores[:, :orders]) for scores in (found, own))
    listed, own_listed = (_in_listings(scores, orders) for scores in (found, own))
    detail: dict[str, object] = {"shortened_prompts": data.shortened, "forwards": found.shape[0] * found.shape[1]}
    return {
        "mcq.listing_flips": flips_figure(own_listed),
        "pine.accuracy": mean_figure(hits.mean(1).tolist(), detail | {"causal": float(causal.mean())}),
        "pine.rstd": Figure(
            recall_spread(hits),
            len(hits),
            resampled_interval(lambda draw: recall_spread(hits[draw(len(hits))])),
            {"causal": recall_spread(causal)},
        ),
        "pine.order_flips": flips_figure(flips, {"causal": flips_figure(own_flips).value}),
        "pine.listing_flips": flips_figure(listed, {"causal": flips_figure(own_listed).value}),
    }


def _in_listings(scores: Numbers, orders: int) -> npt.NDArray[np.int64]:
    """Return the letters chosen in every listing of the first order [questions, listings]."""
    numbers: Iterable[int] = (0, *range(orders, scores.shape[1]))
    return np.asarray(scores[:, list(numbers)].argmax(-1))
