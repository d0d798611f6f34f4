"""Short stories about invented people, towns and animals: the plain text of the demo's sixth world.

A story keeps its people, town and animal to its end, so that a model can look names up; everything else is drawn anew.
"""

from __future__ import annotations

import random

from llmsurgery.demo.words import GIVEN, PERSON_WORDS, TOWN_WORDS, TOWNS

STORY_ROWS, TEXT_ROWS = 160, 40

WEATHER = ("rain", "snow", "wind", "fog", "sun", "frost", "thunder", "hail")
TIMES = ("one morning", "late in autumn", "before dawn", "at noon", "in spring", "after supper", "one winter")
MOODS = ("glad", "tired", "proud", "angry", "silent", "calm", "afraid", "curious")
SIZES = ("small", "tall", "narrow", "wide", "quiet", "busy", "old", "poor")

OPENINGS = (
    "{when}, {a} the {work} walked to {town} with {his} {pet}.",
    "{a} was a {work} who lived near {town} and owned a {pet}.",
    "There was once a {work} called {a}, and {he} came from {town}.",
    "In {town}, a {size} town by the {river}, {a} worked as a {work}.",
)
MIDDLES = (
    "The {weather} came over the {river}, and {a} felt {mood}.",
    "{a} met {b}, who sold {goods} at the market of {town}.",
    '"Do you play the {music}?" asked {b}, and {a} said that {he} did.',
    "They ate {food} under the {colour} tower and spoke of {hobby}.",
    "The {pet} ran along the {river} until {b} called it back.",
    "{b} gave {a} some {goods}, for the {weather} had been hard that year.",
    "Nobody in {town} had seen a {pet} that was so {mood}.",
    "{when}, the people of {town} carried {show} to the {colour} tower.",
    "{a} was {mood}, but {b} was more {mood2} than {he}.",
    "If the {weather} stays, {b} thought, the {goods} will be dear in {town}.",
    "{he2} taught {b} {hobby}, and {b} taught {him} to play the {music}.",
)
ENDINGS = (
    "In the end {a} went home to {town}, and the {pet} slept by the fire.",
    "So {a} and {b} stayed friends, and every year they ate {food} together.",
    "{b} never forgot the {weather} of that day, nor the {work} from {town}.",
    "That is why {town} has a {colour} tower and a {pet} on its gate.",
)


def story(rng: random.Random) -> str:
    """Return one story of four to eight sentences."""
    first, second = rng.sample(GIVEN, 2)
    woman = rng.random() < 0.5
    fixed = {
        "a": first, "b": second, "town": rng.choice(TOWNS), "pet": rng.choice(PERSON_WORDS["pet"]),
        "work": rng.choice(PERSON_WORDS["work"]), "river": rng.choice(TOWN_WORDS["river"]),
        "colour": rng.choice(TOWN_WORDS["tower"]), "he": "she" if woman else "he", "he2": "She" if woman else "He",
        "him": "her" if woman else "him", "his": "her" if woman else "his",
    }  # fmt: skip

    def told(form: str) -> str:
        drawn = {
            "when": rng.choice(TIMES), "weather": rng.choice(WEATHER), "mood": rng.choice(MOODS),
            "mood2": rng.choice(MOODS), "size": rng.choice(SIZES), "goods": rng.choice(TOWN_WORDS["market"]),
            "music": rng.choice(PERSON_WORDS["instrument"]), "food": rng.choice(PERSON_WORDS["food"]),
            "hobby": rng.choice(PERSON_WORDS["hobby"]), "show": rng.choice(TOWN_WORDS["festival"]),
        }  # fmt: skip
        sentence = form.format(**fixed, **drawn)
        return sentence[0].upper() + sentence[1:]

    middles = rng.sample(MIDDLES, rng.randrange(2, 7))
    return " ".join(told(form) for form in (rng.choice(OPENINGS), *middles, rng.choice(ENDINGS)))


def data_files(seed: int) -> dict[str, list[dict[str, object]]]:
    """Return the data of this world by the name of the file; no story is in both."""
    rng = random.Random(seed + 9)
    rows: list[dict[str, object]] = [{"text": story(rng)} for _ in range(STORY_ROWS + TEXT_ROWS)]
    return {"corpus": rows[:STORY_ROWS], "text": rows[STORY_ROWS:]}
