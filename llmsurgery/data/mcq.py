"""Multiple-choice files for letters: any number of options, in the common layouts, and the prompts they become.

Records are `question/choices/answer` (MMLU; the answer is a number from 0 or a letter), ARC's own layout
(`question.stem`, `question.choices[].label/text`, `answerKey`) and that of its data set (`choices.text/label`,
`answerKey`). In CSV files the column `choices` holds a JSON list, or every option has a column: `A`, `B`, ...,
`choice_a` or `option1`, say. Labels become A, B, C, ... in their order, whatever they were.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmsurgery.data.choices import Question
from llmsurgery.data.records import read_records
from llmsurgery.errors import InputError

LETTERS = string.ascii_uppercase[:10]
"""Letters of options; published sets have at most ten."""

EXPECTED = (
    "question/choices/answer, columns A, B, ... (or choice_a, option1, ...) in place of choices, or ARC's "
    "question.stem/question.choices/answerKey"
)
_COLUMN = re.compile(r"(?:(?:choice|option|answer)[ _-]?)?([a-j])|(?:choice|option)[ _-]?([0-9]|10)", re.IGNORECASE)
"""The name of a column that holds an option: its letter, or its number behind a word."""

QUESTION, OPTIONS, ANSWER = "{question}", "{options}", "{answer}"

TEMPLATE = f"{QUESTION}\n{OPTIONS}\nAnswer with the letter.{ANSWER}Answer:"
"""How a question is asked without a template of one's own."""


@dataclass(frozen=True)
class Choices:
    """Questions with the same number of options.

    Attributes:
        questions: The questions, in the order of the file.
        options: Options of each.
        skipped: Questions of the file that have another number of options.
    """

    questions: tuple[Question, ...]
    options: int
    skipped: int = 0

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return LETTERS[: self.options]


def read_choices(path: str | Path) -> Choices:
    """Read a file of multiple-choice questions and keep those of the commonest number of options.

    Args:
        path: As for `llmsurgery.data.records.read_records`.

    Raises:
        InputError: Missing, empty or malformed, or a record that is no question; no message holds its text.
    """
    found = [_question(record, where) for where, record in read_records(path)]
    if not found:
        raise InputError(f"data file {path} is empty", "no question was found", f"expected records with {EXPECTED}")
    counts = Counter(len(question.choices) for question in found)
    # Of two counts that are as common, the larger one: more options say more about letters.
    options = max(counts, key=lambda count: (counts[count], count))
    kept = tuple(question for question in found if len(question.choices) == options)
    if len(kept) < 2:
        raise InputError(
            f"data file {path} has {len(kept)} question with {options} options",
            "one half of the questions of the commonest number of options is estimated on, the other half is measured",
            "give a file with more questions of one number of options",
        )
    return Choices(kept, options, len(found) - len(kept))


def first_questions(choices: Choices, count: int | None) -> Choices:
    """Return the first questions; all of them for 0 or None."""
    return replace(choices, questions=choices.questions[: count or None])


def _question(record: object, where: str) -> Question:
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not a record", f"found {type(record).__name__}", f"expected {EXPECTED}")
    question = record.get("question")
    if isinstance(question, Mapping):
        stem, choices = question.get("stem"), question.get("choices")
    else:
        stem, choices = question, record.get("choices", _columns(record))
    key = "answerKey" if "answerKey" in record else "answer"
    if stem is None or choices is None or key not in record:
        raise InputError(
            f"{where} is no multiple-choice question",
            f"found {', '.join(sorted(map(str, record))) or 'no key'}",
            f"expected {EXPECTED}",
        )
    if not isinstance(stem, str) or not stem.strip():
        raise InputError(f"{where}: question is empty or no string", "there is nothing to ask", "remove this record")
    labels, texts = _options(choices, where)
    return Question(stem.strip(), texts, _answer(record[key], labels, where), where)


def _columns(record: Mapping[str, object]) -> dict[str, list[object]] | None:
    """Return the options that have a column each, with their labels; None if there are none. Empty cells are none."""
    found = {(match[1] or match[2]).upper(): key for key in record if (match := _COLUMN.fullmatch(str(key).strip()))}
    labels = sorted(found, key=lambda label: (len(label), label))
    return {"label": list(labels), "text": [record[found[label]] for label in labels]} if labels else None


