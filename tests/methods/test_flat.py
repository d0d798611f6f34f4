"""FLAT against its specification: worked numbers, properties, both compatibility modes, behaviour."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery import unlearn
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.errors import InputError, UsageError
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import resolve_config
from llmsurgery.methods.templates import load_templates
from llmsurgery.methods.unlearn.flat import DIVERGENCES, FlatConfig, divergence_loss, flat_loss

from ..builders.tokenizer import byte_tokenizer

# loss, dL/dp_e, dL/dp_f at (0.2, 0.7); loss at the best (1, 0), the worst (0, 1) and (0.5, 0.5)
SCALARS = {
    "tv": (0.203496, -0.480521, 0.317370, -0.380797, 0.380797, 0.0),
    "js": (0.315031, -0.450166, 0.668188, -0.379885, 0.620115, 0.061860),
    "pearson": (0.622500, -1.0, 1.350000, -1.0, 1.25, 0.0625),
    "kl": (0.540818, -1.0, 0.740818, -0.632121, 1.0, 0.106531),
    "reverse-kl": (0.518731, -0.818731, 1.0, -0.632121, 1.0, 0.106531),
    "hellinger": (0.832483, -0.818731, 2.013753, -0.632121, 1.718282, 0.255252),
    "neyman": (0.409355, -0.818731, 0.704688, -0.632121, 0.786939, 0.048929),
}


def config(**settings: object) -> FlatConfig:
    resolved: FlatConfig = resolve_config(FlatConfig, settings)
    return resolved


@pytest.mark.parametrize("name", DIVERGENCES)
def test_scalars_of_the_specification(name: str) -> None:
    expected = SCALARS[name]
    p_e = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    p_f = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = divergence_loss(name, p_e, p_f)
    loss.backward()
    assert p_e.grad is not None
    assert p_f.grad is not None
    at = [divergence_loss(name, *torch.tensor(point, dtype=torch.float64)) for point in ((1, 0), (0, 1), (0.5, 0.5))]
    found = [loss.item(), p_e.grad.item(), p_f.grad.item(), *(value.item() for value in at)]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_falls_in_the_template_and_rises_in_the_forget_score(name: str) -> None:
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    losses = divergence_loss(name, grid[:, None], grid[None, :])
    assert (losses.diff(dim=0) < 0).all()
    assert (losses.diff(dim=1) > 0).all()


def worked_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Token probabilities of the specification's tensors: forget row 0, template row 1."""
    forget = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 1]]).softmax(-1)
    template = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).softmax(-1)
    # Row t - 1 scores label t; labels [-100, 0, 1, -100] and [-100, 2, 2, 0].
    values = [forget[0, 0], forget[1, 1], template[0, 2], template[1, 2], template[2, 0]]
    return torch.stack(values), torch.tensor([0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "answer", "padded"),
    [
        ("tv", 0.204760, 0.117054),
        ("js", 0.350732, 0.178089),
        ("pearson", 0.689417, 0.341068),
        ("kl", 0.555739, 0.369267),
    ],
)
def test_tensors_of_the_specification(name: str, answer: float, padded: float) -> None:
    values, rows = worked_tokens()
    loss, p_f, p_e = flat_loss(values, rows, 1, config(divergence=name))
    assert [loss.item(), p_f.item(), p_e.item()] == pytest.approx([answer, 0.786986, 0.252405], abs=1e-6)
    # Rows padded to 4 tokens: the denominator is 3.
    four = FlatConfig(divergence=name, averaging="padded", training=_length(4))
    loss, p_f, p_e = flat_loss(values, rows, 1, four)
    assert [loss.item(), p_f.item(), p_e.item()] == pytest.approx([padded, 0.524657, 0.252405], abs=1e-6)


def _length(tokens: int):  # type: ignore[no-untyped-def]
    from llmsurgery.train.config import TrainingConfig

    return TrainingConfig(max_length=tokens)


def test_batch_reduction_applies_the_divergence_to_the_means() -> None:
    torch.manual_seed(0)
    values, rows = torch.rand(12), torch.arange(12) // 3
    loss, p_f, p_e = flat_loss(values, rows, 2, config(reduction="batch"))
    means = values.view(4, 3).mean(1)
    assert loss.item() == pytest.approx((math.tanh(means[:2].mean()) - math.tanh(means[2:].mean())) / 2, abs=1e-6)
    per_sample = flat_loss(values, rows, 2, config())[0].item()
    assert per_sample != pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(p_f, means[:2])
    assert torch.allclose(p_e, means[2:])


