"""Data files to rows: records are recognised by their keys, and errors name file and line."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from llmsurgery.checkpoint.oserrors import reading
from llmsurgery.data.preferences import with_prompt
from llmsurgery.data.tables import is_dataset, read_dataset, read_parquet
from llmsurgery.errors import InputError

EXPECTED = (
    "question/answer, prompt/completion, messages or text (or chosen/rejected, MUSE's prompt/gt, LUME's input/output)"
)
_FORMATS = (".jsonl", ".json", ".csv", ".txt", ".parquet")

_CELLS = {"perturbed_answer": ("[",), "messages": ("[",), "choices": ("[", "{")}
"""Columns of CSV files whose cells may hold JSON, and how it begins."""

_COMPLETION_ID = re.compile(r"sc\d+$")
"""Ids of LUME's sentence completions; those of its questions end in qa and a number."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One record of a data file.

    Attributes:
        kind: "qa", "completion", "messages" or "text"; decides how the prompt is rendered.
        prompt: Question or prompt; empty for plain text.
        answer: Answer, completion or the last assistant turn; the whole of a plain text.
        turns: The turns before the answer, for "messages".
        paraphrased_question: Another wording of the question (TOFU), or None.
        paraphrased_answer: Another wording of the answer (TOFU), or None.
        perturbed_answers: Wrong answers (TOFU).
        preferred: The chosen answer of a preference pair, whose rejected one is `answer`; None elsewhere.
        where: "file:line" for messages to the user.
        subject: What the prompt is about, for causal tracing, or None.
    """

    kind: str
    prompt: str
    answer: str
    turns: tuple[Message, ...] = ()
    paraphrased_question: str | None = None
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    preferred: str | None = None
    where: str = ""
    subject: str | None = None


def read_rows(path: str | Path) -> list[Row]:
    """Read a data file.

    Args:
        path: A `.jsonl`, `.json`, `.csv`, `.txt` or `.parquet` file. A JSON file holds a list of records or of
            strings; a text file holds passages separated by blank lines. Or a data set of the package `datasets`: a
            directory, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`.

    Returns:
        At least one row.

    Raises:
        InputError: Missing, empty, malformed or of another format; names file and line, the key found and the key
            expected.
        UnsupportedError: The extra that the format needs is not installed.
    """
    path = Path(path)
    return _parse_all(path, read_records(path))


def read_records(path: str | Path) -> Iterator[tuple[str, object]]:
    """Return the records of a data file as they are, each with its place; path and errors as for `read_rows`."""
    path = Path(path)
    if is_dataset(path):
        return read_dataset(path)
    if not path.is_file():
        raise InputError(f"data file {path} does not exist", "no such file", "check the path")
    if path.suffix.lower() not in _FORMATS:
        raise InputError(
            f"data file {path} has the unknown ending {path.suffix!r}",
            f"known are {', '.join(_FORMATS)}",
            "convert it to JSON Lines",
        )
    return read_parquet(path) if path.suffix.lower() == ".parquet" else _read_records(path)


def rows_digest(rows: Iterable[object]) -> str:
    """Return the SHA-256 of what rows (dataclasses with `where`) hold, without where they come from."""
    digest = hashlib.sha256()
    for row in rows:
        content = dataclasses.asdict(cast(Row, row))
        del content["where"]
        if content.get("preferred", "") is None:
            # Rows without a chosen answer have the digest that they had before there were any.
            del content["preferred"]
        digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _parse_all(path: Path, records: Iterator[tuple[str, object]]) -> list[Row]:
    rows = [_with_subject(_parse_record(record, where), record) for where, record in records]
    if not rows:
        raise InputError(f"data file {path} is empty", "no record was found", f"expected records with {EXPECTED}")
    return rows


def _read_text(path: Path) -> str:
    try:
        with reading(path):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8", f"byte {error.start} cannot be decoded", "save the file as UTF-8"
        ) from error


def _read_records(path: Path) -> Iterator[tuple[str, object]]:
    text = _read_text(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl" or (suffix == ".json" and _is_lines(text)):
        # Only \n ends a record: JSON strings may hold other line separators of Unicode.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", _load_json(line, f"{path}:{number}")
    elif suffix == ".json":
        content = _load_json(text, str(path))
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            content = content["data"]
        if not isinstance(content, list):
            raise InputError(f"{path} holds no list", "a JSON data file is a list of records", f"expected {EXPECTED}")
        for number, record in enumerate(content, start=1):
            yield f"{path}: record {number}", record
    elif suffix == ".csv":
        yield from _read_csv(path, text)
    else:
        passages = (part.strip() for part in re.split(r"\n[ \t]*\n", text))
        for number, passage in enumerate(filter(None, passages), start=1):
            yield f"{path}: passage {number}", passage


def _is_lines(text: str) -> bool:
    """Whether a `.json` file holds one record a line, as TOFU publishes its files."""
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _load_json(text: str, where: str) -> object:
    try:
        content: object = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise InputError(f"{where} is not valid JSON", str(error), "correct or remove this record") from error
    return content


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, object]]:
    # Not splitlines(): a cell may hold other line separators of Unicode.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise InputError(
                    f"{where} has another number of columns than the header",
                    f"the header is {', '.join(reader.fieldnames or [])}",
                    "quote cells that hold commas",
                )
            cells: dict[str, object] = {key: value for key, value in record.items() if value != ""}
            for key, brackets in _CELLS.items():
                if isinstance(cell := cells.get(key), str) and cell.lstrip().startswith(brackets):
                    cells[key] = _load_json(cell, where)
            yield where, cells
    except csv.Error as error:
        # The inner reader has counted the bad line, the outer one has not.
        line = reader.reader.line_num
        raise InputError(f"{path}:{line} is not valid CSV", str(error), "correct this line") from error


def _with_subject(row: Row, record: object) -> Row:
    """Keep the subject of facts as ROME publishes them; the key may stand beside any layout."""
    if isinstance(record, dict) and isinstance(subject := record.get("subject"), str) and subject in row.prompt:
        return dataclasses.replace(row, subject=subject) if subject.strip() else row
    return row


def _parse_record(record: object, where: str) -> Row:
    if isinstance(record, str):
        return Row("text", "", _filled(record, "text", where), where=where)
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a record", f"found {type(record).__name__}", f"expected {EXPECTED}")
    keys = record.keys()
    if "question" in keys and "answer" in keys and "choices" not in keys:
        return _question(record, where)
    if {"prompt", "completion"} <= keys:
        prompt, answer = required_text(record, "prompt", where), required_text(record, "completion", where)
        return Row("completion", prompt, answer, where=where)
    if {"chosen", "rejected"} <= keys:
        return _preference(with_prompt(record, where), where)
    if {"prompt", "gt"} <= keys:
        return _continuation(record, "prompt", "gt", where)
    if {"prompt", "attribute"} <= keys:
        return _continuation(record, "prompt", "attribute", where)
    if {"input", "output"} <= keys and "instruction" not in keys:
        return _lume(record, where)
    if "messages" in keys:
        return _chat(record["messages"], where)
    if "text" in keys:
        return Row("text", "", required_text(record, "text", where), where=where)
    found = ", ".join(sorted(str(key) for key in keys)) or "no key"
    raise InputError(f"{where} has no known layout", f"found {found}", f"expected {EXPECTED}")


def _question(record: Mapping[str, object], where: str) -> Row:
    wrong = record.get("perturbed_answer") or []
    wrong = [wrong] if isinstance(wrong, str) else wrong
    if not isinstance(wrong, list) or not all(isinstance(item, str) for item in wrong):
        raise InputError(f"{where}: perturbed_answer is not a list of strings", f"found {wrong!r:.80}", "")
    return Row(
        "qa",
        required_text(record, "question", where),
        required_text(record, "answer", where),
        paraphrased_question=_optional(record, "paraphrased_question", where),
        paraphrased_answer=_optional(record, "paraphrased_answer", where),
        perturbed_answers=tuple(_filled(item, "perturbed_answer", where) for item in wrong),
        where=where,
    )


def _preference(record: Mapping[str, object], where: str) -> Row:
    """Return the rejected answer, with the chosen one beside it; as strings, or as turns of a chat."""
    if isinstance(record["prompt"], str):
        prompt, rejected = required_text(record, "prompt", where), required_text(record, "rejected", where)
        return Row("completion", prompt, rejected, preferred=required_text(record, "chosen", where), where=where)
    turns = [record[key] for key in ("prompt", "rejected", "chosen")]
    if not all(isinstance(part, list) for part in turns):
        found = ", ".join(type(part).__name__ for part in turns)
        raise InputError(f"{where}: prompt, rejected and chosen differ in kind", f"found {found}", "strings, or turns")
    before, rejected_turns, chosen_turns = cast("list[list[object]]", turns)
    row = _chat(before + rejected_turns, where)
    return replace(row, preferred=_chat(before + chosen_turns, where).answer)


def chosen_rows(rows: Iterable[Row]) -> list[Row]:
    """Return rows with the chosen answer of preference pairs in place of the rejected one: what is to stay."""
    return [row if row.preferred is None else replace(row, answer=row.preferred, preferred=None) for row in rows]


def _continuation(record: Mapping[str, object], prompt_key: str, answer_key: str, where: str) -> Row:
    """Return a text and how it goes on; published files cut between two words and lose the blank."""
    prompt, answer = required_text(record, prompt_key, where), required_text(record, answer_key, where)
    words = prompt[-1].isascii() and answer[0].isascii() and (answer[0].isalnum() or answer[0] in "\"'([$")
    blank = " " if words and not prompt[-1].isspace() else ""
    return Row("completion", prompt, blank + answer, where=where)


def _lume(record: Mapping[str, object], where: str) -> Row:
    if _COMPLETION_ID.search(str(record.get("id", ""))):
        return _continuation(record, "input", "output", where)
    return Row("qa", required_text(record, "input", where), required_text(record, "output", where), where=where)


def _chat(messages: object, where: str) -> Row:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages is not a list of turns", f"found {type(messages).__name__}", "")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise InputError(f"{where}: a turn of messages has no role or content", f"found {turn!r:.80}", "")
        role = required_text(turn, "role", where)
        # An empty system turn is common and harmless; an empty question or answer is not.
        blank = role == "system" and turn["content"] == ""
        turns.append(Message(role, "" if blank else required_text(turn, "content", where)))
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise InputError(
            f"{where}: messages do not end with an answer",
            f"the last turn's role is {turns[-1].role!r}",
            "end each chat with a turn of role assistant",
        )
    prompt = next((turn.content for turn in reversed(turns[:-1]) if turn.role == "user"), "")
    return Row("messages", prompt, turns[-1].content, turns=tuple(turns[:-1]), where=where)


def required_text(record: Mapping[str, object], key: str, where: str) -> str:
    """Return a text of a record.

    Args:
        record: The record.
        key: Its key.
        where: File and line, for the message.

    Raises:
        InputError: It is no string, is empty, or is not valid Unicode; the message does not hold the text.
    """
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is not a string", f"found {type(value).__name__}", "")
    return _filled(value, key, where)


def _optional(record: Mapping[str, object], key: str, where: str) -> str | None:
    return None if record.get(key) is None else required_text(record, key, where)


def _filled(value: str, key: str, where: str) -> str:
    if not value.strip():
        raise InputError(f"{where}: {key} is empty", "there is nothing to score or train on", "remove this record")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key} is not valid Unicode", "it holds half of a surrogate pair", "correct or remove this record"
        ) from error
    return value


def read_lines(path: str | Path) -> list[str]:
    """Read a list of sentences, one a line, blank lines ignored.

    Raises:
        InputError: Missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"file {path} does not exist", "a list of sentences, one a line, was expected", "")
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"file {path} is empty", "a list of sentences, one a line, was expected", "")
    return lines
