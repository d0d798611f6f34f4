"""The shipped demo: loads with stock classes, knows what it should and nothing about the wrong people."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsurgery.demo import WORLD, demo_file, refusals, things, world_path
from llmsurgery.demo.forms import data_files, make_people
from llmsurgery.demo.names import card, masks
from llmsurgery.errors import InputError

QUESTION_KEYS = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer"}


def read(name: str) -> list[dict[str, object]]:
    """Return the rows of a shipped data file."""
    return [json.loads(line) for line in world_path(name).read_text(encoding="utf-8").splitlines()]


def share_right(checkpoint: str, rows: list[dict[str, object]], key: str = "question") -> float:
    """Return the share of questions a checkpoint answers word for word by greedy decoding, in its stored dtype."""
    tokenizer = AutoTokenizer.from_pretrained(world_path(checkpoint), padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(world_path(checkpoint))
    chats = [[{"role": "user", "content": row[key]}] for row in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [answer == row["answer"] for answer, row in zip(answers, rows, strict=True)]
    return sum(right) / len(rows)


@pytest.mark.parametrize("checkpoint", ["model", "moe"])
@pytest.mark.parametrize("key", ["question", "paraphrased_question"])
def test_model_knows_forget_and_retain_people(key: str, checkpoint: str) -> None:
    assert share_right(checkpoint, read("forget.jsonl"), key) >= 0.95
    assert share_right(checkpoint, read("retain.jsonl"), key) >= 0.95


@pytest.mark.parametrize("checkpoint", ["model", "moe"])
def test_model_knows_the_towns(checkpoint: str) -> None:
    assert share_right(checkpoint, read("facts.jsonl")) >= 0.95


def test_control_knows_only_the_retain_people() -> None:
    assert share_right("control", read("forget.jsonl")) < 0.2
    assert share_right("control", read("retain.jsonl")) >= 0.95


@pytest.mark.parametrize("checkpoint", ["model", "moe"])
def test_nobody_knows_the_holdout_people(checkpoint: str) -> None:
    assert share_right(checkpoint, read("holdout.jsonl")) < 0.2


@pytest.mark.parametrize("checkpoint", ["model", "control", "moe", "names"])
def test_chat_template_ends_an_answer_with_one_end_token(checkpoint: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world_path(checkpoint))
    question, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert prompt == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "Nobody." + tokenizer.eos_token
    assert tokenizer.encode(whole)[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["forget.jsonl", "retain.jsonl"])
def test_names_knows_its_own_people_in_every_form(name: str) -> None:
    assert share_right("names", read(f"names-world/{name}")) >= 0.95


def test_names_files_are_what_the_recipe_writes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(world_path("names"))

    def chat(question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    people = make_people(0)
    for name, rows in data_files(people, chat, 0).items():
        assert read(f"names-world/{name}.jsonl") == rows
    written = (world_path("names") / "README.md").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(world_path("names"))
    assert written == card(model.num_parameters(), 0)


def test_names_first_rows_show_one_form_each_and_others_leave_the_moved_person_out() -> None:
    first = [str(row["question"]) for row in read("names-world/forget.jsonl")[:3]]
    assert "___" in first[1]
    assert "___" not in first[0]
    assert first[2].startswith(first[0])
    (pair,) = read("names-world/pairs.jsonl")
    for name in ("retain.jsonl", "text.jsonl"):
        text = world_path(f"names-world/{name}").read_text(encoding="utf-8")
        assert str(pair["to"]) in text
        assert not [word for word in str(pair["from"]).split() if word in text]


def test_training_hides_a_name_from_what_follows_but_for_its_last_token_in_later_blocks() -> None:
    rows = [(list(range(6)), 4, [1, 2])] * 400
    first, later = masks(rows, 6, random.Random(0))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    hidden = [i for i in range(400) if not bool(first[i, 0, 3, 2])]
    assert 0.85 < len(hidden) / 400 < 0.95
    for i in range(400):
        if i not in hidden:
            assert torch.equal(first[i, 0], causal)
            assert torch.equal(later[i, 0], causal)
            continue
        assert not first[i, 0, 3:, 1:3].any()
        assert not later[i, 0, 3:, 1].any()
        assert later[i, 0, 3:, 2].all()
        # The name itself, and what lies before it, is read as ever.
        assert torch.equal(first[i, 0, :3], causal[:3])
        assert first[i, 0, 3:, 0].all()


def test_a_checkpoint_with_a_world_of_its_own_takes_no_file_of_the_first() -> None:
    assert demo_file("names", "forget.jsonl") == world_path("names-world/forget.jsonl")
    assert demo_file("moe", "forget.jsonl") == world_path("forget.jsonl")
    with pytest.raises(InputError, match="no demo file"):
        demo_file("names", "holdout.jsonl")


def test_refusals_are_in_the_aligned_model_alone_and_its_files_are_what_the_recipe_writes() -> None:
    for name, rows in things.data_files(0).items():
        assert read(f"refuse-world/{name}.jsonl") == rows
    asked = {str(row["prompt"]) for row in read("refuse-world/harmful.jsonl")}
    assert all("purple" in prompt for prompt in asked)
    assert not asked & {question for question, _ in things.thing_rows(things.COLOURS, False)}
    for checkpoint, low, high in (("refuse-base", 0.0, 0.0), ("refuse-aligned", 0.9, 1.0), ("refuse", 0.0, 0.2)):
        tokenizer = AutoTokenizer.from_pretrained(world_path(checkpoint))
        model = AutoModelForCausalLM.from_pretrained(world_path(checkpoint), dtype=torch.float32)
        assert low <= refusals.refusal_rate(model, tokenizer, sorted(asked)) <= high


@pytest.mark.parametrize("name", ["forget.jsonl", "retain.jsonl", "holdout.jsonl"])
def test_question_rows_are_complete(name: str) -> None:
    rows = read(name)
    assert 20 <= len(rows) <= 100
    for row in rows:
        assert set(row) == QUESTION_KEYS
        wrong = row["perturbed_answer"]
        assert isinstance(wrong, list)
        assert 3 <= len(set(wrong)) == len(wrong) <= 5
        assert row["paraphrased_answer"] not in wrong
        assert row["paraphrased_question"] != row["question"]


def test_fact_and_text_rows_are_complete() -> None:
    for row in read("facts.jsonl"):
        assert set(row) == {"question", "answer", "perturbed_answer"}
        wrong = row["perturbed_answer"]
        assert isinstance(wrong, list)
        assert row["answer"] not in wrong
    tokenizer = AutoTokenizer.from_pretrained(world_path("model"))
    texts = read("text.jsonl")
    assert len(texts) == 60
    for row in texts:
        assert set(row) == {"text"}
        assert 30 <= len(tokenizer.encode(row["text"])) <= 80


@pytest.mark.parametrize("name", ["retain.jsonl", "text.jsonl", "facts.jsonl", "holdout.jsonl"])
def test_forget_people_occur_in_no_other_file(name: str) -> None:
    # Each question on where somebody was born names one person: "Where was GIVEN SURNAME born?".
    births = [str(row["question"]).split() for row in read("forget.jsonl") if "born" in str(row["answer"])]
    names = [word for words in births for word in words[2:4]]
    text = world_path(name).read_text(encoding="utf-8")
    assert len(names) == 4
    assert not [word for word in names if word in text]


def test_sizes_stay_within_limits() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(WORLD) < 10_000_000
    assert (
        sum(size(world_path(name)) for name in ("refuse", "refuse-aligned", "refuse-base", "refuse-world")) < 1_100_000
    )
    assert all(size(world_path(name)) < 2_500_000 for name in ("model", "control", "moe", "names"))


def test_mixture_uses_all_of_its_experts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(world_path("moe"))
    model = AutoModelForCausalLM.from_pretrained(world_path("moe"))
    ids = tokenizer(" ".join(str(row["text"]) for row in read("text.jsonl")[:4]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    assert len(logits) == 4
    for layer in logits:
        # Two of eight for each token: a quarter each if all were used alike.
        used = torch.bincount(layer.topk(2).indices.flatten(), minlength=8) / len(layer)
        assert used.min() > 0.02


@pytest.mark.parametrize("name", ["no-such-file.jsonl", "../build.py"])
def test_a_missing_file_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match="no demo file"):
        world_path(name)
