"""Greedy answers and ROUGE-L recall."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.records import Row
from llmsurgery.evaluate.generation import greedy_answers, is_mostly_ascii, rouge_l_recall

QUESTIONS = ["Who?", "Where is the old mill?", "When does the ferry leave, and from which side?", "Tam or Ivo?"]


def load(root: Path) -> tuple[PreTrainedModel, Encoder, list[Encoded]]:
    encoder = Encoder(load_tokenizer(root), 256)
    prompts = [encoder.encode_prompt(Row("qa", question, "x")) for question in QUESTIONS]
    return load_model(root, torch.float32, torch.device("cpu")), encoder, prompts


def greedy_by_hand(model: PreTrainedModel, prompt: Encoded, ends: set[int], new_tokens: int) -> list[int]:
    """The most probable token again and again, without cache, batch or padding."""
    ids = list(prompt.ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
    return ids[len(prompt.ids) :]


def answers(model: PreTrainedModel, encoder: Encoder, prompts: list[Encoded], batch_size: int = 4) -> list[str]:
    return greedy_answers(model, encoder, prompts, 12, batch_size, Silent(), "")


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_answers_are_greedy_whatever_the_batch(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoder, prompts = load(checkpoints[architecture])
    tokens = [greedy_by_hand(model, prompt, {encoder.end_id}, 12) for prompt in prompts]
    expected = [encoder.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in tokens]
    assert len(set(expected)) > 1
    for batch_size in (1, 3, 4):
        assert answers(model, encoder, prompts, batch_size) == expected
    assert answers(model, encoder, prompts[::-1]) == expected[::-1]


def chain(model: PreTrainedModel, sentence: list[int]) -> None:
    """Turn the model into a chain: after token `sentence[i]` comes `sentence[i + 1]`, whatever was before."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        head.zero_()
        for here, following in pairwise(sentence):
            head[following] += embedding[here] / embedding[here].norm()


def test_generation_stops_at_the_end_of_the_turn_and_of_the_sequence(checkpoints: dict[str, Path]) -> None:
    model, encoder, _ = load(checkpoints["sharded_llama"])
    prompt = encoder.encode_prompt(Row("qa", "Who?", "x"))
    text = [encoder.tokenizer.convert_tokens_to_ids(letter) for letter in "Tam"]
    newline = prompt.ids[-1]
    # 257 ends the turn in the template; 256 plays the end of a sequence.
    encoder.tokenizer.eos_token_id = 256
    for end in (257, 256):
        chain(model, [newline, *text, end])
        assert encoder.end_id == 257
        assert answers(model, encoder, [prompt]) == ["Tam"]
    chain(model, [newline, *text, text[0]])
    assert answers(model, encoder, [prompt]) == ["TamTamTamTam"]


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.5},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0},
        {"bad_words_ids": [[number] for number in range(200)], "min_new_tokens": 12, "min_length": 200},
        {"suppress_tokens": list(range(150)), "begin_suppress_tokens": list(range(100)), "forced_eos_token_id": 200},
        {"eos_token_id": [65, 66, 67, 68], "max_length": 3, "max_time": 0.0, "stop_strings": ["a"]},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
)
def test_generation_config_of_the_checkpoint_is_set_aside(own: dict[str, object], checkpoints: dict[str, Path]) -> None:
    model, encoder, prompts = load(checkpoints["sharded_llama"])
    expected = answers(model, encoder, prompts)
    kept = model.generation_config = GenerationConfig(**own)
    assert answers(model, encoder, prompts) == expected
    # The model keeps its own: it is set aside for the call alone.
    assert model.generation_config is kept


def test_rouge_numbers_of_the_specification() -> None:
    name = ("The author's full name is Hsiao Yun-Hwa.", "The name of the author is Hsiao Yun-Hwa, who writes")
    stems = ("He writes many books", "he wrote many book")
    assert rouge_l_recall(*zip(name, stems, strict=True)) == pytest.approx([6 / 9, 0.75])
    assert rouge_l_recall(["One two."], ["one TWO three four"]) == [1.0]
    assert rouge_l_recall(["One two."], [""]) == [0.0]


def test_other_scripts_are_compared_by_characters() -> None:
    # Four of five characters in order; blanks do not count.
    assert rouge_l_recall(["蜂を飼う人"], ["蜂 を飼 人です"]) == pytest.approx([0.8])
    assert rouge_l_recall(["Пчёлы живут близ Орлы"], ["ПЧЁЛЫ ЖИВУТ БЛИЗ ОРЛЫ"]) == [1.0]
    # Row by row: a row in another script does not change its neighbours, nor they it.
    references, given = ["The bees are old", "蜂を飼う人", "蜂"], ["the old bees", "蜂を飼う人", "蝶"]
    assert rouge_l_recall(references, given) == pytest.approx([0.5, 1.0, 0.0])
    assert is_mostly_ascii(["12 + 30"])
    assert is_mostly_ascii(["Zoë wäre"])
    assert not is_mostly_ascii(["ab где"])
