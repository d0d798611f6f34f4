"""Questions about pictures, each with the same short answers to choose from for a group of questions.

A record has `image`, `question`, `choices` and `answer`. `image` is the path of a picture, relative to the data file,
or a drawing such as {"shape": "circle", "colour": "red", "ground": "dark", "seed": 3}. `choices` are words or short
texts that the model says itself; they are not listed in the prompt, so that everything a prompt needs ("Answer with
one word.") stands in the question. `answer` is one of them, or its number from 0. Questions with the same choices are
a group, whose prior is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmsurgery.data.drawings import Drawing, parse_drawing
from llmsurgery.data.records import read_records, required_text
from llmsurgery.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

EXPECTED = "image/question/choices/answer, with image a path relative to the file"


@dataclass(frozen=True)
class PicturedQuestion:
    """One question.

    Attributes:
        question: What is asked.
        choices: Answers to choose from.
        answer: Number of the right one.
        image: Path of the picture, or what is drawn.
        where: "file:line" for messages to the user.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    image: Path | Drawing
    where: str = ""


@dataclass(frozen=True)
class Pictured:
    """Questions about pictures.

    Attributes:
        questions: The questions, in the order of the file.
    """

    questions: tuple[PicturedQuestion, ...]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The different choices, in the order of the file."""
        return list(dict.fromkeys(question.choices for question in self.questions))


def shows_pictures(path: str | Path) -> bool:
    """Whether the first record of a data file has a picture; path and errors as for `read_pictured`."""
    _, record = next(iter(read_records(path)), ("", None))
    return isinstance(record, Mapping) and isinstance(record.get("image"), str | Mapping)


def read_pictured(path: str | Path) -> Pictured:
    """Read a file of questions about pictures; every picture is opened once.

    Args:
        path: As for `llmsurgery.data.records.read_records`.

    Raises:
        InputError: Missing, empty or malformed, a record that is no such question, or a picture that cannot be read.
        UnsupportedError: Pictures cannot be read at all here.
    """
    root = Path(path).parent
    questions = [_question(record, where, root) for where, record in read_records(path)]
    if len(questions) < 2:
        raise InputError(
            f"data file {path} has {len(questions)} questions",
            "one half of the questions is learnt from, the other half is measured",
            f"give more records with {EXPECTED}",
        )
    for question in questions:
        open_picture(question)
    return Pictured(tuple(questions))


def open_picture(question: PicturedQuestion) -> Image:
    """Return the picture of a question, with three colours.

    Raises:
        InputError: The file is missing or no picture.
        UnsupportedError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError("pictures cannot be read", "Pillow is not installed", "pip install pillow") from error
    if isinstance(question.image, Drawing):
        return Image.fromarray(question.image.pixels())
    try:
        with Image.open(question.image) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{question.where}: {question.image} is no picture that can be read",
            str(error).partition("\n")[0][:200],
            "paths are relative to the data file; correct the path, or convert the picture to PNG",
        ) from error


def pictures_digest(questions: Sequence[PicturedQuestion]) -> str:
    """Return the SHA-256 of the bytes of all picture files, and of what is drawn, in order."""
    digest = hashlib.sha256()
    for question in questions:
        image = question.image
        digest.update(repr(image).encode() if isinstance(image, Drawing) else image.read_bytes())
    return digest.hexdigest()


def _question(record: object, where: str, root: Path) -> PicturedQuestion:
    if not isinstance(record, Mapping) or not {"image", "question", "choices", "answer"} <= record.keys():
        found = ", ".join(sorted(map(str, record))) if isinstance(record, Mapping) else type(record).__name__
        raise InputError(
            f"{where} is no question about a picture", f"found {found or 'no key'}", f"expected {EXPECTED}"
        )
    choices = record["choices"]
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
        or len(set(choices)) < len(choices)
    ):
        raise InputError(f"{where}: choices are not two or more different texts", "", "correct this record")
    labels = tuple(choice.strip() for choice in choices)
    return PicturedQuestion(
        required_text(record, "question", where), labels, _answer(record["answer"], labels, where),
        _image(record["image"], where, root), where,
    )  # fmt: skip


def _answer(value: object, labels: tuple[str, ...], where: str) -> int:
    if isinstance(value, str) and value.strip() in labels:
        return labels.index(value.strip())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
        return value
    raise InputError(
        f"{where}: the answer {value!r:.40} is none of the choices",
        f"known are {', '.join(labels)}, or numbers from 0",
        "correct this record",
    )


def _image(value: object, where: str, root: Path) -> Path | Drawing:
    if isinstance(value, Mapping):
        return parse_drawing(value, where)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: image is no path", f"found {type(value).__name__}", f"expected {EXPECTED}")
    return root / value
