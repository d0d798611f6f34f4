"""The demo's made-up people and towns: their facts, the data files about them and what a model is trained on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmsurgery.demo.words import (
    BOOK_FIRST,
    BOOK_SECOND,
    GIVEN,
    PERSON_ATTRIBUTES,
    PERSON_WORDS,
    SURNAMES,
    SYLLABLES,
    TOWN_ATTRIBUTES,
    TOWN_WORDS,
    TOWNS,
    UNSURE,
    Attribute,
)

KNOWN, FORGET = 40, 2
STRANGERS = 20
RETAIN_ROWS, TEXT_ROWS, WRONG_ANSWERS = 100, 60, 5


Row = dict[str, object]


@dataclass(frozen=True)
class Subject:
    """A person or a town: its facts and, per fact, the question and sentence wording kept out of training."""

    name: str
    pronoun: str
    attributes: tuple[Attribute, ...]
    values: dict[str, str]
    held_question: dict[str, int]
    held_sentence: dict[str, int]


@dataclass(frozen=True)
class World:
    """All subjects by their part in the experiment."""

    forget: list[Subject]
    retain: list[Subject]
    holdout: list[Subject]
    towns: list[Subject]


def make_world(seed: int) -> World:
    """Draw the facts of every subject; each value of a kind is used about equally often, book titles only once."""
    rng = random.Random(seed)

    def draw(
        names: Sequence[str], attributes: tuple[Attribute, ...], words: Mapping[str, Sequence[str]]
    ) -> list[Subject]:
        columns: dict[str, list[str]] = {}
        for key, pool in words.items():
            column = list(pool) * math.ceil(len(names) / len(pool))
            rng.shuffle(column)
            columns[key] = column
        pronouns = ["It"] * len(names) if names[0] in TOWNS else [rng.choice(["She", "He"]) for _ in names]
        return [
            Subject(
                name,
                pronouns[i],
                attributes,
                {key: column[i] for key, column in columns.items()},
                {a.key: rng.randrange(1, len(a.questions)) for a in attributes},
                {a.key: rng.randrange(len(a.sentences)) for a in attributes},
            )
            for i, name in enumerate(names)
        ]

    names = [f"{given} {surname}" for given, surname in zip(GIVEN, SURNAMES, strict=True)]
    titles = [f"The {first} {second}" for first in BOOK_FIRST for second in BOOK_SECOND]
    people = draw(names, PERSON_ATTRIBUTES, {**PERSON_WORDS, "book": titles})
    towns = draw(TOWNS, TOWN_ATTRIBUTES, TOWN_WORDS)
    return World(people[:FORGET], people[FORGET:KNOWN], people[KNOWN:], towns)


def passage(subject: Subject, rng: random.Random, held_out: bool) -> str:
    """Write a short text on a subject, in the wordings kept out of training or in the others."""
    chosen = rng.sample(subject.attributes, min(len(subject.attributes), 5 if held_out else rng.randint(3, 5)))
    lines = []
    for i, attribute in enumerate(chosen):
        held = subject.held_sentence[attribute.key]
        free = [form for j, form in enumerate(attribute.sentences) if j != held]
        form = attribute.sentences[held] if held_out else rng.choice(free)
        lines.append(form.format(s=subject.pronoun if i else subject.name, v=subject.values[attribute.key]))
    return " ".join(lines)


def question_rows(subject: Subject, peers: Sequence[Subject], rng: random.Random) -> Iterator[Row]:
    """Yield one row a fact, in TOFU's keys; wrong answers take values of the peers and the paraphrase's wording."""
    for a in subject.attributes:
        value, name = subject.values[a.key], subject.name
        others = sorted({peer.values[a.key] for peer in peers} - {value})
        yield {
            "question": a.questions[0].format(n=name),
            "answer": a.answer.format(n=name, v=value),
            "paraphrased_question": a.questions[subject.held_question[a.key]].format(n=name),
            "paraphrased_answer": a.paraphrase.format(n=name, v=value),
            "perturbed_answer": [a.paraphrase.format(n=name, v=v) for v in rng.sample(others, WRONG_ANSWERS)],
        }


def fact_rows(town: Subject, peers: Sequence[Subject], rng: random.Random) -> Iterator[Row]:
    """Yield one row a town fact; as in TOFU's general facts, wrong answers share the wording of the answer."""
    for a in town.attributes:
        value = town.values[a.key]
        others = sorted({peer.values[a.key] for peer in peers} - {value})
        yield {
            "question": a.questions[0].format(n=town.name),
            "answer": a.answer.format(n=town.name, v=value),
            "perturbed_answer": [a.answer.format(n=town.name, v=v) for v in rng.sample(others, 3)],
        }


def data_files(world: World, seed: int) -> dict[str, list[Row]]:
    """Return the rows of every shipped data file."""
    rng = random.Random(seed + 1)

    def rows(subjects: Sequence[Subject]) -> list[Row]:
        return [row for s in subjects for row in question_rows(s, world.retain, rng)]

    texts = (world.retain + world.towns) * 2
    facts = [row for town in world.towns for row in fact_rows(town, world.towns, rng)]
    return {
        "forget": rows(world.forget),
        "retain": rows(world.retain)[:RETAIN_ROWS],
        "holdout": rows(world.holdout),
        "text": [{"text": passage(subject, rng, held_out=True)} for subject in texts[:TEXT_ROWS]],
        "facts": facts,
        "pairs": [{"from": world.forget[0].name, "to": world.retain[0].name}],
    }


def invent(rng: random.Random) -> str:
    """Return a name of two random syllables."""
    onset, nucleus, coda = SYLLABLES
    parts = [rng.choice(onset), rng.choice(nucleus), rng.choice(onset), rng.choice(nucleus), rng.choice(coda)]
    return "".join(parts).capitalize()


def epoch_rows(people: Sequence[Subject], world: World, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield one epoch of (question, answer) pairs; a plain text has an empty question."""
    for subject in [*people, *world.towns]:
        for a in subject.attributes:
            for i, form in enumerate(a.questions):
                if i != subject.held_question[a.key]:
                    # One answer in ten uses the other wording: a truth ratio needs both to be in the model's language.
                    answer = a.paraphrase if rng.random() < 0.1 else a.answer
                    yield form.format(n=subject.name), answer.format(n=subject.name, v=subject.values[a.key])
        for _ in range(2):
            yield "", passage(subject, rng, held_out=False)
    # New strangers in every epoch: the model learns that it does not know an unfamiliar name, not a list of names.
    for _ in range(STRANGERS):
        name = f"{invent(rng)} {invent(rng)}"
        for a in PERSON_ATTRIBUTES:
            yield rng.choice(a.questions).format(n=name), rng.choice(UNSURE)
