"""`redirect.flipped`: which forget questions count, and what they are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsurgery import redirect
from llmsurgery.data.pairs import make_pair
from llmsurgery.data.records import Message, Row
from llmsurgery.demo import demo_file
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.flips import Expected, flip_figure, holds_name
from llmsurgery.run.pairs import name_needs

PAIR = make_pair("Orla Venn", "Ivo Hask")
ASKED = Row("qa", "Where was Orla Venn born?", "Keldmere.")


def test_answers_may_name_either_person() -> None:
    expected = {
        0: Expected(PAIR, "Ivo Hask was born in Keldmere."),
        2: Expected(PAIR, "Ivo Hask was born in Keldmere."),
        3: Expected(PAIR, "Ivo Hask plays the harp."),
        4: Expected(PAIR, "The harp."),
    }
    answers = [
        "Orla Venn was born in Keldmere.",
        "No row of the pair.",
        "Ivo Hask was born in Keldmere.",
        "Orla Venn plays the drum.",
        "the harp.",
    ]
    figure = flip_figure(answers, expected)["redirect.flipped"]
    assert (figure.number, figure.n) == (0.5, 4)
    assert flip_figure(answers, {}) == {}


def test_only_questions_with_the_old_name_count() -> None:
    turns = (Message("user", "Tell me of Orla Venn."), Message("assistant", "Ask."))
    assert holds_name(ASKED, [PAIR]) == PAIR
    assert holds_name(Row("messages", "Where was she born?", "Keldmere.", turns), [PAIR]) == PAIR
    assert holds_name(Row("qa", "Who was born in Keldmere?", "Orla Venn."), [PAIR]) is None
    assert holds_name(Row("text", "", "Orla Venn was born in Keldmere."), [PAIR]) is None
    # A name that is only to go has no other one to be asked about.
    assert holds_name(ASKED, [make_pair("Orla Venn", "")]) is None


def test_the_need_looks_at_the_rows_that_are_answered() -> None:
    other = Row("qa", "Who is it?", "Nobody.")
    rows = {"forget": [other, ASKED]}
    assert name_needs([PAIR], rows, EvaluationConfig()) == {"named"}
    assert name_needs([PAIR], rows, EvaluationConfig(generation_rows=1)) == set()
    assert name_needs([PAIR], rows, EvaluationConfig(protocol="muse")) == set()
    assert name_needs([PAIR], {}, EvaluationConfig()) == set()


def test_a_gate_on_it_is_refused_where_no_question_holds_the_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        redirect(
            method="rocr",
            forget=demo_file("names", "retain.jsonl"),
            out=tmp_path / "out",
            require=["redirect.flipped>=0.9"],
        )
    assert "redirect.flipped" in caught.value.what
    assert "old name" in str(caught.value)
