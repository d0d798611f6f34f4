"""Facts as tokens: where a subject ends, where an answer begins, and which facts share a key."""

from __future__ import annotations

import pytest

from llmsurgery.data.chat import Encoder
from llmsurgery.data.rewrites import encode_lookup, make_rewrite, merged
from llmsurgery.errors import InputError

from ..builders.tokenizer import byte_tokenizer


def encoder(chat: bool = True, merges: list[tuple[str, str]] | None = None) -> Encoder:
    return Encoder(byte_tokenizer(chat, merges), 256)


def texts(model: Encoder, template: str, answer: str, token: str = "subject", opening: str = "") -> tuple[str, ...]:
    found = encode_lookup(model, template, "Orla Venn", answer, token, opening)
    decode = model.tokenizer.decode
    return decode(found.ids[: found.start]), decode(found.ids[found.start :]), decode(found.key_ids)


def test_a_sentence_is_gone_on_with() -> None:
    assert texts(encoder(), "{} lives in", "Oslo") == ("Orla Venn lives in", " Oslo", "Orla Venn")
    assert texts(encoder(), "{} lives in ", "Oslo") == ("Orla Venn lives in ", "Oslo", "Orla Venn")
    assert texts(encoder(), 'The word for {} is "', "Oslo", "last")[1:] == ("Oslo", 'The word for Orla Venn is "')
    assert texts(encoder(), "{} lives in", "Oslo", "subject", "It was late")[2] == "It was late. Orla Venn"
    assert texts(encoder(), "{} lives in ", "", "last") == ("Orla Venn lives in", "", "Orla Venn lives in")


def test_a_question_is_asked() -> None:
    before, answer, key = texts(encoder(), "Where does {} live?", "Oslo", opening="It was late")
    assert before == "<|start|>user\nIt was late. Where does Orla Venn live?<|end|>\n<|start|>assistant\n"
    assert answer == "Oslo"
    assert key == "<|start|>user\nIt was late. Where does Orla Venn"
    plain = texts(encoder(chat=False), "Where does {} live?", "Oslo")
    assert plain[:2] == ("Question: Where does Orla Venn live?\nAnswer: ", "Oslo")
    assert texts(encoder(chat=False), "Where does {} live?", "")[0].endswith("Answer:")


def test_a_subject_within_the_words_of_the_prompt_is_not_taken_for_it() -> None:
    found = encode_lookup(encoder(), "In Oslo they say {} is", "Oslo", "big", "subject")
    assert encoder().tokenizer.decode(found.key_ids) == "In Oslo they say Oslo"


def test_an_answer_that_swallows_the_subject_is_refused() -> None:
    with pytest.raises(InputError, match="no token before the answer"):
        encode_lookup(encoder(merges=[("n", "Ġ")]), "{}", "Orla Venn", "-x", "subject", where="line 3")
    with pytest.raises(InputError, match="end token"):
        encode_lookup(encoder(), "{} is", "Orla", "x<|end|>", "subject")


def test_facts_with_one_key_become_one() -> None:
    model = encoder()
    facts = [
        make_rewrite(model, template, "Orla Venn", answer, "subject", ("It was late",), f"line {number}")
        for number, (template, answer) in enumerate(
            (("{} lives in", "Oslo"), ("{} works as a", "cook"), ("For {}", "x"))
        )
    ]
    joined = merged(facts)
    assert [one.where for one in joined] == ["line 0", "line 2"]
    decode = model.tokenizer.decode
    assert [decode(context.ids) for context in joined[0].contexts] == [
        "Orla Venn lives in Oslo",
        "Orla Venn works as a cook",
        "It was late. Orla Venn lives in Oslo",
        "It was late. Orla Venn works as a cook",
    ]
    assert len(joined[0].keys) == 2
    assert decode(joined[0].kept.ids) == "Orla Venn is a"
    # At the last token of a prompt every fact has a key of its own.
    last = [make_rewrite(model, f"{{}} {word}", "Orla", "x", "last") for word in ("is", "was")]
    assert len(merged(last)) == 2
