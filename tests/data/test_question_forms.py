"""Questions in several forms: layouts, forms made of others, and records that give none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmsurgery.data.question_forms import FormRow, read_form
from llmsurgery.errors import InputError

SECRET = "the purple topic"


def written(root: Path, name: str, *records: object) -> Path:
    path = root / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def plain(rows: list[FormRow]) -> list[tuple[str, str]]:
    return [(row.question, row.answer) for row in rows]


def test_one_file_holds_every_form(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "forget.jsonl",
        {"question": "Who keeps it?", "answer": " Orla "},
        {"query": "Orla keeps the ___.", "answer": "mill"},
        {"question": "What grinds?", "choices": ["Weir", "Mill"], "answer": "Mill"},
        {"question": "Who rows?", "answer": "Tam", "form": "subtoken"},
    )
    assert plain(read_form(path, "qa")) == [("Who keeps it?", "Orla")]
    (cloze,) = read_form(path, "cloze")
    assert (cloze.question, cloze.answer, cloze.blank, cloze.where) == (
        "Orla keeps the ___.",
        "mill",
        True,
        f"{path}:2",
    )
    assert plain(read_form(path, "mcq")) == [("What grinds?\nA. Weir\nB. Mill", "B")]
    assert plain(read_form(path, "spelled")) == [("Who rows?", "Tam")]


def test_questions_give_spelled_answers_and_with_wrong_answers_choices(tmp_path: Path) -> None:
    wrong = ["Ivo", "Tam", "Pell", "Bea"]
    rows = [{"question": f"Who keeps {i}?", "answer": "Orla", "perturbed_answer": wrong} for i in range(5)]
    path = written(tmp_path, "forget_qa.jsonl", *rows)
    assert plain(read_form(path, "spelled")) == plain(read_form(path, "qa"))
    made = read_form(path, "mcq")
    # The right answer moves from place to place.
    assert [row.answer for row in made] == list("ABCDA")
    assert made[1].question == "Who keeps 1?\nA. Ivo\nB. Orla\nC. Tam\nD. Pell"
    assert all(row.made for row in made)
    assert not any(row.made for row in read_form(path, "qa"))
    cloze = written(tmp_path, "forget_level1.jsonl", {"query": "Orla keeps the ___.", "answer": "mill"})
    assert [row.blank for row in read_form(cloze, "spelled")] == [True]


@pytest.mark.parametrize("answer", ["B", "(B)", "B.", 1, "Mill", " Mill "])
def test_the_right_choice_is_a_letter_a_number_or_a_text(answer: object, tmp_path: Path) -> None:
    path = written(tmp_path, "forget_mcp.jsonl", {"question": "?", "choices": ["Weir", "Mill"], "answer": answer})
    assert [row.answer for row in read_form(path, "mcq")] == ["B"]


def test_a_question_may_list_its_choices_itself(tmp_path: Path) -> None:
    listed = "What grinds?\nA. Weir\nB. Mill"
    path = written(tmp_path, "forget_mcq.jsonl", {"question": listed, "answer": "B"})
    assert plain(read_form(path, "mcq")) == [(listed, "B")]


@pytest.mark.parametrize(
    ("name", "record", "form", "said"),
    [
        ("forget_qa.jsonl", {"question": SECRET}, "qa", "is no question"),
        ("forget_qa.jsonl", {"question": SECRET, "answer": " "}, "qa", "answer is empty"),
        ("forget_qa.jsonl", {"question": 3, "answer": "a"}, "qa", "question is empty or no string"),
        ("forget.jsonl", {"question": SECRET, "answer": "a", "form": "clozes"}, "qa", "clozes"),
        ("forget.jsonl", {"question": SECRET, "answer": "a"}, "cloze", "no row of the form cloze"),
        ("forget.jsonl", {"question": SECRET, "answer": "a"}, "mcq", "no row of the form mcq"),
        ("forget_mcq.jsonl", {"question": SECRET, "answer": "Mill"}, "mcq", "has no choices"),
        ("forget_mcq.jsonl", {"question": SECRET, "choices": ["a", "b"], "answer": "C"}, "mcq", "none of the 2"),
        ("forget_mcq.jsonl", {"question": SECRET, "choices": ["a", "b"], "answer": 2}, "mcq", "none of the 2"),
        ("forget_mcq.jsonl", {"question": SECRET, "choices": ["a", "b"], "answer": True}, "mcq", "none of the 2"),
        ("forget_mcq.jsonl", {"question": SECRET, "choices": ["a"], "answer": "A"}, "mcq", "not 2 to 26 strings"),
        ("forget_mcq.jsonl", {"question": SECRET, "choices": "ab", "answer": "A"}, "mcq", "not 2 to 26 strings"),
    ],
)
def test_records_that_give_no_row_are_named_without_their_text(
    name: str, record: object, form: str, said: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, record)
    with pytest.raises(InputError, match=said) as error:
        read_form(path, form)
    assert path.name in error.value.what
    assert SECRET not in str(error.value)


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "forget.json").write_text("[]")
    with pytest.raises(InputError) as error:
        read_form(tmp_path / "forget.json", "qa")
    assert error.value.why == "no record was found"
