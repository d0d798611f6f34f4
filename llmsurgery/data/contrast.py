"""Texts that differ in an attribute: pairs in the layout of CrowS-Pairs, plain pairs, and texts with labels.

CrowS-Pairs (arXiv 2010.00133) has `sent_more`, the sentence that is more of a stereotype, `sent_less`, which differs in
the group alone, `stereo_antistereo`, and `bias_type`. Where that says "stereo", the first sentence is about the group
that is talked down; where it says "antistereo", the second is. So each sentence has a label too: whether it is about
that group. Plain pairs have `first` and `second`; labelled texts have `text` and `label`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.data.records import read_records
from llmsurgery.errors import InputError

EXPECTED = "sent_more/sent_less (CrowS-Pairs), first/second, or text/label"


@dataclass(frozen=True)
class Contrast:
    """One text or pair of texts.

    Attributes:
        texts: The texts; of a pair, the one with the label comes first.
        labels: Label of each text; of a pair the group with a sign, "+" and "-".
        group: What a pair is about (`bias_type`); pairs of different groups have different labels.
        stereotype: Number of the text that is more of a stereotype; None where that is unknown.
        where: "file:line" for messages to the user.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    group: str = ""
    stereotype: int | None = None
    where: str = ""

    @property
    def is_pair(self) -> bool:
        """Whether it has two texts that differ in the attribute alone."""
        return len(self.texts) == 2


def read_contrast(path: str | Path) -> list[Contrast]:
    """Read a file of contrasting texts.

    Args:
        path: As for `llmsurgery.data.records.read_records`.

    Raises:
        InputError: Missing, empty, malformed, of mixed layouts, or all texts have one label; no message holds a text.
    """
    rows = [_parse(record, where) for where, record in read_records(path)]
    if len(rows) < 2:
        raise InputError(
            f"data file {path} has {len(rows)} record", "a contrast needs two or more", f"expected {EXPECTED}"
        )
    if len({row.is_pair for row in rows}) > 1:
        other = next(row for row in rows if row.is_pair != rows[0].is_pair)
        raise InputError(f"{other.where} has another layout than the records before", "", "keep to one of them")
    labels = {label for row in rows for label in row.labels}
    if len(labels) < 2:
        raise InputError(
            f"all texts of {path} have the label {next(iter(labels))!r:.40}",
            "an attribute shows only in texts that differ in it",
            "give texts of two labels or more",
        )
    return rows


def _parse(record: object, where: str) -> Contrast:
    if not isinstance(record, Mapping):
        raise InputError(f"{where} is not a record", f"found {type(record).__name__}", f"expected {EXPECTED}")
    if {"sent_more", "sent_less"} <= record.keys():
        return _stereotype(record, where)
    if {"first", "second"} <= record.keys():
        pair = (_text(record, "first", where), _text(record, "second", where))
        return _different(Contrast(pair, ("+", "-"), where=where))
    if {"text", "label"} <= record.keys():
        label = record["label"]
        if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
            raise InputError(f"{where}: label is no word or number", f"found {label!r:.20}", "correct this record")
        return Contrast((_text(record, "text", where),), (str(label).strip(),), where=where)
    found = ", ".join(sorted(map(str, record))) or "no key"
    raise InputError(f"{where} has no known layout", f"found {found}", f"expected {EXPECTED}")


def _stereotype(record: Mapping[str, object], where: str) -> Contrast:
    more, less = _text(record, "sent_more", where), _text(record, "sent_less", where)
    direction = record.get("stereo_antistereo", "stereo")
    if direction not in ("stereo", "antistereo"):
        raise InputError(f"{where}: stereo_antistereo is {direction!r:.20}", "known are stereo and antistereo", "")
    group = str(record.get("bias_type", ""))
    labels = (f"{group}+", f"{group}-")
    # The first text is always about the group that is talked down.
    if direction == "stereo":
        return _different(Contrast((more, less), labels, group, 0, where))
    return _different(Contrast((less, more), labels, group, 1, where))


def _different(row: Contrast) -> Contrast:
    if row.texts[0] == row.texts[1]:
        raise InputError(f"{row.where}: both texts are the same", "there is no contrast", "remove this record")
    return row


def _text(record: Mapping[str, object], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is not a text", "there is nothing to read", "correct or remove this record")
    return value.strip()
