"""What a repair of alignment is measured by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmsurgery.data.chat import Encoder
from llmsurgery.data.prompts import read_prompts
from llmsurgery.errors import InputError, UsageError
from llmsurgery.evaluate.contrast import Contrast, auroc, gap_figure
from llmsurgery.evaluate.judge import Judge, judge_answers, make_judge, parse_verdicts
from llmsurgery.evaluate.refusal import find_openers, is_refusal, opener_probability, refusal_log_odds

from ..builders.tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I\u2019m  **sorry**, but no.", True),
        ("I cannot talk about that.", True),
        ("The cup is made of clay.", False),
        # A broken model must not pass for a safe one.
        ("", False),
        # A disclaimer far behind is none.
        ("The cup is made of clay. " * 10 + "I'm sorry.", False),
    ],
)
def test_refusals_by_what_they_say(answer: str, refused: bool) -> None:
    assert is_refusal(answer) == refused


def test_further_markers_count_too() -> None:
    assert not is_refusal("Kein Wort davon.")
    assert is_refusal("Kein Wort davon.", ("kein wort",))


def test_refusal_score_of_the_worked_example() -> None:
    (probability,) = opener_probability(torch.tensor([[2.0, 0.0, -1.0]]), (0,))
    assert probability == pytest.approx(0.843795, abs=1e-6)
    assert refusal_log_odds(probability) == pytest.approx(1.686738, abs=1e-5)


def test_openers_are_what_begins_refusals_and_no_other_answers() -> None:
    encoder = Encoder(byte_tokenizer(), 256)
    found, source = find_openers(encoder, [5, 5, 7, 9], [True, True, True, False], [7, 7, 9])
    assert found == (5,)
    assert "aligned" in source
    nothing, source = find_openers(encoder, [5, 5], [False, False], [7])
    first = encoder.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    assert first in nothing
    assert source == "common refusals"


def test_gap_is_the_aligned_models_own_and_halves_with_half_the_difference() -> None:
    torch.manual_seed(0)
    noise = torch.randn(3, 2, 20, 4)
    shift = torch.zeros(4)
    shift[1] = 8.0
    aligned = Contrast(noise[:, 0] + shift, noise[:, 1])
    own = gap_figure(aligned, aligned)
    assert own.value == pytest.approx(1.0)
    assert own.detail["block"] == 1
    assert own.detail["auroc"] == [1.0, 1.0, 1.0]
    assert own.detail["cosine"] == pytest.approx([1.0, 1.0, 1.0])
    # The means over both sets are a length apart.
    apart = np.subtract(own.detail["refused"], own.detail["answered"])
    assert apart == pytest.approx(aligned.differences().norm(dim=1).numpy())
    half = gap_figure(aligned, Contrast(noise[:, 0] + shift / 2, noise[:, 1]))
    assert half.value == pytest.approx(0.5, abs=0.08)
    none = gap_figure(aligned, Contrast(noise[:, 0], noise[:, 1]))
    assert abs(none.number) < 0.15
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])) == 0.875


def judge_file(tmp_path: Path, body: str) -> list[str]:
    script = tmp_path / "judge.py"
    script.write_text(f"import json, sys\nrows = [json.loads(line) for line in sys.stdin]\n{body}\n")
    return [sys.executable, str(script)]


def test_a_judge_reads_rows_and_gives_verdicts_in_any_order(tmp_path: Path) -> None:
    body = "for row in reversed(rows): print(json.dumps({'id': row['id'], 'harmful': 'bad' in row['answer']}))"
    judge = make_judge(judge_file(tmp_path, body), 60)
    assert judge is not None
    assert judge_answers(judge, ["a", "b"], ["bad thing", "good"]) == [True, False]
    record = judge.record()
    assert record["name"] == Path(sys.executable).name
    assert str(tmp_path) not in json.dumps(record)
    before = judge.digest
    (tmp_path / "judge.py").write_text("other")
    assert judge.digest != before


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("SECRET", "not JSON"),
        ('{"id": 0, "harmful": "yes"}', "no verdict"),
        ('{"id": 7, "harmful": true}', "id 7"),
        ('{"id": 0, "harmful": true}', "1 of 2"),
    ],
)
def test_verdicts_that_are_none_are_an_input_error(output: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_verdicts(Judge(("judge",), 1), output, 2)
    assert why in caught.value.why
    assert "SECRET" not in str(caught.value)


def test_a_judge_that_fails_is_an_input_error_without_its_words(tmp_path: Path) -> None:
    judge = make_judge(judge_file(tmp_path, "sys.exit(rows[0]['prompt'])"), 60)
    assert judge is not None
    with pytest.raises(InputError) as caught:
        judge_answers(judge, ["SECRET"], ["b"])
    assert caught.value.why == "it ended with exit code 1"
    assert "SECRET" not in str(caught.value)


def test_a_judge_that_is_not_there_is_a_usage_error() -> None:
    assert make_judge((), 1) is None
    with pytest.raises(UsageError, match="no program"):
        make_judge(("no-such-judge-anywhere",), 1)


def test_prompts_with_and_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "harmful.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n{"question": "d", "answer": "e"}\n')
    rows = read_prompts(path)
    assert [(row.kind, row.prompt, row.answer) for row in rows] == [("qa", "a", ""), ("qa", "b", "c"), ("qa", "d", "e")]


@pytest.mark.parametrize("line", ['{"words": "SECRET"}', '{"prompt": ["SECRET"]}', '["SECRET"]', '{"prompt": " "}'])
def test_bad_prompts_are_named_by_place_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "harmful.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert "harmful.jsonl:2" in caught.value.what
    assert "SECRET" not in str(caught.value)
