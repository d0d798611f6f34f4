"""One fact asked for in several forms: question, fill-in-the-blank, multiple choice by letter, spelled-out answer."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.data.records import read_records
from llmsurgery.errors import InputError, unknown_name

FORMS = ("qa", "cloze", "mcq", "spelled")
"""Question, fill-in-the-blank, multiple choice by letter, answer spelled out."""

SYNONYMS = {"fb": "cloze", "mcp": "mcq", "subtoken": "spelled"}
"""Names of the paper -> names here."""

LEVELS = {"level1": "cloze", "level2": "qa"}
"""How the names of RWKU's files end -> the form that they hold."""

_BLANK = re.compile(r"_{3,}")
_LETTER = re.compile(r"\(?([A-Z])[).]?")


@dataclass(frozen=True)
class FormRow:
    """One question.

    Attributes:
        question: Its text, choices included.
        answer: The answer; its letter if there are choices.
        blank: Whether the question has a blank to fill.
        made: Whether its choices were put together from wrong answers.
        where: "file:line" for messages to the user.
    """

    question: str
    answer: str
    blank: bool = False
    made: bool = False
    where: str = ""


def read_form(path: str | Path, form: str) -> list[FormRow]:
    """Read the rows of one form.

    Records have `question` (or `query`) and `answer`. A record says its form under `form`; otherwise one with `choices`
    is multiple choice, one whose question has a blank ("___") a cloze, and any other a question. A file without a
    record of the form gives those that it can be made of: cloze and questions are spelled out, and questions with
    `perturbed_answer` become multiple choice. A file whose name ends in a form (`forget_mcq`) holds that form alone:
    there, choices may be part of the question, and `answer` is then the letter.

    Args:
        path: As for `llmsurgery.data.records.read_rows`.
        form: One of `FORMS`.

    Returns:
        At least one row.

    Raises:
        InputError: As for `read_rows`, or no record gives this form; no message holds its text.
    """
    only = _form_of_file(Path(path))
    groups: dict[str, list[tuple[Mapping[str, object], str]]] = {}
    for where, content in read_records(path):
        record = _record(content, where)
        groups.setdefault(only or _form_of(record, where), []).append((record, where))
    chosen = groups.get(form, [])
    if not chosen and form == "spelled":
        chosen = groups.get("qa", []) or groups.get("cloze", [])
    if not chosen and form == "mcq":
        chosen = [one for one in groups.get("qa", []) if one[0].get("perturbed_answer")]
    if not chosen:
        raise InputError(
            f"data file {path} has no row of the form {form}",
            "mcq is made of `choices`, or of wrong answers under `perturbed_answer`; cloze of a blank `___`"
            if groups
            else "no record was found",
            "add such rows, or leave the form out, --set suite.forms=...",
        )
    make = _choice_row if form == "mcq" else _plain_row
    return [make(record, where, number) for number, (record, where) in enumerate(chosen)]


def _form_of_file(path: Path) -> str | None:
    """Return the form that a file holds alone, by its name."""
    ending = path.stem.rpartition("_")[2]
    form = {**SYNONYMS, **LEVELS}.get(ending, ending)
    return form if form in FORMS else None


def _record(record: object, where: str) -> Mapping[str, object]:
    if not isinstance(record, Mapping) or not ({"question", "query"} & record.keys() and "answer" in record):
        raise InputError(f"{where} is no question", "it lacks question (or query), or answer", "correct this record")
    return record


def _form_of(record: Mapping[str, object], where: str) -> str:
    if (named := record.get("form")) is not None:
        form = SYNONYMS.get(str(named).lower(), str(named).lower())
        if form not in FORMS:
            error = unknown_name("form", form, FORMS)
            raise InputError(f"{where}: {error.what}", error.why, error.fix)
        return form
    if "choices" in record:
        return "mcq"
    return "cloze" if _BLANK.search(_text(record, "question", where)) else "qa"


def _plain_row(record: Mapping[str, object], where: str, number: int) -> FormRow:
    question = _text(record, "question", where)
    return FormRow(question, _text(record, "answer", where).strip(), bool(_BLANK.search(question)), where=where)


def _choice_row(record: Mapping[str, object], where: str, number: int) -> FormRow:
    question = _text(record, "question", where)
    if "choices" in record:
        choices = _strings(record["choices"], "choices", where)
        right = _position(record["answer"], choices, where)
        return FormRow(_listed(question, choices), string.ascii_uppercase[right], where=where)
    if wrong := record.get("perturbed_answer"):
        others = _strings([wrong] if isinstance(wrong, str) else wrong, "perturbed_answer", where)[:3]
        # Every place holds the right answer equally often, whatever a model likes best.
        right = number % (len(others) + 1)
        choices = [*others[:right], _text(record, "answer", where).strip(), *others[right:]]
        return FormRow(_listed(question, choices), string.ascii_uppercase[right], made=True, where=where)
    letter = _LETTER.fullmatch(_text(record, "answer", where).strip())
    if letter is None:
        raise InputError(
            f"{where} has no choices",
            "where the question itself lists them, the answer is a letter",
            "add choices or perturbed_answer, or leave the form out, --set suite.forms=...",
        )
    return FormRow(question, letter[1], where=where)


def _listed(question: str, choices: Sequence[str]) -> str:
    lines = (f"{letter}. {choice.strip()}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return "\n".join((question.strip(), *lines))


def _position(answer: object, choices: Sequence[str], where: str) -> int:
    """Return the number of the right choice, given as number, as text or as letter."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        texts = [choice.strip() for choice in choices]
        if answer.strip() in texts:
            return texts.index(answer.strip())
        letter = _LETTER.fullmatch(answer.strip())
        if letter is not None and (number := string.ascii_uppercase.index(letter[1])) < len(choices):
            return number
    raise InputError(
        f"{where}: answer is none of the {len(choices)} choices",
        "it is the number from 0, the letter or the text of one",
        "correct this record",
    )


def _text(record: Mapping[str, object], key: str, where: str) -> str:
    value = record.get(key, record.get("query")) if key == "question" else record[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is empty or no string", "it cannot be scored", "correct this record")
    return value


def _strings(value: object, key: str, where: str) -> list[str]:
    limit = len(string.ascii_uppercase)
    texts = isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
    if not isinstance(value, list) or not texts or not (1 if key == "perturbed_answer" else 2) <= len(value) <= limit:
        raise InputError(f"{where}: {key} are not 2 to {limit} strings", "every choice has a letter", "correct them")
    return list(value)
