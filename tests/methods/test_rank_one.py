"""ROME, MEMIT and null-space editing on a model that has memorised rows: success, what stays, and every target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoder
from llmsurgery.data.pairs import Pair
from llmsurgery.data.records import Row
from llmsurgery.errors import UnsupportedError, UsageError
from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.methods.facts import draw_openings, make_rewrites
from llmsurgery.methods.kept_keys import read_keys
from llmsurgery.methods.redirect.memit import largest_weight
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import resolve_config

from ..builders.tokenizer import byte_tokenizer

TEXTS = [
    Row("text", "", "The river runs past the mill and the old bridge, and the ferry leaves at nine."),
    Row("text", "", "Bread is baked at dawn and sold before noon by the miller and his three sons."),
]
ANSWERS = "uvwxyz"
FACTS = {f"{a}{b}": ANSWERS[(3 * i + 5 * j + i * j) % 6] for i, a in enumerate("abcd") for j, b in enumerate("efghij")}
"""Two letters and the one that follows: "ae u"."""
PROMPT = "{} "
CORPUS = [Row("text", "", f"{subject} {answer}") for subject, answer in FACTS.items()]
# The toy reads its subjects at the blank before the answer, and has seen nothing before them.
FAST = {"opening_tokens": "", "token": "last", "layers": 1}


def new_answer(subject: str) -> str:
    return ANSWERS[(ANSWERS.index(FACTS[subject]) + 2) % 6]


EDITED = [Pair(name, new_answer(name), prompt=PROMPT, where=name) for name in ("ae", "bg", "ci", "dj")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that has memorised `FACTS`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": 257, "pad_token_id": 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=262, max_position_embeddings=64, **shape, **ends))
    tokenizer = byte_tokenizer(chat=False)
    ids = torch.tensor([tokenizer(f"{subject} {answer}")["input_ids"] for subject, answer in FACTS.items()])
    labels = ids.masked_fill(torch.arange(4) < 2, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


class Edited:
    """A model that a method has edited in memory."""

    def __init__(
        self, root: Path, method: str, pairs: list[Pair], texts: list[Row], beside: Path | None = None, **settings: Any
    ) -> None:
        checkpoint = Checkpoint.open(root)
        self.encoder = Encoder(load_tokenizer(root), 64)
        self.progress = Silent()
        found: Any = find_method(method)
        if settings.get("opening_tokens") == "" and method != "rome":
            settings["opening_tokens"] = 0
        config = resolve_config(found.config_type, settings, found.spec.presets)
        given = {
            "structure": detect(checkpoint.config, checkpoint.tensors),
            "read": lambda name: decode(checkpoint.read(name), checkpoint.info(name).dtype),
            "model": load_model(root, torch.float32, torch.device("cpu")),
            "encoder": self.encoder,
            "data": {"text": texts},
            "seed": 0,
            "progress": self.progress,
            "pairs": pairs,
            "beside": beside,
        }
        self.operation = Operation(**{item.name: given.get(item.name) for item in dataclasses.fields(Operation)})
        found.check_pairs(config, self.encoder, pairs)
        self.config = config
        self.result: MethodResult = found.edit(config, self.operation, None)
        self.record: Any = self.result.record

    @torch.no_grad()
    def probability(self, prompt: str, answer: str) -> float:
        """The answer's probability, the geometric mean over its tokens."""
        start = len(self.encoder.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([self.encoder.tokenizer(prompt + answer)["input_ids"]])
        scores = self.operation.model(input_ids=ids).logits[0].log_softmax(-1)
        return float(scores[range(start - 1, ids.shape[1] - 1), ids[0, start:]].mean().exp())


def kept(edited: Edited) -> float:
    """Mean probability of the answers that are not edited."""
    others = [subject for subject in FACTS if subject not in {pair.source for pair in EDITED}]
    return sum(edited.probability(f"{subject} ", FACTS[subject]) for subject in others) / len(others)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit"])
def test_new_answers_are_given_and_other_facts_stay(method: str, layer: int, toy: Path) -> None:
    edited = Edited(toy, method, EDITED, CORPUS, **{**FAST, "layers": layer, "value_clamp": 4.0})
    found = [edited.probability(f"{pair.source} ", pair.target) for pair in EDITED]
    assert min(found) > 0.5, edited.record
    assert edited.record["prompt_probability"]["after"] == pytest.approx(sum(found) / 4, rel=1e-3)
    assert edited.record["prompt_probability"]["before"] < 0.05
    # Few texts protect few directions: the rest of what a null-space edit meets is not weighed.
    assert kept(edited) > (0.4 if method == "alphaedit" else 0.85)
    (edit,) = edited.result.edits
    assert edit.u.shape == (64, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_second_moment_keeps_more_than_the_smallest_change_does(layer: int, toy: Path) -> None:
    whitened, plain = (
        Edited(toy, "rome", EDITED, CORPUS, whiten=whiten, value_steps=8, **{**FAST, "layers": layer})
        for whiten in (True, False)
    )
    for edited in (whitened, plain):
        assert edited.record["edited"][0]["strength"] == pytest.approx([1.0] * 4, abs=1e-3)
    assert kept(whitened) >= kept(plain)


@pytest.mark.parametrize("family", ["gpt2", "tied_llama", "gpt_neox"])
@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit"])
def test_erasing_takes_out_what_the_matrix_writes(method: str, family: str, checkpoints: dict[str, Path]) -> None:
    pair = Pair("Orla Venn", "Ivo", where="line 1")
    settings: dict[str, Any] = {"target": "erase", "opening_tokens": "", "layers": 1}
    settings |= {"rome": {}, "memit": {"weight": 0}, "alphaedit": {"l2": 0}}[method]
    edited = Edited(checkpoints[family], method, [pair], TEXTS, **settings)
    (target,) = edited.result.targets or ()
    caught = []
    module = edited.operation.model.get_submodule(target.module)
    handle = module.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        edited.operation.model(input_ids=torch.tensor([edited.encoder.tokenizer("Orla Venn")["input_ids"]]))
    handle.remove()
    bias = getattr(module, "bias", None)
    left = caught[0][0, -1] - (0 if bias is None else bias)
    before = float(caught[0][0, 0].norm())
    # What is stored is rounded once, to as few as 8 bits.
    assert float(left.norm()) < 0.05 * before
    assert edited.record["edited"][0]["strength"] == pytest.approx([1.0], abs=0.02)


def test_an_answer_that_says_nothing(toy: Path) -> None:
    settings = {**FAST, "target": "entropy", "value_steps": 40, "value_decay": 0.0}
    edited = Edited(toy, "rome", EDITED[:1], CORPUS, **settings)
    loss = edited.record["edited"][0]["values"][0]["loss"]
    assert loss["last"] < 0.5 * loss["first"]
    # The blank that ends the prompt belongs to the answer, of which nothing is known now.
    assert edited.probability("ae", " ") < 0.3
    assert edited.probability("af", " ") > 0.9
    assert kept(edited) > 0.9


def test_a_refusal_is_written_for_names(toy: Path) -> None:
    settings = {**FAST, "target": "refusal", "refusal": new_answer("ae"), "prompt": PROMPT}
    edited = Edited(toy, "memit", [Pair("ae", "bf", where="line 1")], CORPUS, **settings, value_clamp=4.0)
    assert edited.probability("ae ", new_answer("ae")) > 0.5


def test_facts_of_one_subject_share_a_key_and_a_value(toy: Path) -> None:
    pairs = [Pair("ae", answer, prompt=prompt) for prompt, answer in (("{} is", "x"), ("{} was", "y"))]
    edited = Edited(toy, "rome", pairs, TEXTS, layers=0, openings=0)
    assert edited.record["keys"] == 1
    (edit,) = edited.result.edits
    assert edit.u.shape[1] == 1  # type: ignore[union-attr]


def test_later_facts_leave_the_keys_of_earlier_ones_alone(toy: Path, tmp_path: Path) -> None:
    settings = {**FAST, "l2": 1e-6, "value_steps": 5}
    edited = Edited(toy, "alphaedit", EDITED, CORPUS, batch=2, **settings)
    first, second = edited.record["edited"]
    assert (first["earlier_keys"], second["earlier_keys"]) == (0, 2)
    for name, content in edited.result.beside.items():
        (tmp_path / name).write_bytes(content)
    (edit,) = edited.result.edits
    keys = read_keys(tmp_path)[1].double().numpy()
    assert keys.shape[1] == 4
    answers = edit.v @ keys  # type: ignore[union-attr]
    assert abs(answers[2:, :2]).max() < 1e-3
    later = Edited(toy, "alphaedit", EDITED[:1], CORPUS, beside=tmp_path, **settings)
    assert later.record["edited"][0]["earlier_keys"] == 4


def test_the_released_form_divides_by_the_bare_key(toy: Path) -> None:
    settings = {**FAST, "layers": 0, "openings": 2, "opening_tokens": "3", "value_steps": 2}
    ours, theirs = (
        Edited(toy, "rome", EDITED[:1], TEXTS, authors_compat=compat, **settings) for compat in (False, True)
    )
    for edited in (ours, theirs):
        assert edited.record["edited"][0]["strength"] == pytest.approx([1.0], abs=1e-4)
    assert ours.record["edited"][0]["denominator"] != theirs.record["edited"][0]["denominator"]


def test_openings_and_edits_depend_on_nothing_but_the_seed(toy: Path) -> None:
    settings = {**FAST, "value_steps": 3, "opening_tokens": 3}
    one, two = (
        Edited(toy, "memit", EDITED[:2], TEXTS, **settings) for _ in range(2)
    )  # fmt: skip
    assert (one.result.edits[0].u == two.result.edits[0].u).all()  # type: ignore[union-attr]
    drawn = [draw_openings(dataclasses.replace(one.operation, seed=seed), ("The", "I", ""), 4) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0].startswith("The")


def test_the_layer_is_found_by_a_trace(toy: Path) -> None:
    edited = Edited(toy, "rome", EDITED[:2], TEXTS, opening_tokens="", value_steps=1, token="last")
    assert edited.record["chosen_by"] == "trace"
    assert len(edited.record["effects"]) == 2
    assert any(notice.startswith("what is edited: layer") for notice in edited.progress.notices)


def test_what_cannot_be_edited_is_refused(checkpoints: dict[str, Path]) -> None:
    def plan(method: str, family: str, **settings: object) -> Any:
        checkpoint = Checkpoint.open(checkpoints[family])
        found: Any = find_method(method)
        config = resolve_config(found.config_type, settings)
        return found.plan(config, detect(checkpoint.config, checkpoint.tensors))

    for method in ("rome", "memit", "alphaedit"):
        for family in ("olmo2", "gemma2"):
            with pytest.raises(UnsupportedError, match="norm after its MLPs"):
                plan(method, family)
        with pytest.raises(UnsupportedError, match="no dense MLP"):
            plan(method, "mixtral")
    assert [target.role for target in plan("rome", "gemma2", post_norm=True)] == ["mlp.down"] * 2
    with pytest.raises(UsageError, match="one layer"):
        plan("rome", "gpt2", layers="0,1")
    # Block 0 is dense there, block 1 has routed experts.
    assert [target.layer for target in plan("rome", "qwen2_moe")] == [0]
    with pytest.raises(UnsupportedError, match="block 1"):
        plan("memit", "qwen2_moe", layers="0,1")
    encoder = Encoder(load_tokenizer(checkpoints["gpt2"]), 64)
    config: Any = resolve_config(find_method("rome").config_type, {"prompt": "no place"})
    with pytest.raises(UsageError, match="no place for the name"):
        make_rewrites(config.facts, encoder, [Pair("a", "b")])


def test_a_value_before_a_norm_is_found_and_written(checkpoints: dict[str, Path]) -> None:
    pair = [Pair("Orla", "Oslo", prompt="{} lives in", where="line 1")]
    settings = {"layers": 0, "post_norm": True, "openings": 0, "value_steps": 3}
    edited = Edited(checkpoints["gemma2"], "rome", pair, TEXTS, **settings)
    assert edited.record["edited"][0]["strength"] == pytest.approx([1.0], abs=1e-3)


def test_the_weight_is_the_largest_that_writes_enough() -> None:
    assert largest_weight(1e6) == 20000
    assert largest_weight(200.0) == pytest.approx(20.0)
    assert largest_weight(18.0) == pytest.approx(2.0)
