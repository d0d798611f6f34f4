"""What methods that act on answer letters have in common: their questions as tokens, and the settings of a fold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmsurgery.errors import UsageError
from llmsurgery.train.config import option

if TYPE_CHECKING:
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.mcq import Choices
    from llmsurgery.evaluate.letters import LetterScores, LetterSet
    from llmsurgery.methods.base import Operation

BATCH_ROWS = 8
ROUTES = ("auto", "head-bias", "norm", "least-squares", "sequence-bias")
"""Where offsets go; see `label_offsets`."""


@dataclass(frozen=True)
class FoldConfig:
    """How offsets of letters are made and put into the checkpoint."""

    strength: float = option(1.0, "share of the offsets that is applied", minimum=0, maximum=1)
    cap: float = option(4.0, "largest offset of a letter, in nats", minimum=0)
    route: str = option("auto", "where the offsets go; auto: the first exact place, else least squares", ROUTES)
    min_rho: float = option(0.9, "route=least-squares: smallest quality that is accepted", minimum=0, maximum=1)
    untie: str = option("auto", "store a tied head separately: auto, if it misses", ("auto", "always", "never"))


def check_target(target: Sequence[float], options: int) -> None:
    """Check the shares of the letters that are aimed at; none at all stand for equal ones.

    Raises:
        UsageError: They are no distribution over the letters.
    """
    if target and (len(target) != options or min(target) <= 0 or abs(sum(target) - 1) > 1e-3):
        shares = ",".join([f"{1 / options:.3g}"] * options)
        raise UsageError(
            f"target_prior is no distribution over {options} letters",
            "it needs one positive share for each, with the sum 1",
            f"use --set target_prior={shares}, say",
        )


def encode_given(encoder: Encoder, choices: Choices, template: str, items: int = 0) -> LetterSet:
    """Encode the questions that a method learns from, the first `items` of them.

    Raises:
        InputError: The template is unusable.
        UnsupportedError: A letter is no single token.
    """
    from llmsurgery.data.mcq import first_questions, read_template
    from llmsurgery.evaluate.letters import encode_letters

    return encode_letters(encoder, first_questions(choices, items), read_template(template))


def ask_given(operation: Operation, data: LetterSet, keep_states: bool = True) -> LetterScores:
    """Return what the model says to the questions that the method learns from."""
    from llmsurgery.evaluate.letters import score_letters

    return score_letters(operation.model, data, operation.encoder.pad_id, BATCH_ROWS, operation.progress, keep_states)


def cyclic_subset(data: LetterSet, items: int) -> LetterSet:
    """Return the first questions of a set, all their orders."""
    count = min(items, len(data.questions))
    return replace(data, questions=data.questions[:count], prompts=data.prompts[: count * len(data.letters)])


def named(letters: str, values: Iterable[float]) -> dict[str, float]:
    """Return numbers by letter."""
    return {letter: float(value) for letter, value in zip(letters, values, strict=True)}
