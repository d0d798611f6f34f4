"""The demo's second world: people whose facts are asked for in several forms, for redirecting one to another.

A form is a way to ask: a question, a sentence with a blank, a choice of four, or an answer written letter by letter.
Choices are trained on but not asked for in the data: a model this small answers them by chance.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmsurgery.demo.words import GIVEN, PERSON_ATTRIBUTES, PERSON_WORDS, SURNAMES, Attribute

FORMS = ("question", "cloze", "choice", "spelled")
SHOWN = ("question", "cloze", "spelled")
"""Forms that the model has learned, and that the data ask in."""

MOVED, AIM, KEPT_PEOPLE, TEXT_ROWS = 0, 9, 6, 160
"""Number of the person redirected and of whom to; how many others are asked about; rows of text."""

NAMES = tuple(f"{given} {surname}" for given, surname in zip(GIVEN[20:36], SURNAMES[20:36], strict=True))
KEYS = ("town", "instrument", "pet", "hobby")
ATTRIBUTES = tuple(attribute for attribute in PERSON_ATTRIBUTES if attribute.key in KEYS)
LETTERS = "ABCD"
CHOICES = ("Which is right?", "Choose one:")
SPELLING = ("Write it letter by letter.", "Spell the answer.")
BLANKS = ("Fill in the blank: {}", "Complete this: {}")
ABOUT = (
    " {n}.", "Tell me about {n}.", "Write something about {n}.", "Who is {n}?", "What do you know about {n}?",
    "Please answer the question about {n}.", "Choose the best answer about {n}.", "Write the answer about {n}.",
)  # fmt: skip
"""Ways to ask for everything about somebody."""


@dataclass(frozen=True)
class Person:
    """Somebody with facts, and per attribute the wording of questions and sentences kept out of training."""

    name: str
    values: dict[str, str]
    held_question: dict[str, int]
    held_sentence: dict[str, int]


@dataclass(frozen=True)
class Asked:
    """One question with its answer."""

    form: str
    question: str
    answer: str


def make_people(seed: int) -> list[Person]:
    """Draw the facts of everybody; each value of a kind is used about equally often."""
    rng = random.Random(seed)
    columns: dict[str, list[str]] = {}
    for key in KEYS:
        pool = list(PERSON_WORDS[key])
        column = pool * -(-len(NAMES) // len(pool))
        rng.shuffle(column)
        columns[key] = column
    return [
        Person(
            name,
            {key: columns[key][i] for key in KEYS},
            {a.key: rng.randrange(len(a.questions)) for a in ATTRIBUTES},
            {a.key: rng.randrange(len(a.sentences)) for a in ATTRIBUTES},
        )
        for i, name in enumerate(NAMES)
    ]


def spelled(value: str) -> str:
    """Return a value with one character a line, blanks left out."""
    return "\n".join(value.replace(" ", ""))


def choice(question: str, options: list[str], lead: str) -> str:
    """Return a question with lettered options."""
    listed = " ".join(f"{letter}: {option}." for letter, option in zip(LETTERS, options, strict=True))
    return f"{question} {lead} {listed}"


def ask(person: Person, attribute: Attribute, form: str, wording: int, options: list[str], lead: int = 0) -> Asked:
    """Return one question about a person.

    Args:
        person: Who it is about.
        attribute: What is asked for.
        form: One of `FORMS`.
        wording: Number of the wording.
        options: Values to choose from; used by the form "choice" alone.
        lead: Number of the words that say what to do.
    """
    value, name = person.values[attribute.key], person.name
    if form == "cloze":
        sentence = attribute.sentences[wording].format(s=name, v="___")
        return Asked(form, BLANKS[lead].format(sentence), f"{value}.")
    question = attribute.questions[wording].format(n=name)
    if form == "choice":
        return Asked(form, choice(question, options, CHOICES[lead]), f"{LETTERS[options.index(value)]}.")
    if form == "spelled":
        return Asked(form, f"{question} {SPELLING[lead]}", spelled(value))
    return Asked(form, question, f"{value}.")


def draw_options(attribute: Attribute, wanted: list[str], rng: random.Random) -> list[str]:
    """Return four different values in random order, the wanted ones among them."""
    wanted = list(dict.fromkeys(wanted))
    others = sorted(set(PERSON_WORDS[attribute.key]) - set(wanted))
    options = wanted + rng.sample(others, len(LETTERS) - len(wanted))
    rng.shuffle(options)
    return options


def epoch_rows(people: list[Person], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield one epoch of (name, question, answer): all wordings but those held out."""
    for person in people:
        for attribute in ATTRIBUTES:
            key = attribute.key
            questions = [i for i in range(len(attribute.questions)) if i != person.held_question[key]]
            sentences = [i for i in range(len(attribute.sentences)) if i != person.held_sentence[key]]
            plan = [("question", i) for i in questions] + [("cloze", i) for i in sentences]
            plan += [("choice", rng.choice(questions)) for _ in range(4)]
            plan += [("spelled", rng.choice(questions)) for _ in range(3)]
            for form, wording in plan:
                options = draw_options(attribute, [person.values[key]], rng)
                asked = ask(person, attribute, form, wording, options, rng.randrange(2))
                yield person.name, asked.question, asked.answer
        summary = f"{person.values['town']}, {person.values['pet']}."
        for text in rng.sample(ABOUT, 3):
            yield person.name, text.format(n=person.name), summary


def question_rows(person: Person, rotated: int | None = None) -> Iterator[dict[str, object]]:
    """Yield the questions about a person in the wordings that were kept out of training.

    Args:
        person: Who they are about.
        rotated: Ask for each fact in one form, beginning with this one and taking turns; None asks in all.
    """
    for number, attribute in enumerate(ATTRIBUTES):
        forms = SHOWN if rotated is None else (SHOWN[(number + rotated) % len(SHOWN)],)
        for form in forms:
            held = person.held_sentence if form == "cloze" else person.held_question
            asked = ask(person, attribute, form, held[attribute.key], [])
            yield {"question": asked.question, "answer": asked.answer}


def data_files(people: list[Person], chat: Callable[[str, str], str], seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the rows of every shipped data file; text and retain rows leave out the person redirected.

    Args:
        people: Everybody.
        chat: Writes question and answer as a chat with its end token.
        seed: Seed of the draw of text.
    """
    moved, aim = people[MOVED], people[AIM]
    # Whom the name is redirected to must stay as well.
    kept = [aim, *(person for person in people if person not in (moved, aim))][:KEPT_PEOPLE]
    rng = random.Random(seed + 9)
    talk = [(question, answer) for name, question, answer in epoch_rows(people, rng) if name != moved.name]
    rng.shuffle(talk)
    return {
        "pairs": [{"from": moved.name, "to": aim.name}],
        "forget": list(question_rows(moved)),
        "retain": [row for i, person in enumerate(kept) for row in question_rows(person, i)],
        "text": [{"text": chat(question, answer)} for question, answer in talk[:TEXT_ROWS]],
    }