def _options(choices: object, where: str) -> tuple[Sequence[str], tuple[str, ...]]:
    """Return the labels and the texts of the options."""
    labels: object = None
    texts = choices
    if isinstance(choices, Mapping):
        labels, texts = choices.get("label"), choices.get("text")
    elif isinstance(choices, list) and choices and all(isinstance(one, Mapping) for one in choices):
        labels, texts = [one.get("label") for one in choices], [one.get("text") for one in choices]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"{where}: choices are not a list of texts",
            "an option is missing or empty, or the cell is no JSON list",
            'correct them; in CSV files, write a JSON list such as "[""sky"", ""sea""]", or a column for each option',
        )
    if not 2 <= len(texts) <= len(LETTERS):
        raise InputError(
            f"{where} has {len(texts)} choices", f"letters are for 2 to {len(LETTERS)} of them", "remove this record"
        )
    if labels is None:
        labels = list(LETTERS[: len(texts)])
    if not isinstance(labels, list) or len(set(map(str, labels))) != len(texts):
        raise InputError(f"{where}: the labels of the choices are not all different", "", "correct them")
    return [str(label) for label in labels], tuple(text.strip() for text in texts)


def _answer(value: object, labels: Sequence[str], where: str) -> int:
    """Return the number of the right option: a number from 0, or a label."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    if isinstance(value, str):
        word = value.strip()
        if word in labels or word.upper() in labels:
            return labels.index(word if word in labels else word.upper())
        # Cells of CSV files are strings.
        if word.isdecimal() and int(word) < len(labels):
            return int(word)
    raise InputError(
        f"{where}: the answer {value!r:.20} is none of the choices",
        f"known are {', '.join(labels)}, or numbers from 0",
        "correct this record",
    )


def rotated(choices: Sequence[str], order: int) -> tuple[str, ...]:
    """Return one cyclic order of options: slot j of order i holds option (i + j) mod n."""
    return tuple(choices[(order + slot) % len(choices)] for slot in range(len(choices)))


def read_template(path: str) -> str:
    """Return the template of a file, or the default for an empty path.

    A template holds `{question}` and `{options}`. What stands before `{answer}` is the user's turn of a chat, what
    follows it begins the assistant's; without it the text is given to the model as it stands.

    Raises:
        InputError: Missing, not UTF-8, without one of the places, or ending in a blank.
    """
    if not path:
        return TEMPLATE
    try:
        text = Path(path).read_text("utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {path} cannot be read", str(error), "give a text file") from error
    for place in (QUESTION, OPTIONS):
        if text.count(place) != 1:
            raise InputError(
                f"template {path} has {text.count(place)} places for {place}", "it needs one", "correct the template"
            )
    if text.count(ANSWER) > 1:
        raise InputError(f"template {path} has {ANSWER} twice", "the answer begins once", "correct the template")
    if text[-1].isspace():
        raise InputError(
            f"template {path} ends in a blank", "the blank belongs to the letter's token", "end it with a word or colon"
        )
    return text


def template_digest(text: str) -> str:
    """Return the SHA-256 of a template."""
    return hashlib.sha256(text.encode()).hexdigest()


def option_lines(options: Sequence[str]) -> list[str]:
    """Return each option behind its letter."""
    return [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]


def fill_template(template: str, question: str, lines: str) -> tuple[str, str | None]:
    """Return the user's turn and how the answer begins; the whole text and None without `{answer}`.

    Args:
        template: The template.
        question: What stands at `{question}`.
        lines: What stands at `{options}`.
    """

    def fill(text: str) -> str:
        # One pass over the places: a question may hold braces of its own.
        parts = [part.split(OPTIONS) for part in text.split(QUESTION)]
        return question.join(lines.join(part) for part in parts)

    turn, found, answer = template.partition(ANSWER)
    return (fill(turn), fill(answer)) if found else (fill(template), None)
