"""Position-invariant inference: worked positions, invariance on several architectures, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from llmsurgery.compute.position_invariant import (
    NAME,
    attention_modules,
    generate_invariant,
    invariant_states,
    position_invariant,
    require_supported,
)
from llmsurgery.compute.segments import Segments, importances, shifts
from llmsurgery.errors import InputError, UnsupportedError

PROMPT = Segments((5, 9, 31), ((7, 3), (8, 8, 20), (41,)), (17, 2))
ORDERS = [(1, 2, 0), (2, 1, 0), (0, 2, 1)]
INVARIANT = ("tied_llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_neox", "mixtral")


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        # Attention of a fresh model is nearly uniform; nothing would depend on positions.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.mul_(8)
    return model


def own_logits(model: PreTrainedModel, segments: Segments) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([segments.ids])).logits[0]


def test_positions_of_the_worked_example() -> None:
    prompt = Segments((1, 2), ((11, 12), (21, 22, 23), (31,)), (4,))
    base = prompt.base_positions(9)
    assert base.tolist() == [0, 1, 6, 7, 5, 6, 7, 7, 8]
    seen = shifts(torch.tensor([[torch.inf, 0.2, 0.7], [0.1, 0.6, 0.3]]), prompt)
    # A query of segment 0 ranks 0, 2, 1; one of the suffix 1, 2, 0.
    assert seen.tolist() == [[0, 3, 2], [4, 0, 3]]
    places = [[(base[span] - shift).tolist() for span, shift in zip(prompt.spans, row, strict=True)] for row in seen]
    assert places == [[[6, 7], [2, 3, 4], [5]], [[2, 3], [5, 6, 7], [4]]]
    # With two segments the other one always is adjacent.
    assert shifts(torch.tensor([[torch.inf, 0.3], [0.3, torch.inf]]), Segments((1,), ((2, 3), (4,)))).tolist() == [
        [0, 2],
        [1, 0],
    ]


def test_importances_leave_the_own_segment_out_and_count_tokens() -> None:
    prompt = Segments((1,), ((11, 12), (21,), (31,)), (4,))
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0], [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 2.0, 2.0]])[None]
    owners = torch.tensor([0, 0, 3])
    found = importances(logits, owners, prompt)[0]
    inside = torch.stack([logits[0, 0, 2:].softmax(-1), logits[0, 1, 2:].softmax(-1)]).sum(0)
    assert torch.isinf(found[:2, 0]).all()
    # Both tokens of a segment share one ranking.
    assert torch.allclose(found[:2, 1:], inside.expand(2, -1))
    every = logits[0, 2].softmax(-1)
    assert torch.allclose(found[2], torch.stack([every[:2].mean(), every[2], every[3]]))
    whole = importances(logits, owners, Segments(prompt.prefix, prompt.parts, own_counts=True))[0]
    assert not torch.allclose(whole[:2, 1:], found[:2, 1:])


def test_ties_do_not_fall_back_on_the_listing() -> None:
    prompt = Segments((1,), ((9, 2), (3,), (3, 1)))
    equal = torch.zeros(1, 3)
    seen = shifts(equal, prompt)[0]
    for order in itertools.permutations(range(3)):
        assert shifts(equal, prompt.reordered(order))[0].tolist() == [seen[number] for number in order]


def test_every_order_gives_the_same_answer(llama: LlamaForCausalLM) -> None:
    orders = list(itertools.permutations(range(3)))
    found = torch.stack([invariant_states(llama, PROMPT.reordered(order))[-1] for order in orders])
    assert float((found - found[0]).abs().max()) < 1e-5
    own = torch.stack([own_logits(llama, PROMPT.reordered(order))[-1] for order in orders])
    assert float((own - own[0]).abs().max()) > 0.5


def test_permuting_segments_permutes_their_states_in_every_layer(llama: LlamaForCausalLM) -> None:
    def states(prompt: Segments) -> list[torch.Tensor]:
        with torch.inference_mode(), position_invariant(llama, prompt):
            return [one[0] for one in llama.model(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states]

    order = (2, 0, 1)
    moved = PROMPT.reordered(order)
    for before, after in zip(states(PROMPT), states(moved), strict=True):
        for place, number in enumerate(order):
            assert torch.allclose(after[moved.spans[place]], before[PROMPT.spans[number]], atol=1e-5)
        assert torch.allclose(after[: PROMPT.start], before[: PROMPT.start], atol=1e-5)
        assert torch.allclose(after[PROMPT.stop :], before[PROMPT.stop :], atol=1e-5)


def test_one_segment_is_the_ordinary_model(llama: LlamaForCausalLM) -> None:
    prompt = Segments((5, 9), ((7, 3, 8, 20),), (17, 2, 40))
    with torch.inference_mode():
        found = llama.lm_head(invariant_states(llama, prompt))
    assert torch.allclose(found, own_logits(llama, prompt), atol=1e-5)
    require_supported(llama)


def test_cached_generation_is_full_recomputation(llama: LlamaForCausalLM) -> None:
    answer = generate_invariant(llama, PROMPT, 5)
    longer = PROMPT
    for token in answer:
        with torch.inference_mode():
            assert int(llama.lm_head(invariant_states(llama, longer)[-1]).argmax()) == token
        longer = Segments(longer.prefix, longer.parts, (*longer.suffix, token))
    assert generate_invariant(llama, PROMPT.reordered((2, 1, 0)), 5) == answer
    assert generate_invariant(llama, PROMPT, 5, (answer[2],)) == answer[: answer.index(answer[2])]


def test_the_model_is_left_as_it_was(llama: LlamaForCausalLM) -> None:
    before = own_logits(llama, PROMPT)
    with position_invariant(llama, PROMPT):
        assert llama.config._attn_implementation == NAME
    with pytest.raises(IndexError), torch.inference_mode(), position_invariant(llama, PROMPT):
        llama(torch.tensor([[99]]))
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(own_logits(llama, PROMPT), before)


@pytest.mark.parametrize("name", INVARIANT)
def test_architectures_with_rotary_positions_are_invariant(name: str, checkpoints: dict[str, Path]) -> None:
    model = load(checkpoints[name])
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        pytest.skip("this version of transformers leaves the cap of attention logits out")
    require_supported(model)
    found = torch.stack([invariant_states(model, PROMPT.reordered(order))[-1] for order in [(0, 1, 2), *ORDERS]])
    own = torch.stack([own_logits(model, PROMPT.reordered(order))[-1] for order in [(0, 1, 2), *ORDERS]])
    spread, own_spread = ((one - one[0]).abs().max() / one.abs().mean() for one in (found, own))
    assert spread < 1e-4
    assert own_spread > 10 * spread


def test_scaled_rotary_tables_count_twice_in_logits_alone(llama: LlamaForCausalLM) -> None:
    config = LlamaConfig(**llama.config.to_diff_dict())
    config.rope_parameters = {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    yarn = LlamaForCausalLM(config).eval()
    yarn.load_state_dict(llama.state_dict())
    assert yarn.model.rotary_emb.attention_scaling > 1
    require_supported(yarn)


@pytest.mark.parametrize(("name", "why"), [("gpt2", "learned positions"), ("deepseek_v3", "latent attention")])
def test_other_positions_are_refused(name: str, why: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedError, match="position-invariant") as caught:
        attention_modules(load(checkpoints[name]))
    assert caught.value.exit_code == 4
    assert why in caught.value.why
    assert "Llama" in caught.value.fix


def test_unknown_parts_of_an_attention_are_found_out(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer without positions, say: the module would not rotate, and this attention would.
    from llmsurgery.compute import position_invariant as module

    monkeypatch.setattr(module._View, "_scale", lambda self, logits: 0 * logits)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM"):
        require_supported(llama)


@pytest.mark.parametrize("pieces", [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_empty_pieces_are_refused(pieces: tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]) -> None:
    with pytest.raises(InputError):
        Segments(*pieces)
