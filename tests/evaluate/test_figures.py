"""Figures: intervals, perplexity, divergence to the source, and the settings that shape them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.figures import (
    EvaluationData,
    Measurement,
    TextReference,
    bootstrap_interval,
    encode_data,
    measure,
)

CONFIG = EvaluationConfig(generate=False, batch_size=3)
FORGET = [
    Row("qa", "Who keeps the bees?", "Orla Venn keeps them."),
    Row("qa", "Where is the mill?", "By the weir."),
    Row("completion", "The dog is called", " Tam."),
]
TEXTS = [
    Row("text", "", "The river runs past the mill and the old bridge."),
    Row("text", "", "Bread is baked at dawn, and sold before noon."),
    Row("text", "", "Too few"),
    Row("text", "", "Nobody remembers who planted the row of limes."),
]


def load(root: Path) -> tuple[PreTrainedModel, Encoder]:
    return load_model(root, torch.float32, torch.device("cpu")), Encoder(load_tokenizer(root), 256)


def disturbed(root: Path) -> PreTrainedModel:
    """The model with one matrix changed a little."""
    model, _ = load(root)
    torch.manual_seed(0)
    block = model.transformer.h[1].mlp.c_proj.weight if hasattr(model, "transformer") else None
    weight = model.model.layers[1].mlp.down_proj.weight if block is None else block
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)
    return model


def measured(
    model: PreTrainedModel,
    encoder: Encoder,
    data: EvaluationData,
    config: EvaluationConfig = CONFIG,
    reference: TextReference | None = None,
) -> Measurement:
    return measure(model, encoder, data, config, Silent(), reference, keep_reference=True)


def values(measurement: Measurement) -> dict[str, float]:
    return {name: figure.value for name, figure in measurement.figures.items()}


def plain_text(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of every next token of a text [tokens - 1, vocabulary], in float64."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_perplexity_and_divergence_equal_a_plain_reference(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoder = load(checkpoints[architecture])
    other = disturbed(checkpoints[architecture])
    data = encode_data(encoder, {}, TEXTS, CONFIG)
    before = measured(model, encoder, data)
    after = measured(other, encoder, data, reference=before.reference)
    total, tokens, divergence = {model: 0.0, other: 0.0}, 0, 0.0
    for text in data.texts:
        for one in total:
            scores = plain_text(one, text.ids).gather(1, torch.tensor(text.ids[1:])[:, None])
            total[one] -= scores.sum().item()
        tokens += len(text.ids) - 1
        p, q = plain_text(model, text.ids), plain_text(other, text.ids)
        divergence += (p.exp() * (p - q)).sum().item()
    assert values(before)["utility.ppl"] == pytest.approx(math.exp(total[model] / tokens), rel=1e-5)
    assert values(after)["utility.ppl"] == pytest.approx(math.exp(total[other] / tokens), rel=1e-5)
    ratio = math.exp((total[other] - total[model]) / tokens)
    assert values(after)["utility.ppl_ratio"] == pytest.approx(ratio, rel=1e-5)
    assert values(after)["utility.kl"] == pytest.approx(divergence / tokens, abs=1e-5)
    assert values(after)["utility.kl"] > 1e-3


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_model_against_itself(architecture: str, checkpoints: dict[str, Path]) -> None:
    model, encoder = load(checkpoints[architecture])
    data = encode_data(encoder, {"forget": FORGET}, TEXTS, CONFIG)
    before = measured(model, encoder, data)
    again = measured(model, encoder, data, reference=before.reference)
    assert values(again) == values(before)
    assert values(again)["utility.kl"] == 0.0
    assert values(again)["utility.ppl_ratio"] == 1.0
    # Another batch size moves the last digits only.
    alone = measured(model, encoder, data, EvaluationConfig(generate=False, batch_size=1), before.reference)
    assert values(alone) == pytest.approx(values(before), rel=1e-5, abs=1e-6)


def test_reference_survives_a_change_of_the_model_in_place(checkpoints: dict[str, Path]) -> None:
    model, encoder = load(checkpoints["sharded_llama"])
    data = encode_data(encoder, {}, TEXTS, CONFIG)
    reference = measured(model, encoder, data).reference
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1.1
    assert values(measured(model, encoder, data, reference=reference))["utility.kl"] > 1e-3


def test_answer_figures_count_rows_and_lie_in_their_intervals(checkpoints: dict[str, Path]) -> None:
    model, encoder = load(checkpoints["sharded_llama"])
    config = EvaluationConfig(generation_rows=2, generation_tokens=3)
    data = encode_data(encoder, {"forget": FORGET, "retain": FORGET[:1]}, [], config)
    result = measured(model, encoder, data, config)
    assert set(result.figures) == {
        f"{name}.{metric}" for name in ("forget", "retain") for metric in ("token_prob", "prob", "rouge_l")
    }
    assert result.reference is None
    assert data.available == {"forget", "retain"}
    assert {name: figure.n for name, figure in result.figures.items()} == {
        "forget.token_prob": 3, "forget.prob": 3, "forget.rouge_l": 2,
        "retain.token_prob": 1, "retain.prob": 1, "retain.rouge_l": 1,
    }  # fmt: skip
    for name, figure in result.figures.items():
        assert 0 <= figure.value <= 1
        if name.startswith("retain"):
            assert figure.interval is None
        else:
            assert figure.interval is not None
            assert figure.interval[0] <= figure.value <= figure.interval[1]
    assert [len(answers) for answers in result.answers.values()] == [2, 1]
    assert all(len(answer.encode()) <= 3 * 3 for answer in result.answers["forget"])
    assert not measured(model, encoder, data, CONFIG).answers


def test_text_settings_are_respected(checkpoints: dict[str, Path]) -> None:
    _, encoder = load(checkpoints["sharded_llama"])
    # The short passage does not use up a place.
    assert len(encode_data(encoder, {}, TEXTS, EvaluationConfig(text_rows=3)).texts) == 3
    two = encode_data(encoder, {}, TEXTS[2:] + TEXTS[:2], EvaluationConfig(text_rows=1, text_tokens=12)).texts
    assert [encoder.tokenizer.decode(text.ids) for text in two] == ["Nobody remem"]
    sets = {"forget": [TEXTS[0], FORGET[0], Row("text", "", "***")]}
    data = encode_data(encoder, sets, TEXTS, EvaluationConfig(text_tokens=20), chunk_tokens=20)
    assert data.skipped == {"forget": 1}
    # A forget row of plain text becomes chunks; every chunk keeps its row.
    assert [len(part.ids) for part in data.encoded["forget"][:-1]] == [20, 20, 8]
    assert data.rows["forget"] == [TEXTS[0]] * 3 + [FORGET[0]]
    assert data.available == {"forget", "text"}
    assert max(len(text.ids) for text in data.texts) == 20
    with pytest.raises(InputError, match="no text has more than 8 tokens"):
        encode_data(encoder, {}, [TEXTS[2]], CONFIG)


def test_intervals_are_deterministic_and_sane() -> None:
    draws = np.random.default_rng(1).normal(5.0, 2.0, size=400).tolist()
    interval = bootstrap_interval(draws)
    assert interval is not None
    low, high = interval
    assert bootstrap_interval(draws) == interval
    assert bootstrap_interval(draws, seed=1) != interval
    # The normal approximation of a mean of 400: two standard errors to either side.
    mean, error = float(np.mean(draws)), float(np.std(draws)) / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    wide = bootstrap_interval(draws[:40])
    assert wide is not None
    assert wide[1] - wide[0] > 2 * (high - low)


def test_intervals_of_ratios_and_of_few_rows() -> None:
    # Every row has the same ratio, whatever its weight.
    assert bootstrap_interval([2.0, 6.0, 1.0], [1.0, 3.0, 0.5]) == pytest.approx((2.0, 2.0))
    assert bootstrap_interval([0.0, 30.0], [10.0, 10.0]) == pytest.approx((0.0, 3.0))
    assert bootstrap_interval([0.5] * 9) == pytest.approx((0.5, 0.5))
    assert bootstrap_interval([0.5]) is None
