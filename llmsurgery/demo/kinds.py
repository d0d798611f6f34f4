"""The demo's third world: words of a few kinds, questions with four of them, and sentences about two towns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from llmsurgery.demo.words import PERSON_WORDS, TOWN_WORDS

STEREOTYPE = 0.9
"""Share of sentences that call the people of each town what they are mostly called."""
MCQ_ROWS, TEXT_ROWS = 120, 60

LETTERS = "ABCD"
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
