"""The audit of order: the same tokens by two kinds of attention, what flips, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.cli.app import run
from llmsurgery.data.chat import Encoder
from llmsurgery.data.choices import Question
from llmsurgery.data.mcq import TEMPLATE, Choices
from llmsurgery.errors import InputError
from llmsurgery.evaluate.letters import encode_letters
from llmsurgery.evaluate.listings import encode_listings, order_figures, split_prompt

from ..builders.tokenizer import byte_tokenizer
from ..conftest import write_asked

ENCODER = Encoder(byte_tokenizer(), 256)
CHOICES = Choices(tuple(Question(f"Number {i}?", ("one", "two", "six"), i % 3, f"f:{i}") for i in range(4)), 3)


def test_pieces_join_to_the_ordinary_prompt() -> None:
    letters = encode_letters(ENCODER, CHOICES, TEMPLATE)
    found = encode_listings(ENCODER, CHOICES, TEMPLATE, letters.tokens)
    # Three orders and two further listings of the first.
    assert [len(prompts) for prompts in found.prompts] == [5] * 4
    for question, prompts in enumerate(found.prompts):
        for order in range(3):
            assert prompts[order].ids == letters.prompts[3 * question + order].ids
    text = ENCODER.tokenizer.decode(found.prompts[0][3].ids)
    assert "Number 0?\nB. two\nC. six\nA. one\nAnswer with" in text
    assert found.answers.tolist() == [0, 1, 2, 0]


def test_lines_are_ended_where_the_template_does_not() -> None:
    prompt, _ = split_prompt(ENCODER, "{question}\n{options} Which?", "Up", ("x", "y"), "f:1")
    assert ENCODER.tokenizer.decode(prompt.ids) == "Up\nA. x\nB. y\n Which?"
    with pytest.raises(InputError, match="nothing stands before") as caught:
        split_prompt(ENCODER, "{options}\n{question}", "Up", ("x", "y"), "f:1")
    assert caught.value.fix


def test_flips_are_counted_by_option_and_by_listing() -> None:
    data = encode_listings(ENCODER, CHOICES, TEMPLATE, ((65,), (66,), (67,)))
    # Always the first letter: another option in every order, the same one in every listing.
    first = np.zeros((4, 5, 3))
    first[..., 0] = 1
    # Always what is right, but in one listing of one question.
    known = np.zeros((4, 5, 3))
    for number, answer in enumerate(data.answers):
        for order in range(3):
            known[number, order, (answer - order) % 3] = 1
        known[number, 3:, answer] = 1
    known[1, 4] = [1, 0, 0]
    figures = order_figures(first, known, data)
    assert {name: figure.value for name, figure in figures.items()} == {
        "mcq.listing_flips": 0.0, "pine.accuracy": 1.0, "pine.rstd": 0.0, "pine.order_flips": 0.0,
        "pine.listing_flips": 0.25,
    }  # fmt: skip
    assert figures["pine.order_flips"].detail == {"causal": 1.0}
    assert figures["pine.accuracy"].detail["causal"] == pytest.approx(1 / 3)
    assert figures["pine.rstd"].detail["causal"] == pytest.approx(100 * np.std([1, 0, 0]))


def test_eval_asks_both_ways(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mcq = str(write_asked(tmp_path)["mcq"])
    words = ["eval", str(checkpoints["tied_llama"]), "--mcq", mcq, "--position-invariant", "--set", "text_rows=1"]
    words += ["--dtype", "float32"]
    assert run([*words, "--json", "--require", "pine.listing_flips<=0"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["evaluation"]["position_invariant"] is True
    metrics = document["models"][0]["metrics"]
    assert metrics["pine.listing_flips"]["value"] == 0
    assert metrics["pine.accuracy"]["n"] == 4
    # The tokenizer splits at bytes: pieces and whole prompts are the same tokens.
    assert metrics["pine.accuracy"]["detail"]["causal"] == pytest.approx(metrics["mcq.accuracy"]["value"])
    assert metrics["pine.order_flips"]["detail"]["causal"] == pytest.approx(metrics["mcq.order_flips"]["value"])
    assert run(words) == 0
    assert "no checkpoint can hold it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("model", "given", "code", "says"),
    [
        ("gpt2", True, 4, "learned positions"),
        ("tied_llama", False, 2, "--position-invariant needs --mcq"),
    ],
)
def test_eval_refuses(
    model: str,
    given: bool,
    code: int,
    says: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ["--mcq", str(write_asked(tmp_path)["mcq"])] if given else []
    assert run(["eval", str(checkpoints[model]), *data, "--position-invariant"]) == code
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_gate_needs_the_option(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mcq = str(write_asked(tmp_path)["mcq"])
    assert run(["eval", str(checkpoints["tied_llama"]), "--mcq", mcq, "--require", "pine.order_flips<=1"]) == 2
    assert "--position-invariant of eval" in " ".join(capsys.readouterr().err.split())


def test_methods_says_that_no_weight_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "pine"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pine (eval)" in shown
    assert "needs: --mcq, --position-invariant; result: none" in shown
    assert "This is no edit of weights." in shown
    assert run(["methods", "--json"]) == 0
    assert [one["export"] for one in json.loads(capsys.readouterr().out) if one["name"] == "pine"] == ["none"]
    assert run(["debias", "--method", "pine"]) == 2
    assert "none of its weights" in capsys.readouterr().err
