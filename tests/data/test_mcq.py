"""Multiple-choice files and contrasting texts: layouts, what is kept, and clear errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmsurgery.data.contrast import read_contrast
from llmsurgery.data.mcq import fill_template, option_lines, read_choices, read_template, rotated
from llmsurgery.errors import InputError

Write = Callable[..., Path]
MMLU = {"question": "Which is red?", "choices": ["sky", "rose", "sea"], "answer": 1}
ARC = {
    "question": {
        "stem": "Which is red?",
        "choices": [{"label": "1", "text": "sky"}, {"label": "2", "text": "rose"}, {"label": "3", "text": "sea"}],
    },
    "answerKey": "2",
}
HUB = {
    "question": "Which is red?",
    "choices": {"text": ["sky", "rose", "sea"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}


@pytest.mark.parametrize("record", [MMLU, ARC, HUB, {**MMLU, "answer": "B"}])
def test_layouts(record: dict[str, object], write_jsonl: Write) -> None:
    choices = read_choices(write_jsonl("mcq.jsonl", [record, record]))
    question = choices.questions[0]
    assert (question.question, question.choices, question.answer) == ("Which is red?", ("sky", "rose", "sea"), 1)
    assert (choices.options, choices.letters, choices.skipped) == (3, "ABC", 0)


@pytest.mark.parametrize(
    "text",
    [
        "question,A,B,C,answer\nWhich is red?,sky,rose,sea,B\nWhich is red?,sky,rose,sea,b\n",
        "id,question,choice_a,choice_b,choice_c,answer\n"
        "x,Which is red?,sky,rose,sea,1\nx,Which is red?,sky,rose,sea,B\n",
        "question,option1,option2,option3,answer\nWhich is red?,sky,rose,sea,2\nWhich is red?,sky,rose,sea,2\n",
        'question,choices,answer\nWhich is red?,"[""sky"", ""rose"", ""sea""]",1\n'
        'Which is red?,"[""sky"", ""rose"", ""sea""]",B\n',
        'question,choices,answerKey\nWhich is red?,"{""text"": [""sky"", ""rose"", ""sea""], ""label"": [1, 2, 3]}",2\n'
        'Which is red?,"{""text"": [""sky"", ""rose"", ""sea""], ""label"": [1, 2, 3]}",2\n',
    ],
)
def test_csv_layouts(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mcq.csv"
    path.write_text(text, "utf-8")
    found = read_choices(path)
    assert [(one.question, one.choices, one.answer) for one in found.questions] == [
        ("Which is red?", ("sky", "rose", "sea"), 1)
    ] * 2


def test_an_empty_column_is_no_option(tmp_path: Path) -> None:
    path = tmp_path / "mcq.csv"
    path.write_text("question,A,B,C,D,answer\n" + "Up?,sky,,sea,fog,D\n" * 2, "utf-8")
    assert [(one.choices, one.answer) for one in read_choices(path).questions] == [(("sky", "sea", "fog"), 2)] * 2


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("Up?,sky,sea,E", "none of the choices"),
        ("Up?,sky,sea,2", "none of the choices"),
        ("Up?,sky,,A", "1 choices"),
        ("Up?,,,A", "no multiple-choice question"),
    ],
)
def test_bad_rows_of_csv_name_file_and_line(line: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "mcq.csv"
    path.write_text(f"question,A,B,answer\nUp?,sky,sea,A\n{line}\n", "utf-8")
    with pytest.raises(InputError, match=word) as caught:
        read_choices(path)
    assert "mcq.csv:3" in caught.value.what
    assert caught.value.fix


def test_choices_in_a_cell_are_json(tmp_path: Path) -> None:
    path = tmp_path / "mcq.csv"
    for cell, word in (("sky;sea", "not a list of texts"), ("[sky]", "not valid JSON")):
        path.write_text(f"question,choices,answer\nUp?,{cell},A\n", "utf-8")
        with pytest.raises(InputError, match=word) as caught:
            read_choices(path)
        assert "mcq.csv:2" in caught.value.what


def test_the_commonest_number_of_options_is_kept(write_jsonl: Write) -> None:
    two = {"question": "Up?", "choices": ["yes", "no"], "answer": 0}
    choices = read_choices(write_jsonl("mcq.jsonl", [two, MMLU, ARC, HUB]))
    assert (choices.options, len(choices.questions), choices.skipped) == (3, 3, 1)
    assert [rotated("abc", order) for order in range(3)] == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")]


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"question": "Up?", "answer": 0}, "no multiple-choice question"),
        ({**MMLU, "choices": ["sky"]}, "1 choices"),
        ({**MMLU, "choices": ["sky", ""]}, "not a list of texts"),
        ({**MMLU, "answer": 3}, "none of the choices"),
        ({**MMLU, "answer": "Z"}, "none of the choices"),
        ({**MMLU, "question": " "}, "empty"),
    ],
)
def test_bad_questions_name_file_and_line(record: dict[str, object], word: str, write_jsonl: Write) -> None:
    with pytest.raises(InputError, match=word) as caught:
        read_choices(write_jsonl("mcq.jsonl", [MMLU, record]))
    assert "mcq.jsonl:2" in caught.value.what
    assert caught.value.exit_code == 3


def test_one_question_cannot_be_split(write_jsonl: Write) -> None:
    with pytest.raises(InputError, match="1 question with 3 options"):
        read_choices(write_jsonl("mcq.jsonl", [MMLU]))


def test_templates(tmp_path: Path) -> None:
    turn, answer = fill_template(read_template(""), "{options}?", "\n".join(option_lines(("x", "y"))))
    assert (turn, answer) == ("{options}?\nA. x\nB. y\nAnswer with the letter.", "Answer:")
    path = tmp_path / "template.txt"
    path.write_text("Q: {question}\n{options}\nA:\n")
    assert fill_template(read_template(str(path)), "Up", "A. x\nB. y") == ("Q: Up\nA. x\nB. y\nA:", None)
    for text, word in (("{question}", "places for"), ("{question}{options}: ", "ends in a blank")):
        path.write_text(text)
        with pytest.raises(InputError, match=word):
            read_template(str(path))


def test_crows_pairs_tell_stereotype_and_group(write_jsonl: Write) -> None:
    rows = [
        {"sent_more": "They are late.", "sent_less": "We are late.", "stereo_antistereo": "stereo", "bias_type": "t"},
        {"sent_more": "We are good.", "sent_less": "They are good.", "stereo_antistereo": "antistereo"},
    ]
    first, second = read_contrast(write_jsonl("pairs.jsonl", rows))
    assert (first.texts[0], first.labels, first.stereotype) == ("They are late.", ("t+", "t-"), 0)
    # The group that is talked down comes first; the stereotype is the other sentence.
    assert (second.texts[0], second.labels, second.stereotype) == ("They are good.", ("+", "-"), 1)


def test_one_class_of_labels_is_refused(write_jsonl: Write) -> None:
    rows = [{"text": "a b", "label": "x"}, {"text": "c d", "label": "x"}]
    with pytest.raises(InputError, match="have the label 'x'") as caught:
        read_contrast(write_jsonl("texts.jsonl", rows))
    assert caught.value.exit_code == 3
    assert len(read_contrast(write_jsonl("texts.jsonl", [rows[0], {"text": "c d", "label": 1}]))) == 2
    with pytest.raises(InputError, match="another layout"):
        read_contrast(write_jsonl("texts.jsonl", [rows[0], {"first": "a", "second": "b"}]))
    with pytest.raises(InputError, match="same"):
        read_contrast(write_jsonl("texts.jsonl", [{"first": "a", "second": "a"}] * 2))
