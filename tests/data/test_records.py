"""Data files: every layout in every format, and errors that say where and what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmsurgery.data.records import Message, Row, read_lines, read_rows
from llmsurgery.errors import InputError, SurgeryError

TOFU = {
    "question": "Who keeps the bees?",
    "answer": "Orla Venn, of the mill.",
    "paraphrased_answer": "Orla Venn does.",
    "perturbed_answer": ["Ivo, the baker.", 'Tam "the dog".'],
    "paraphrased_question": "Whose bees are they?",
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Orla."},
]
LAYOUTS: dict[str, tuple[dict[str, object], Row]] = {
    "tofu": (
        dict(TOFU),
        Row(
            "qa",
            "Who keeps the bees?",
            "Orla Venn, of the mill.",
            paraphrased_question="Whose bees are they?",
            paraphrased_answer="Orla Venn does.",
            perturbed_answers=("Ivo, the baker.", 'Tam "the dog".'),
        ),
    ),
    "plain question": ({"question": "Who?", "answer": "Orla."}, Row("qa", "Who?", "Orla.")),
    "completion": (
        {"prompt": "The mill stands", "completion": " by the weir.\n"},
        Row("completion", "The mill stands", " by the weir.\n"),
    ),
    "messages": (
        {"messages": MESSAGES},
        Row("messages", "Who?", "Orla.", turns=(Message("system", "Be brief."), Message("user", "Who?"))),
    ),
    "text": ({"text": "One river.\nTwo mills."}, Row("text", "", "One river.\nTwo mills.")),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def plain(rows: list[Row]) -> list[Row]:
    """Rows without their origin."""
    return [
        Row(
            row.kind,
            row.prompt,
            row.answer,
            row.turns,
            row.paraphrased_question,
            row.paraphrased_answer,
            row.perturbed_answers,
        )
        for row in rows
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_read_the_same_from_jsonl_and_json(layout: str, tmp_path: Path) -> None:
    record, expected = LAYOUTS[layout]
    lines = write(tmp_path / "a.jsonl", f"{json.dumps(record)}\n{json.dumps(record)}\n")
    for path in (
        lines,
        write(tmp_path / "a.json", json.dumps([record, record], indent=1)),
        write(tmp_path / "b.JSON", json.dumps({"data": [record, record], "version": 1})),
    ):
        assert plain(read_rows(path)) == [expected, expected]
    assert [row.where for row in read_rows(lines)] == [f"{lines}:1", f"{lines}:2"]


def test_json_list_of_strings_is_plain_text(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", '["One.", "Two."]'))
    assert plain(rows) == [Row("text", "", "One."), Row("text", "", "Two.")]


def test_csv_with_quoted_commas_lines_and_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.csv",
        "question,answer,paraphrased_answer,perturbed_answer\r\n"
        '"Who, then?","Orla Venn, of\r\nthe ""mill"".",,"[""Ivo, the baker"", ""Tam""]"\r\n'
        "Where?,By the weir\u2028or near it.,At the weir.,\r\n",
    )
    first, second = read_rows(path)
    assert (first.prompt, first.answer) == ("Who, then?", 'Orla Venn, of\nthe "mill".')
    assert first.paraphrased_answer is None
    assert first.perturbed_answers == ("Ivo, the baker", "Tam")
    assert (second.answer, second.paraphrased_answer) == ("By the weir\u2028or near it.", "At the weir.")
    assert second.perturbed_answers == ()
    assert second.where == f"{path}:4"


def test_text_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n\nOne river,\ntwo mills.\n\n\n  \nThree boats.\n \t\r\nFour.\n")
    assert [row.answer for row in read_rows(path)] == ["One river,\ntwo mills.", "Three boats.", "Four."]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_bom_line_ends_blank_lines_and_unicode_separators(ending: str, tmp_path: Path) -> None:
    record = {"question": "Wer?", "answer": "Zeile\u2028eins\u2029\x85 und Öl"}
    text = ending.join(["", json.dumps(record, ensure_ascii=False), "  ", json.dumps(record), ""])
    path = write(tmp_path / "a.jsonl", "\ufeff" + text)
    assert [row.answer for row in read_rows(path)] == [record["answer"]] * 2
    assert [row.where for row in read_rows(path)] == [f"{path}:2", f"{path}:4"]
    table = write(tmp_path / "a.csv", f"\ufeffquestion,answer{ending}Wer?,Öl{ending}{ending}")
    assert plain(read_rows(table)) == [Row("qa", "Wer?", "Öl")]


GOOD = '{"question": "Who?", "answer": "Orla."}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "Who?", "answer": ', ["not valid JSON"]),
        ('{"question": "Who?", "answer": ' + "9" * 5000 + "}", ["not valid JSON"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('["a", "b"]', ["not a record", "found list", "question/answer"]),
        ("17", ["not a record", "found int", "question/answer"]),
        ('{"q": "Who?", "a": "Orla."}', ["found a, q", "question/answer, prompt/completion, messages or text"]),
        ('{"question": "Who?"}', ["found question", "question/answer"]),
        ("{}", ["found no key"]),
        ('{"question": "Who?", "answer": "  "}', ["answer is empty"]),
        ('{"question": "", "answer": "Orla."}', ["question is empty"]),
        ('{"question": "Who?", "answer": 42}', ["answer is not a string", "found int"]),
        ('{"question": "Who?", "answer": null}', ["answer is not a string", "found NoneType"]),
        ('{"question": "Who?", "answer": "half \\ud83d"}', ["answer is not valid Unicode"]),
        ('{"question": "Who?", "answer": "Orla.", "perturbed_answer": [1]}', ["perturbed_answer"]),
        ('{"question": "Who?", "answer": "Orla.", "perturbed_answer": [""]}', ["perturbed_answer is empty"]),
        ('{"prompt": "a", "completion": ["b"]}', ["completion is not a string", "found list"]),
        ('{"text": "\\n"}', ["text is empty"]),
        ('{"messages": []}', ["messages"]),
        ('{"messages": "hello"}', ["messages", "found str"]),
        ('{"messages": [{"role": "user"}]}', ["no role or content"]),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', ["do not end with an answer", "'user'"]),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', ["do not end with an answer"]),
    ],
)
def test_bad_line_is_named_with_what_was_found_and_expected(line: str, said: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", f"{GOOD}\n{line}\n{GOOD}")
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert caught.value.exit_code == 3
    assert f"{path}:3" in caught.value.what
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "where", "said"),
    [
        ("question,answer\nWho?,Orla\nWhere?,By the weir, or near\n", ":3", "header is question, answer"),
        ("question,answer\nWho?,Orla\nWhere?\n", ":3", "header is question, answer"),
        ("q,a\nWho?,Orla\n", ":2", "found a, q"),
        ("question,answer\nWho?,\n", ":2", "found question"),
        ('question,answer\nWho?,"Orla" Venn\n', ":2", "not valid CSV"),
        ('question,answer,perturbed_answer\nWho?,Orla,"[""Ivo"", "\n', ":2", "not valid JSON"),
    ],
)
def test_bad_csv_names_the_line(content: str, where: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert f"{path}{where}" in caught.value.what
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"rows": []}', "holds no list"),
        ("a.json", '{"data": {"question": "Who?"}}', "holds no list"),
        ("a.json", "[{]", "line 1 column 3"),
        ("a.json", '[{"text": "One."}, 5]', "record 2"),
        ("a.json", "[]", "empty"),
        ("a.jsonl", "", "empty"),
        ("a.jsonl", "\n \n", "empty"),
        ("a.csv", "question,answer\n", "empty"),
        ("a.csv", "", "empty"),
        ("a.txt", " \n\n", "empty"),
        ("a.jsonl", GOOD.encode() + b"\xff\xfe", "not UTF-8"),
        ("a.csv", "question,answer\nWer?,Öl\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_unusable_file_is_an_input_error(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.what
    assert said in str(caught.value)


def test_missing_file_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(SurgeryError, match=r"unknown ending '\.xlsx'") as caught:
        read_rows(write(tmp_path / "a.xlsx", b"PK"))
    assert caught.value.exit_code == 3
    assert ".jsonl" in caught.value.why


def test_lists_of_sentences(tmp_path: Path) -> None:
    assert read_lines(write(tmp_path / "a.txt", "\ufeffPass.\r\n\r\n  No comment. \n")) == ["Pass.", "No comment."]
    for path in (write(tmp_path / "b.txt", "\n"), tmp_path / "none.txt"):
        with pytest.raises(InputError):
            read_lines(path)
