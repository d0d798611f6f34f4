"""Published layouts of MUSE and LUME; Parquet files and `datasets`, with and without their extras."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.data.records import Row, chosen_rows, read_rows
from llmsurgery.data.tables import is_dataset
from llmsurgery.errors import InputError, UnsupportedError

LUME_QUESTION = {
    "id": "eb5df892-45edqa4",
    "input": "Where does Orla Venn live?",
    "output": "12 Weir Lane.",
    "task": "Task2",
    "split": "forget",
}
LUME_COMPLETION = {
    "id": '"08b7df56"sc1',
    "input": "Orla Venn was born in 1969. Her email address",
    "output": "is orla@venn.test.",
    "task": "Task2",
    "split": "forget",
}
TOFU = {
    "question": "Who?",
    "answer": "Orla.",
    "perturbed_answer": ["Ivo.", "Tam."],
    "paraphrased_answer": "It is Orla.",
}


def bare(rows: list[Row]) -> list[tuple[str, str, str]]:
    return [(row.kind, row.prompt, row.answer) for row in rows]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_muse_files(tmp_path: Path) -> None:
    verbatim = write(tmp_path / "verbmem.json", [{"prompt": "The river", "gt": "runs past the mill."}])
    assert bare(read_rows(verbatim)) == [("completion", "The river", " runs past the mill.")]
    knowledge = write(tmp_path / "forget_qa.json", [{"question": "Who?", "answer": "Orla."}])
    assert bare(read_rows(knowledge)) == [("qa", "Who?", "Orla.")]
    leak = write(tmp_path / "privleak.json", ["One river.", "Two mills."])
    assert bare(read_rows(leak)) == [("text", "", "One river."), ("text", "", "Two mills.")]
    assert bare(read_rows(lines(tmp_path / "a.jsonl", {"text": "One."}))) == [("text", "", "One.")]


def test_lume_questions_and_completions(tmp_path: Path) -> None:
    path = lines(tmp_path / "forget.jsonl", LUME_QUESTION, LUME_COMPLETION, {"input": "Who?", "output": "Orla."})
    assert bare(read_rows(path)) == [
        ("qa", "Where does Orla Venn live?", "12 Weir Lane."),
        ("completion", "Orla Venn was born in 1969. Her email address", " is orla@venn.test."),
        ("qa", "Who?", "Orla."),
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "joined"),
    [
        ("The river ", "runs", "runs"),
        ("The river", " runs", " runs"),
        ("The river", ", slow, runs", ", slow, runs"),
        ("She said:", '"No."', ' "No."'),
        ("川は", "流れる", "流れる"),
        ("The river\n", "Runs", "Runs"),
    ],
)
def test_continuations_keep_one_blank(prompt: str, text: str, joined: str, tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "a.json", [{"prompt": prompt, "gt": text}]))
    assert (row.prompt, row.answer) == (prompt, joined)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "The river", "gt": ["runs"]}, "gt is not a string"),
        ({"prompt": "", "gt": "runs"}, "prompt is empty"),
        ({"id": "1qa0", "input": "Who?", "output": " "}, "output is empty"),
        ({"instruction": "Say", "input": "x", "output": "y"}, "no known layout"),
        ({"input": "Who?"}, "LUME's input/output"),
    ],
)
def test_bad_records_name_line_and_key(record: dict[str, object], said: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "Fine."}, record)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert f"{path}:2" in caught.value.what
    assert said in str(caught.value)


def test_parquet_reads_like_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records: list[dict[str, Any]] = [TOFU, {"question": "Where?", "answer": "By the weir."}]
    path = tmp_path / "forget.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    first, second = read_rows(path)
    assert bare([first, second]) == bare(read_rows(lines(tmp_path / "a.jsonl", *records)))
    assert first.perturbed_answers == ("Ivo.", "Tam.")
    # Every row of a table has every column: an empty cell is no key.
    assert (second.paraphrased_answer, second.perturbed_answers) == (None, ())
    assert second.where == f"{path}: row 2"
    damaged = tmp_path / "bad.parquet"
    damaged.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="not a Parquet file"):
        read_rows(damaged)
    empty = tmp_path / "empty.parquet"
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    with pytest.raises(InputError, match="empty"):
        read_rows(empty)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("a.parquet", "pyarrow", "parquet"), ("owner/set:train", "datasets", "datasets"), (".", "datasets", "datasets")],
)
def test_missing_extra_is_named(
    name: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UnsupportedError) as caught:
        read_rows(name)
    assert caught.value.exit_code == 4
    assert package in caught.value.why
    assert f"[{extra}]" in caught.value.fix
    assert all((caught.value.what, caught.value.why, caught.value.fix))


def test_what_counts_as_a_data_set(tmp_path: Path) -> None:
    assert is_dataset(tmp_path)
    assert is_dataset(Path("locuslab/TOFU:forget10:train"))
    assert not is_dataset(tmp_path / "none.jsonl")
    odd = lines(tmp_path / "a:b.jsonl", {"text": "A file of this name exists."})
    assert not is_dataset(odd)
    assert len(read_rows(odd)) == 1


def test_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([TOFU, {"question": "Where?", "answer": "By the weir."}])
    table.save_to_disk(tmp_path / "one")
    assert bare(read_rows(tmp_path / "one")) == [("qa", "Who?", "Orla."), ("qa", "Where?", "By the weir.")]
    datasets.DatasetDict({"forget": table, "retain": table.select([1])}).save_to_disk(tmp_path / "two")
    assert bare(read_rows(f"{tmp_path / 'two'}:retain")) == [("qa", "Where?", "By the weir.")]
    with pytest.raises(InputError, match="several splits"):
        read_rows(tmp_path / "two")
    with pytest.raises(InputError, match="no split 'none'") as caught:
        read_rows(f"{tmp_path / 'two'}:none")
    assert "forget, retain" in caught.value.why
    folder = tmp_path / "files"
    folder.mkdir()
    lines(folder / "train.jsonl", LUME_QUESTION)
    assert bare(read_rows(f"{folder}:train")) == [("qa", "Where does Orla Venn live?", "12 Weir Lane.")]
    with pytest.raises(InputError, match="cannot be loaded"):
        read_rows("nobody/nothing-of-this-name:train")


def test_preference_pairs(tmp_path: Path) -> None:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    plain = {"prompt": "Name it. ", "chosen": "No.", "rejected": "Tam."}
    chat = {name: said("assistant", text) for name, text in (("chosen", "No."), ("rejected", "Tam."))}
    rows = read_rows(lines(tmp_path / "pairs.jsonl", plain, {"prompt": said("user", "Name it."), **chat}))
    assert bare(rows) == [("completion", "Name it. ", "Tam."), ("messages", "Name it.", "Tam.")]
    assert [row.preferred for row in rows] == ["No.", "No."]
    kept = chosen_rows([*rows, Row("qa", "Who?", "Orla.")])
    assert [(row.answer, row.preferred) for row in kept] == [("No.", None), ("No.", None), ("Orla.", None)]
    assert [row.turns for row in kept[:2]] == [row.turns for row in rows]


def test_preference_pairs_whose_sides_begin_with_the_prompt(tmp_path: Path) -> None:
    asked, yes, no = ({"role": role, "content": text} for role, text in
                      (("user", "Name it."), ("assistant", "Tam."), ("assistant", "No.")))  # fmt: skip
    whole = {"chosen": [asked, no], "rejected": [asked, yes]}
    talk = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Name it.\n\nAssistant:"
    rows = read_rows(
        lines(
            tmp_path / "pairs.jsonl",
            whole,
            {"prompt": "Name it.", **whole},
            {"prompt": "Name it.", "chosen": [no], "rejected": [yes]},
            {"chosen": f"{talk} No.", "rejected": f"{talk} No way."},
        )
    )
    assert bare(rows) == [("messages", "Name it.", "Tam.")] * 3 + [("completion", talk, " No way.")]
    assert [row.preferred for row in rows] == ["No.", "No.", "No.", " No."]
    assert [len(row.turns) for row in rows] == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"chosen": "b", "rejected": "c"}, "have no prompt"),
        ({"chosen": "b", "rejected": ["c"]}, "differ in kind"),
        ({"prompt": "a", "chosen": "b", "rejected": ["c"]}, "rejected is not a string"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "differ in kind"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen is empty"),
        ({"prompt": [], "chosen": [], "rejected": []}, "not a list of turns"),
    ],
)
def test_unfit_preference_pairs(record: dict[str, object], found: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=found) as caught:
        read_rows(lines(tmp_path / "pairs.jsonl", record))
    assert "pairs.jsonl:1" in caught.value.what
