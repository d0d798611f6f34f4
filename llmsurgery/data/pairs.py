"""What is redirected where: pairs of names, and facts with a new answer, from a file or from two texts.

A pair has the keys `from` and `to`, and may have `aliases` (further names of the first) and `prompts` (texts with one
`{}` for the name, to be tried on the result). A fact, for methods that write single facts, has `prompt` (one `{}`),
`subject` and `target`; CounterFact's layout (`requested_rewrite`, `target_new`) is read as it is published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.data.records import read_records
from llmsurgery.errors import InputError

EXPECTED = "from/to, or prompt/subject/target (CounterFact: requested_rewrite)"
SLOT = "{}"


@dataclass(frozen=True)
class Pair:
    """One redirection.

    Attributes:
        source: The name whose meaning changes; of a fact, its subject.
        target: The name it is to mean; of a fact, the new answer; "" where a concept is only removed.
        aliases: Further names of the source.
        prompts: Texts with one `{}` for the name, beside the shipped ones.
        prompt: Of a fact, the text with one `{}` that the new answer follows; "" for a pair of names.
        neighbours: Of a fact, texts about other subjects whose answers are to stay.
        where: "file:line" for messages to the user.
    """

    source: str
    target: str
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    prompt: str = ""
    neighbours: tuple[str, ...] = ()
    where: str = ""

    def record(self) -> dict[str, object]:
        """Return the pair as JSON values, without what is empty."""
        found: dict[str, object] = {"from": self.source, **({"to": self.target} if self.target else {})}
        if self.prompt:
            found["prompt"] = self.prompt
        lists = {"aliases": self.aliases, "prompts": self.prompts, "neighbours": self.neighbours}
        return found | {key: list(values) for key, values in lists.items() if values}


def make_pair(source: str, target: str, where: str = "--from") -> Pair:
    """Return the pair of two texts.

    Raises:
        InputError: One of them is blank, or they are the same.
    """
    return _checked(Pair(source, target, where=where), target != "")


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of pairs or facts, one record a line.

    Args:
        path: A file that `llmsurgery.data.records.read_records` takes.

    Returns:
        At least one pair.

    Raises:
        InputError: Missing, empty or malformed; names file and line, the keys found and those expected.
    """
    pairs = [_parse(record, where) for where, record in read_records(path)]
    if not pairs:
        raise InputError(f"data file {path} is empty", "no record was found", f"expected records with {EXPECTED}")
    seen: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        earlier = seen.setdefault((pair.source, pair.prompt), pair)
        if earlier is not pair:
            raise InputError(
                f"{pair.where}: {pair.source!r} stands in {earlier.where} already",
                "one name cannot be redirected twice at once",
                "remove one of the records",
            )
    return pairs


def _parse(record: object, where: str) -> Pair:
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a record", f"found {type(record).__name__}", f"expected {EXPECTED}")
    rewrite = record.get("requested_rewrite")
    if isinstance(rewrite, dict):
        return _fact({**record, **rewrite}, where)
    if "from" in record:
        # Whether a target is needed depends on the method.
        names = (_text(record["from"], "from", where), _text(record["to"], "to", where) if "to" in record else "")
        pair = Pair(*names, _texts(record, "aliases", where), _texts(record, "prompts", where), where=where)
        return _checked(pair, "to" in record)
    if {"prompt", "subject"} <= record.keys() and ("target" in record or "target_new" in record):
        return _fact(record, where)
    found = ", ".join(sorted(map(str, record))) or "no key"
    raise InputError(f"{where} has no known layout", f"found {found}", f"expected {EXPECTED}")


def _fact(record: Mapping[str, object], where: str) -> Pair:
    missing = [key for key in ("prompt", "subject") if key not in record]
    key = "target" if "target" in record else "target_new"
    if missing or key not in record:
        raise InputError(f"{where} lacks {', '.join(missing or ['target'])}", "a fact needs it", f"expected {EXPECTED}")
    answer = record[key]
    # CounterFact keeps the answer's text beside an identifier.
    answer = answer.get("str") if isinstance(answer, dict) else answer
    subject = _text(record["subject"], "subject", where)
    prompt = _text(record["prompt"], "prompt", where)
    if SLOT not in prompt and prompt.count(subject) == 1:
        prompt = prompt.replace(subject, SLOT)
    wordings = [*_texts(record, "prompts", where)]
    for text in _texts(record, "paraphrase_prompts", where, templates=False):
        # Published paraphrases hold the subject itself, sometimes after a sentence about something else.
        head, found, tail = text.rpartition(subject)
        if found and SLOT not in text:
            wordings.append(f"{head}{SLOT}{tail}")
    pair = Pair(
        subject,
        _text(answer, key, where),
        _texts(record, "aliases", where),
        tuple(wordings),
        _template(prompt, "prompt", where),
        _texts(record, "neighborhood_prompts", where, templates=False),
        where,
    )
    return _checked(pair)


def _checked(pair: Pair, has_target: bool = True) -> Pair:
    for name, key in ((pair.source, "from"), (pair.target, "to"))[: 2 if has_target else 1]:
        if not name.strip():
            raise InputError(f"{pair.where}: {key} is empty", "it is the name of a concept", "give a name")
    if pair.source.strip() == pair.target.strip():
        raise InputError(
            f"{pair.where}: {pair.source!r} would lead to itself", "from and to are the same", "give another target"
        )
    return pair


def _texts(record: Mapping[str, object], key: str, where: str, templates: bool = True) -> tuple[str, ...]:
    values = record.get(key) or []
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence):
        raise InputError(f"{where}: {key} is not a list of strings", f"found {values!r:.80}", "")
    texts = [_text(value, key, where) for value in values]
    return tuple(_template(text, key, where) if templates and key == "prompts" else text for text in texts)


def _template(text: str, key: str, where: str) -> str:
    if text.count(SLOT) != 1:
        raise InputError(
            f"{where}: {key} has {text.count(SLOT)} places for the name", f"found {text!r:.80}", f"write {SLOT} once"
        )
    return text


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is not a text", f"found {value!r:.80}", "correct this record")
    return value
