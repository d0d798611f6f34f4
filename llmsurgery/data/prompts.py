"""Files of prompts, with or without an answer; messages about them name places and keys, and never a text.

What stands in such a file may be harmful. So errors say where something is wrong and which keys are there, and rows are
known by their number alone.
"""

from __future__ import annotations

from pathlib import Path

from llmsurgery.data.records import Row, read_records, required_text
from llmsurgery.errors import InputError

EXPECTED = "records with prompt, prompt/completion or question/answer, or one prompt per passage of a text file"
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", ""), ("question", ""), ("text", ""))


def read_prompts(path: str | Path) -> list[Row]:
    """Read a file of prompts.

    Args:
        path: A data file as for `read_rows`.

    Returns:
        At least one row of kind "qa", which goes through the chat template; `answer` is empty where there is none.

    Raises:
        InputError: Missing, empty, malformed or of another format.
    """
    path = Path(path)
    rows = [_parse(record, where) for where, record in read_records(path)]
    if not rows:
        raise InputError(f"data file {path} is empty", "no record was found", f"expected {EXPECTED}")
    return rows


def _parse(record: object, where: str) -> Row:
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a record", f"found {type(record).__name__}", f"expected {EXPECTED}")
    for prompt, answer in _PAIRS:
        if prompt in record and (not answer or answer in record):
            asked = required_text(record, prompt, where)
            return Row("qa", asked, required_text(record, answer, where) if answer else "", where=where)
    found = ", ".join(sorted(str(key) for key in record)) or "no key"
    raise InputError(f"{where} has no known layout", f"found the keys {found}", f"expected {EXPECTED}")