def test_per_sample_loss_does_not_depend_on_the_division_into_batches() -> None:
    torch.manual_seed(1)
    values = torch.rand(16)
    whole = flat_loss(values, torch.arange(16) // 4, 2, config())[0]
    halves = [
        flat_loss(
            torch.cat([values[4 * i : 4 * i + 4], values[8 + 4 * i : 12 + 4 * i]]), torch.arange(8) // 4, 1, config()
        )
        for i in range(2)
    ]
    assert whole.item() == pytest.approx(sum(half[0].item() for half in halves) / 2, abs=1e-7)


def test_data_pairs_each_prompt_with_templates_that_end_once() -> None:
    encoder = Encoder(byte_tokenizer(), 256)
    method = find_method("flat")
    rows = [Row("qa", "Who?", "Nobody."), Row("text", "", "A plain text of some length, cut in two halves.")]
    prepared = method.prepare(config(), encoder, {"forget": rows})
    for index, template in ((0, "I do not know."), (1, "No idea.")):
        forget, pair = prepared.forget[index], prepared.pair(index, template)  # type: ignore[attr-defined]
        assert pair.ids[: pair.answer_start] == forget.ids[: forget.answer_start]
        assert pair.ids.count(encoder.end_id) - forget.ids[: forget.answer_start].count(encoder.end_id) == 1
        assert pair.ends
        assert encoder.answer_text(pair) == template


def test_templates_longer_than_the_bound_fail_before_training(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 200)
    with pytest.raises(InputError) as caught:
        find_method("flat").prepare(
            config(templates=str(path)), Encoder(byte_tokenizer(), 256), {"forget": [Row("qa", "Who?", "Nobody.")]}
        )
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("template answer 'word word")


def test_template_lists_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert [len(load_templates(name)) for name in ("idk", "refusal", "copyright")] == [100, 33, 49]
    own = tmp_path / "own.txt"
    own.write_text("Pass.\n\nNo comment.\n")
    assert load_templates(str(own)) == ["Pass.", "No comment."]
    with pytest.raises(UsageError):
        load_templates("idkk")
    with pytest.raises(InputError):
        load_templates("missing.txt")


@pytest.mark.parametrize("setting", [{"divergence": "jeffrey"}, {"divergence": "kl2"}, {"averaging": "mean"}])
def test_names_of_the_released_code_that_point_the_wrong_way_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        config(**setting)


def forget_with(memorising: Path, out: Path, **settings: object) -> tuple[float, float, Any]:
    outcome = unlearn(
        memorising / "model",
        method="flat",
        forget=memorising / "forget.jsonl",
        out=out,
        until="none",
        guard="none",
        settings={"train": "full", "roles": "all", "templates": str(memorising / "one.txt"), "eval.generate": False}
        | settings,
    )
    manifest: Any = outcome.manifest
    figure = manifest["metrics"]["forget.token_prob"]
    return figure["before"]["value"], figure["after"]["value"], manifest["operations"][0]["record"]


def test_forget_answers_go_and_templates_come(memorising: Path, tmp_path: Path) -> None:
    before, after, record = forget_with(memorising, tmp_path / "out", lr=3e-4, max_steps=200)
    assert before > 0.95
    assert after < 0.2
    assert record["p_template_median"] > 0.1
    assert -0.380797 <= record["last_loss"] < record["first_loss"] <= 0.380797


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_forgets(divergence: str, memorising: Path, tmp_path: Path) -> None:
    before, after, record = forget_with(memorising, tmp_path / "out", lr=1e-3, max_steps=60, divergence=divergence)
    best, worst = SCALARS[divergence][3:5]
    assert after < before / 2
    assert best <= record["last_loss"] < record["first_loss"] <= worst


@pytest.mark.parametrize(
    "mode",
    [{"averaging": "padded", "max_length": 24}, {"reduction": "batch"}, {"averaging": "padded", "reduction": "batch"}],
)
def test_compatibility_modes_forget(mode: dict[str, object], memorising: Path, tmp_path: Path) -> None:
    before, after, _ = forget_with(memorising, tmp_path / "out", lr=1e-3, max_steps=60, **mode)
    assert after < 0.8 * before
