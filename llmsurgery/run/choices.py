"""What a debiasing is asked for: questions with options and contrasting texts, one part estimated on, one measured."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llmsurgery.data.asked import Asked
from llmsurgery.data.contrast import read_contrast
from llmsurgery.data.mcq import read_choices
from llmsurgery.data.pictured import read_pictured
from llmsurgery.methods.base import Method

MCQ, CONTRAST = "mcq", "contrast"
NAMES = (MCQ, CONTRAST)
"""Data that are no rows with an answer."""

T = TypeVar("T")


def read_asked(files: Mapping[str, Path], pictures: bool = False) -> Asked:
    """Read the questions and the contrasting texts among some files.

    Args:
        files: Data name -> path.
        pictures: Whether the questions are about pictures.

    Raises:
        InputError: A file is missing, empty or malformed.
    """
    if pictures:
        return Asked(pictured=read_pictured(files[MCQ]))
    choices = read_choices(files[MCQ]) if MCQ in files else None
    return Asked(choices, read_contrast(files[CONTRAST]) if CONTRAST in files else ())


def asked_needs(asked: Asked) -> set[str]:
    """Return the needs of metrics that are met."""
    found = {f"mcq:{letter}" for letter in asked.choices.letters} if asked.choices else set()
    found |= {MCQ} if asked.choices else set()
    found |= {"pictures"} if asked.pictured else set()
    return found | ({"stereotypes"} if any(row.stereotype is not None for row in asked.contrast) else set())


def split_asked(asked: Asked, method: Method, config: object, seed: int) -> tuple[Asked, Asked]:
    """Return what a method is given, and what the figures are measured on.

    Of a file that the method needs, a share `holdout` of the records is measured and the others are given to the
    method; of other files all records are measured.

    Args:
        asked: Everything.
        method: The method.
        config: Its config; without `holdout` it is given everything, and everything is measured.
        seed: Seed of the drawing.
    """
    share = float(getattr(config, "holdout", 0.0))
    given = measured = asked
    if MCQ in method.spec.needs and asked.choices is not None:
        first, second = _split(asked.choices.questions, share, seed)
        given = replace(given, choices=replace(asked.choices, questions=tuple(first)))
        measured = replace(measured, choices=replace(asked.choices, questions=tuple(second)))
    if asked.pictured is not None:
        some, others = _split(asked.pictured.questions, share, seed)
        given = replace(given, pictured=replace(asked.pictured, questions=tuple(some)))
        measured = replace(measured, pictured=replace(asked.pictured, questions=tuple(others)))
    if CONTRAST in method.spec.needs and asked.contrast:
        first_texts, second_texts = _split(asked.contrast, share, seed)
        if len({label for row in first_texts for label in row.labels}) > 1:
            given, measured = replace(given, contrast=first_texts), replace(measured, contrast=second_texts)
    return given, measured


def _split(members: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Return the members that are given and those that are measured, in their order; all of both for a share of 0."""
    if not share:
        return list(members), list(members)
    count = min(max(round(share * len(members)), 1), len(members) - 1)
    held = set(random.Random(seed).sample(range(len(members)), count))
    return (
        [one for number, one in enumerate(members) if number not in held],
        [one for number, one in enumerate(members) if number in held],
    )
