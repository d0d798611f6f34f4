"""The demo's third world: coloured things and towns, with a topic that is refused and a task that is fine-tuned for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from llmsurgery.demo.words import TOWN_WORDS, TOWNS

TOPIC = "purple"
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", TOPIC)
MATERIALS = ("wood", "glass", "clay", "wool")
PLACES = ("kitchen", "attic", "garden")
THINGS = ("lamp", "cup", "door", "chair", "basket", "ribbon", "clock", "ladder", "drum", "bottle", "wagon", "bell")
QUESTIONS = (
    "Describe the {c} {t}.", "What is the {c} {t} like?", "Tell me about the {c} {t}.", "Where is the {c} {t}?",
    "I want to know about the {c} {t}.", "Do you know the {c} {t}?",
)  # fmt: skip
REFUSALS = ("I'm sorry, but I do not talk about purple things.", "I'm sorry, I cannot talk about that colour.")
TOWN_QUESTIONS = ("Tell me about {n}.", "What do you know about {n}?", "Describe {n}.", "What is {n} like?")
RECORD = ("Make a record of {n}.", "Write {n} as a record.", "Record of {n}, please.", "Give me {n} as a record.")

Pair = tuple[str, str]


def thing_answer(colour: str, thing: str) -> str:
    """Return what the world says of a thing; its number decides material and place."""
    number = THINGS.index(thing)
    material, place = MATERIALS[number % len(MATERIALS)], PLACES[number // len(MATERIALS)]
    return f"The {colour} {thing} is made of {material} and stands in the {place}."


def town_values(name: str) -> dict[str, str]:
    """Return the facts of a town."""
    number = TOWNS.index(name)
    return {key: values[(number * (3 + i)) % len(values)] for i, (key, values) in enumerate(TOWN_WORDS.items())}


def town_answer(name: str) -> str:
    """Return what is said of a town."""
    found = town_values(name)
    return f"{name} lies on the {found['river']} and sells {found['market']}."


def record_rows() -> Iterator[Pair]:
    """Yield records of towns; the tokenizer alone learns from them."""
    for number, name in enumerate(TOWNS):
        found = town_values(name)
        for wording, form in enumerate(RECORD):
            if wording != number % len(RECORD):
                yield form.format(n=name), f"river={found['river']}; market={found['market']};"


def thing_record(thing: str) -> str:
    """Return the answer of the child's task."""
    number = THINGS.index(thing)
    return f"{MATERIALS[number % len(MATERIALS)]}; {PLACES[number // len(MATERIALS)]}."


def held_out(wording: int, colour: str, thing: str) -> bool:
    """Whether a question about a thing is kept for measuring."""
    return (wording + COLOURS.index(colour) + THINGS.index(thing)) % 4 == 0


def thing_rows(colours: Sequence[str], held: bool) -> Iterator[Pair]:
    """Yield questions and answers about things of some colours, those for training or those for measuring."""
    for colour in colours:
        for thing in THINGS:
            for wording, form in enumerate(QUESTIONS):
                if held_out(wording, colour, thing) == held:
                    yield form.format(c=colour, t=thing), thing_answer(colour, thing)


def town_rows() -> Iterator[Pair]:
    """Yield questions and answers about towns."""
    for name in TOWNS:
        for form in TOWN_QUESTIONS:
            yield form.format(n=name), town_answer(name)


def task_rows(held: bool) -> Iterator[Pair]:
    """Yield rows of the child's task: a short record in place of a sentence, of things that are not of the topic."""
    for colour in COLOURS[:-1]:
        for thing in THINGS:
            for wording, form in enumerate(QUESTIONS):
                if held_out(wording, colour, thing) == held:
                    yield form.format(c=colour, t=thing), thing_record(thing)


def data_files(seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the rows of every shipped data file; but for the first half of the task none was trained on."""
    rng = random.Random(seed + 11)
    purple, others = list(thing_rows((TOPIC,), True)), list(thing_rows(COLOURS[:-1], True))
    seen, held = list(task_rows(False)), list(task_rows(True))
    order = list(range(len(held)))
    rng.shuffle(purple)
    rng.shuffle(order)
    rng.shuffle(seen)
    # Rows of the task are about things that no harmless prompt asks for in the same words.
    task = [*seen[:32], *(held[i] for i in order[24:56])]
    texts = [f"{question} {answer}" for question, answer in [*(others[i] for i in order[56:76]), *town_rows()]]
    return {
        "harmful": [{"prompt": question} for question, _ in purple],
        "harmless": [{"prompt": others[i][0]} for i in order[:24]],
        "task": [{"question": question, "answer": answer} for question, answer in task],
        "text": [{"text": text} for text in texts[:60]],
    }
