"""ORT: worked numbers, prompts character by character, scores against the stock model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.question_forms import FormRow
from llmsurgery.evaluate.config import EvaluationConfig, settle
from llmsurgery.evaluate.figures import Measurement
from llmsurgery.evaluate.suites import ort_figures
from llmsurgery.evaluate.suites.ort import OrtConfig
from llmsurgery.evaluate.suites.ort_figures import (
    OrtEncoding,
    answer_text,
    encode_ort,
    gap_figure,
    prompt_text,
    user_turn,
)

OWN = settle(EvaluationConfig())
LETTERS = OrtConfig()
QUESTION = FormRow(" Who keeps the mill? ", "Orla Moss")
CLOZE = FormRow("The mill is kept by ___.", "Orla Moss", True)
CHOICE = FormRow("Who keeps the mill?\nA. Ivo\nB. Orla Moss", "B")


def test_worked_score(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]) -> None:
    """Token probabilities .5, .25 and .8 give their geometric mean, not the joint probability .1."""
    rows = [np.log([0.5, 0.25, 0.8]), np.log([0.9])]
    monkeypatch.setattr(ort_figures, "score_rows", lambda *_: rows)
    root = checkpoints["gpt2"]
    encoder, measured = Encoder(load_tokenizer(root), 256), Measurement({})
    model = load_model(root, torch.float32, torch.device("cpu"))
    encoding = OrtEncoding({"forget_qa": [Encoded((1, 2), 1, False)] * 2}, {"forget_qa": 1}, LETTERS)
    found = encoding.measure(model, encoder, measured, 8, Silent())
    assert measured.samples["ort.forget_qa"].tolist() == pytest.approx([0.464159, 0.9], abs=1e-6)
    figure = found["ort.forget_qa"]
    assert figure.number == pytest.approx((0.464159 + 0.9) / 2, abs=1e-6)
    assert (figure.n, figure.interval is not None, figure.detail["shortened_prompts"]) == (2, True, 1)
    # One form alone has no gap.
    assert found["ort.form_gap"].value is None


def test_gap_is_the_difference_of_relative_drops() -> None:
    before = {"qa": np.array([0.8, 0.4]), "cloze": np.array([0.5, 0.5]), "mcq": np.array([0.9])}
    after = {"qa": np.array([0.1, 0.2]), "cloze": np.array([0.5, 0.25]), "mcq": np.array([0.99])}
    figure = gap_figure(before, after)
    drops = {"qa": 0.75, "cloze": 0.25, "mcq": -0.1}
    assert figure.detail["drops"] == pytest.approx(drops)
    assert figure.number == pytest.approx(0.85)
    # A single row cannot be resampled.
    assert (figure.n, figure.interval) == (5, None)
    pair = gap_figure({name: before[name] for name in ("qa", "cloze")}, {name: after[name] for name in ("qa", "cloze")})
    assert pair.number == pytest.approx(0.5)
    # Rows before and after are drawn together: drops of qa lie in [.5, .875], of cloze in [0, .5].
    low, high = pair.interval or (math.nan, math.nan)
    assert 0 <= low < 0.5 < high <= 0.875
    same = gap_figure(before, before)
    assert same.number == 0
    nothing = gap_figure({"qa": np.zeros(2), "cloze": np.ones(2)}, {"qa": np.zeros(2), "cloze": np.ones(2)})
    assert nothing.value is None
    assert nothing.detail["drops"] == {"qa": None, "cloze": 0}


def test_turns_are_those_of_the_benchmark() -> None:
    asked = "Question: Who keeps the mill?\n"
    assert user_turn(QUESTION, "qa", LETTERS) == f"Please briefly answer the following question.\n{asked}"
    assert user_turn(CLOZE, "cloze", LETTERS) == (
        "Please complete the blank in the following question.\nQuestion: The mill is kept by ___.\n"
    )
    assert user_turn(CHOICE, "mcq", LETTERS) == (
        "Please answer the following multiple choice question. Just provide the letter of the correct answer.\n"
        "Question: Who keeps the mill?\nA. Ivo\nB. Orla Moss\n"
    )
    spelled = "Write the answer character by character, each on a new line.\n"
    assert user_turn(QUESTION, "spelled", LETTERS) == f"{spelled}{user_turn(QUESTION, 'qa', LETTERS)}"
    assert user_turn(CLOZE, "spelled", LETTERS) == f"{spelled}{user_turn(CLOZE, 'cloze', LETTERS)}"


def test_an_example_stands_for_the_instruction_and_a_line_asks_for_the_answer_alone() -> None:
    example = user_turn(QUESTION, "spelled", OrtConfig(spelling="example"))
    assert "T\no\nk\ny\no\n" in example
    assert "character by character" not in example
    assert example.endswith(user_turn(QUESTION, "qa", LETTERS))
    assert user_turn(QUESTION, "qa", OrtConfig(spelling="example")) == user_turn(QUESTION, "qa", LETTERS)
    direct = OrtConfig(direct=True)
    for form, row in (("qa", QUESTION), ("cloze", CLOZE), ("mcq", CHOICE), ("spelled", QUESTION)):
        first, _, rest = user_turn(row, form, direct).partition("\n")
        assert "without any explanation" in first
        assert rest == user_turn(row, form, LETTERS)


def test_answers() -> None:
    assert answer_text(QUESTION, "qa") == " Orla Moss"
    assert answer_text(CHOICE, "mcq") == " B"
    assert answer_text(QUESTION, "spelled") == "O\nr\nl\na\nM\no\ns\ns"


def test_prompts_go_through_the_chat_template_where_there_is_one(checkpoints: dict[str, Path]) -> None:
    encoder = Encoder(load_tokenizer(checkpoints["gpt2"]), 512)
    turn = user_turn(QUESTION, "qa", LETTERS)
    encoder.tokenizer.chat_template = None
    assert prompt_text(encoder, QUESTION, "qa", LETTERS) == f"{turn}Answer:"
    assert prompt_text(encoder, QUESTION, "spelled", LETTERS).endswith("Question: Who keeps the mill?\nAnswer:\n")
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert prompt_text(encoder, QUESTION, "qa", LETTERS) == f"<user>{turn.strip()}</s><assistant>Answer:"
    assert prompt_text(encoder, QUESTION, "spelled", LETTERS).endswith("</s><assistant>Answer:\n")


@pytest.mark.parametrize("architecture", ["tied_llama", "gpt2"])
def test_scores_equal_those_of_the_stock_model(architecture: str, checkpoints: dict[str, Path]) -> None:
    root = checkpoints[architecture]
    encoder = Encoder(load_tokenizer(root), 256)
    model = load_model(root, torch.float32, torch.device("cpu"))
    rows = {"forget_qa": [QUESTION, QUESTION], "forget_spelled": [CLOZE], "retain_mcq": [CHOICE]}
    encoding = encode_ort(encoder, rows, LETTERS, settle(EvaluationConfig(rows=1)))
    assert {name: len(cell) for name, cell in encoding.cells.items()} == dict.fromkeys(rows, 1)
    assert set(encoding.shortened.values()) == {0}
    found = encoding.measure(model, encoder, Measurement({}), 3, Silent())
    assert found["ort.form_gap"].number == 0
    for name, (row, *_) in rows.items():
        form = name.partition("_")[2]
        prompt = encoder.tokenizer(prompt_text(encoder, row, form, LETTERS))["input_ids"]
        ids = [*prompt, *encoder.tokenizer(answer_text(row, form), add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [float(scores[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
        assert found[f"ort.{name}"].number == pytest.approx(math.exp(sum(wanted) / len(wanted)), rel=1e-4)


def test_a_long_prompt_loses_its_first_tokens_and_is_counted(checkpoints: dict[str, Path]) -> None:
    encoder = Encoder(load_tokenizer(checkpoints["gpt2"]), 64)
    encoding = encode_ort(encoder, {"forget_spelled": [QUESTION]}, LETTERS, OWN)
    assert encoding.shortened == {"forget_spelled": 1}
    (row,) = encoding.cells["forget_spelled"]
    assert len(row.ids) == 64
    assert encoder.tokenizer.decode(row.ids).endswith("Answer:\nO\nr\nl\na\nM\no\ns\ns")
