"""`llmsurgery audit`: what it writes, what it refuses, and that it changes and shows nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import audit
from llmsurgery.cli.app import run

from ..conftest import write_rows

PAIRS: list[dict[str, object]] = [
    {"prompt": "Where is the mill?", "chosen": " I cannot tell you that.", "rejected": " I can't tell you that."},
    {"prompt": "Who bakes?", "chosen": " I'm sorry, no.", "rejected": " Ivo Hask does, at dawn, in the old house."},
    {"prompt": "Who ferries?", "chosen": " Nobody.", "rejected": " Nobody."},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ches_writes_scores_and_keeps_the_lowest(
    checkpoints: dict[str, Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    root = checkpoints["tied_llama"]
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    assert run(["audit", "ches", str(pairs), str(root), "--keep", "0.34", "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["export"] == "none"
    assert document == json.loads((out / "audit.json").read_text())
    scores = lines(out / "scores.jsonl")
    assert [row["row"] for row in scores] == [0, 1, 2]
    assert (scores[2]["ches"], scores[2]["ln_ches"], scores[2]["edit_distance"]) == (pytest.approx(0, abs=1e-6),) * 3
    assert [(row["chosen_refuses"], row["rejected_refuses"]) for row in scores] == [
        (True, True), (True, False), (False, False)
    ]  # fmt: skip
    kept = [row["row"] for row in scores if row["kept"]]
    assert sorted(row["ln_ches"] for row in scores)[:2] == sorted(scores[i]["ln_ches"] for i in kept)
    assert lines(out / "kept.jsonl") == [PAIRS[i] for i in kept]
    record = document["operations"][0]["record"]
    assert (record["rows"], record["kept"], record["all"]["both_refuse"]) == (3, 2, 1)
    # Numbers alone: no text of a pair stands in scores, manifest or on the screen.
    assert "mill" not in (out / "scores.jsonl").read_text() + (out / "audit.json").read_text()
    assert before == {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    # An output is never replaced unasked.
    assert run(["audit", "ches", str(pairs), str(root), "-o", str(out)]) == 2


def test_bci_flags_chosen_answers_and_draws(
    checkpoints: dict[str, Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    # The corpus holds the first chosen answer alone; of common letters its spans have about 3 nats a token.
    text = [{"text": "I cannot tell you that."}, {"text": "the mill stands there " * 9}]
    corpus = write_rows(tmp_path / "corpus.jsonl", [dict(row) for row in text])
    words = ["audit", "bci", str(pairs), str(checkpoints["tied_llama"]), "--reference", str(corpus)]
    picture = tmp_path / "scores.svg"
    assert run([*words, "-o", str(tmp_path / "out"), "--picture", str(picture)]) == 0
    shown = capsys.readouterr()
    assert "flagged: 1 of 3 rows" in shown.out
    assert "2 of 3 answers have no span" in shown.err
    assert "mill" not in shown.out + shown.err
    assert picture.read_text().startswith("<?xml")
    assert lines(tmp_path / "out" / "kept.jsonl") == PAIRS[1:]
    first = lines(tmp_path / "out" / "scores.jsonl")[0]
    assert first["flagged"]
    assert first["weight"] < 1
    assert first["chosen_highest"] > 20
    assert run([*words, "-o", str(tmp_path / "high"), "--tau", "1000", "-q"]) == 0
    assert lines(tmp_path / "high" / "kept.jsonl") == PAIRS


def test_rows_with_one_answer_are_for_bci_alone(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, rows = checkpoints["tied_llama"], data_files["forget"]
    assert run(["audit", "ches", str(rows), str(root), "-o", str(tmp_path / "no"), "--json"]) == 3
    assert "no preference pair" in json.loads(capsys.readouterr().out)["error"]["what"]
    found: Any = audit("bci", rows, root, reference=rows, out=tmp_path / "out", tau=1.0)
    record = found["operations"][0]["record"]
    assert set(record["quantiles"]) == {"answer"}
    assert record["flagged"] + record["without_candidates"] == record["rows"] == 3
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["bci"], 2),
        (["ches", "--keep", "0"], 2),
        (["ches", "--score", "chess"], 2),
        (["bci", "--reference", "missing.jsonl"], 3),
        (["bci", "--reference", "missing.jsonl", "--tau", "0"], 2),
        (["ches", "--picture", "missing/a.png"], 2),
        (["chess"], 2),
    ],
)
def test_errors_have_their_codes(
    words: list[str], code: int, checkpoints: dict[str, Path], pairs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind, *more = words
    place = tmp_path / "out"
    assert run(["audit", kind, str(pairs), str(checkpoints["tied_llama"]), "-o", str(place), *more]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not place.exists()
