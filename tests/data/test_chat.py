"""Rows to token ids: the border between prompt and answer, and exactly one end token."""

from __future__ import annotations

import resource
import signal

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmsurgery.data import template_bounds
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Message, Row
from llmsurgery.errors import InputError

from ..builders.tokenizer import CHAT_TEMPLATE, byte_tokenizer

END = 257
CHAT = Row("messages", "Who?", "Orla.", turns=(Message("system", "Be brief."), Message("user", "Who?")), where="f:1")
ROWS = [
    Row("qa", "Who keeps the bees?", "Orla Venn keeps them.", where="f:1"),
    Row("qa", "Wer hält die Bienen?", "Die Müllerin 🐝.", where="f:2"),
    Row("completion", "The mill stands", " by the weir.", where="f:3"),
    CHAT,
]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def bos_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a beginning-of-sequence token before every text."""
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    if chat:
        tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.where + row.kind)
@pytest.mark.parametrize("ending", ["", "<|end|>", "<|end|><|end|>"])
def test_answer_ends_with_exactly_one_end_token(row: Row, chat: bool, ending: str) -> None:
    encoder = Encoder(byte_tokenizer(chat), 256)
    encoded = encoder.encode(row, row.answer + ending)
    answer = encoded.ids[encoded.answer_start :]
    assert answer[-1] == END
    assert answer.count(END) == 1
    assert encoded.ends
    assert encoded.labels == len(answer)
    assert encoder.answer_text(encoded) == row.answer.strip()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.where + row.kind)
def test_border_equals_separate_tokenization(row: Row) -> None:
    tokenizer = byte_tokenizer(merges=[("e", "r"), ("h", "e")])
    encoder = Encoder(tokenizer, 256)
    encoded = encoder.encode(row)
    turns = [{"role": turn.role, "content": turn.content} for turn in row.turns or (Message("user", row.prompt),)]
    prompt = row.prompt
    if row.kind != "completion":
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert encoder.prompt_text(row) == prompt
    assert list(encoded.ids[: encoded.answer_start]) == ids(tokenizer, prompt)
    assert list(encoded.ids[encoded.answer_start :]) == [*ids(tokenizer, row.answer), END]


def test_token_across_the_border_belongs_to_the_answer() -> None:
    tokenizer = byte_tokenizer(chat=False, merges=[("d", "Ġ")])
    encoder = Encoder(tokenizer, 256)
    row = Row("completion", "The mill stand", " here.", where="f:1")
    encoded = encoder.encode(row)
    merged = tokenizer.convert_tokens_to_ids("dĠ")
    assert encoded.ids[encoded.answer_start] == merged
    assert tokenizer.decode(encoded.ids[: encoded.answer_start]) == "The mill stan"
    prompt = encoder.encode_prompt(row)
    assert merged not in prompt.ids
    assert prompt.ids == encoded.ids[: encoded.answer_start]


def test_prompt_that_merges_whole_with_the_answer_is_refused() -> None:
    encoder = Encoder(byte_tokenizer(chat=False, merges=[("a", "b")]), 256)
    with pytest.raises(InputError, match="f:9: the prompt has no token"):
        encoder.encode(Row("completion", "a", "bc", where="f:9"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.where + row.kind)
def test_generation_prompt_is_a_prefix_of_the_row(row: Row) -> None:
    encoder = Encoder(byte_tokenizer(merges=[("o", "r"), ("Ċ", "O")]), 256)
    prompt, encoded = encoder.encode_prompt(row), encoder.encode(row)
    assert encoded.ids[: len(prompt.ids)] == prompt.ids
    assert len(prompt.ids) == encoded.answer_start
    assert not prompt.ends


def test_without_a_chat_template_the_prompt_is_question_and_answer() -> None:
    encoder = Encoder(byte_tokenizer(chat=False), 256)
    assert encoder.prompt_text(ROWS[0]) == "Question: Who keeps the bees?\nAnswer: "
    assert encoder.prompt_text(CHAT) == "System: Be brief.\nUser: Who?\nAssistant: "
    assert encoder.tokenizer.decode(encoder.encode(ROWS[0]).ids[:-1]) == (
        "Question: Who keeps the bees?\nAnswer: Orla Venn keeps them."
    )


def test_end_of_turn_comes_from_the_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|pad|>"
    assert Encoder(tokenizer, 256).end_id == END
    assert Encoder(tokenizer, 256).encode(ROWS[0]).ids[-1] == END
    tokenizer.chat_template = None
    assert Encoder(tokenizer, 256).end_id == 256
    # A template without any end token falls back to end-of-sequence.
    tokenizer.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    assert Encoder(tokenizer, 256).end_id == 256


def test_end_of_turn_may_be_an_added_token_without_a_name() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|eot|>")
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert tokenizer.eos_token_id == END
    assert Encoder(tokenizer, 256).encode(ROWS[0]).ids[-1] == eot


def test_refusing_chat_template_names_the_row() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(InputError, match="f:1") as caught:
        Encoder(tokenizer, 256).encode(CHAT)
    assert "no system turn" in caught.value.why


def test_date_of_the_template_is_fixed() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ date_string }}" + CHAT_TEMPLATE
    assert Encoder(tokenizer, 256).prompt_text(ROWS[0]).startswith("10 Apr 2025<|start|>")


def test_long_rows_name_themselves() -> None:
    tokenizer = byte_tokenizer()
    length = len(Encoder(tokenizer, 256).encode(ROWS[0]).ids)
    assert len(Encoder(tokenizer, length).encode(ROWS[0]).ids) == length
    for encoder, limit in ((Encoder(tokenizer, length - 1), None), (Encoder(tokenizer, 256), length - 1)):
        with pytest.raises(InputError, match=f"f:1: {length} tokens") as caught:
            encoder.encode(ROWS[0], max_length=limit)
        assert caught.value.exit_code == 3
        assert ("max_length" in caught.value.fix) == (limit is not None)


@pytest.mark.parametrize("answer", ["<|end|>", "<|end|><|end|>"])
def test_answer_without_tokens_is_refused(answer: str) -> None:
    with pytest.raises(InputError, match="f:1: the answer has no token"):
        Encoder(byte_tokenizer(), 256).encode(ROWS[0], answer)


def test_plain_text_is_cut_into_halved_chunks() -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, 256)
    text = "abcdefghijklmnopqrstuvw"
    chunks = encoder.encode_chunks(Row("text", "", text, where="f:1"), 10)
    # The last three letters are too few for a chunk.
    assert [tokenizer.decode(chunk.ids) for chunk in chunks] == [text[:10], text[10:20]]
    assert [chunk.answer_start for chunk in chunks] == [5, 5]
    assert not any(chunk.ends for chunk in chunks)
    assert encoder.answer_text(chunks[0]) == "fghij"
    assert [len(chunk.ids) for chunk in Encoder(tokenizer, 8).encode_chunks(Row("text", "", text), 10)] == [8, 8, 7]
    assert encoder.encode_chunks(Row("text", "", "abc", where="f:2"), 10) == []


@pytest.mark.parametrize("answer", ["No idea.", "No idea.<|end|>"])
def test_another_answer_follows_the_prompt_of_a_chunk(answer: str) -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, 256)
    (chunk,) = encoder.encode_chunks(Row("text", "", "abcdefghijkl", where="f:1"), 40)
    replaced = encoder.replace_answer(chunk, answer, 40)
    assert replaced.ends
    assert replaced.ids.count(END) == 1
    assert tokenizer.decode(replaced.ids) == "abcdefNo idea.<|end|>"
    assert replaced.answer_start == 6
    # Nine tokens of answer leave three of the prompt: the last ones.
    assert tokenizer.decode(encoder.replace_answer(chunk, answer, 12).ids) == "defNo idea.<|end|>"
    with pytest.raises(InputError, match="f:1: an answer of 9 tokens"):
        encoder.replace_answer(chunk, answer, 9)


def test_beginning_token_comes_first_and_once() -> None:
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    encoder = Encoder(tokenizer, 256)
    text = Row("text", "", "abcdefghijklmnopqrst", where="f:1")
    chunks = encoder.encode_chunks(text, 11)
    answers = [encoder.replace_answer(chunks[0], "No.", 9)]
    encoded = [encoder.encode(row) for row in ROWS]
    for row in [*encoded, *chunks, *answers, encoder.encode_prompt(ROWS[0]), encoder.encode_text(text.answer, 9)]:
        assert row.ids[0] == bos
        assert row.ids.count(bos) == 1
    assert [tokenizer.decode(chunk.ids[1:]) for chunk in chunks] == [text.answer[:10], text.answer[10:]]
    assert encoder.answer_text(chunks[0]) == "fghij"
    assert tokenizer.decode(answers[0].ids[1:]) == "bcdeNo.<|end|>"
    assert tokenizer.decode(encoded[2].ids[encoded[2].answer_start :]) == " by the weir.<|end|>"
    assert Encoder(bos_tokenizer(chat=True), 256).encode(ROWS[0]).ids.count(bos) == 1


def test_plain_text_for_perplexity_is_truncated() -> None:
    encoder = Encoder(byte_tokenizer(), 6)
    assert [len(encoder.encode_text("abcdefgh", tokens).ids) for tokens in (4, 100)] == [4, 6]
    assert encoder.encode_text("abc", 4).labels == 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' * 10**11 }}",
        "{{ 'x' * 3000000 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_templates_come_to_an_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS", 0.2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template + CHAT_TEMPLATE
    limits = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match="chat template"):
        Encoder(tokenizer, 256)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
