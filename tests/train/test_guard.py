"""The guard: divergence without wide tensors, rows drawn from the model, and its effect on training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery import unlearn
from llmsurgery.compute import head as head_module
from llmsurgery.compute.divergence import divergence
from llmsurgery.compute.head import Head
from llmsurgery.compute.load import load_model, load_tokenizer
from llmsurgery.compute.progress import Silent
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.demo import world_path
from llmsurgery.errors import UsageError
from llmsurgery.train import guard as guard_module
from llmsurgery.train.config import GuardConfig
from llmsurgery.train.guard import _opening, _subjects, draw_rows, make_guard

CPU = torch.device("cpu")
FORGET = [
    Row("qa", "Where was Ilvane Brastelow born?", "x"),
    Row("qa", "What does Ilvane Brastelow do for a living?", "x"),
]
# What is measured beside the figures that the tests read.
FEW: dict[str, Any] = {"eval.generate": False, "eval.truth_ratio": False, "eval.text_rows": 8}


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_divergence_equals_a_plain_one(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 3 * 40)
    torch.manual_seed(0)
    hidden = torch.randn(8, 6, requires_grad=True)
    weight = torch.randn(40, 6, requires_grad=True)
    kept, kept_weight = torch.randn(8, 6), torch.randn(40, 6)
    head, reference = Head(weight, softcap=softcap), Head(kept_weight, softcap=softcap)
    found = divergence(hidden, head, kept, reference)
    found.sum().backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    log_p, log_q = reference.logits(kept).log_softmax(-1), head.logits(hidden).log_softmax(-1)
    plain = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    plain.sum().backward()
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients[0], hidden.grad)
    torch.testing.assert_close(gradients[1], weight.grad)


@pytest.fixture(scope="module")
def world() -> tuple[Any, Encoder]:
    root = world_path("model")
    return load_model(root, torch.float32, CPU), Encoder(load_tokenizer(root), 256)


def test_drawn_questions_repeat_with_the_seed_and_spare_the_forget_subject(world: tuple[Any, Encoder]) -> None:
    model, encoder = world
    config = GuardConfig(prompts=24)
    rows = {seed: [] for seed in (0, 1)}
    for seed in rows:
        torch.manual_seed(seed)
        rows[seed] = draw_rows(model, encoder, FORGET, config, seed, Silent())
    torch.manual_seed(0)
    assert draw_rows(model, encoder, FORGET, config, 0, Silent()) == rows[0] != rows[1]
    assert len({row.prompt for row in rows[0]}) == len(rows[0]) == 24
    assert not any("Ilvane" in row.prompt or "Brastelow" in row.prompt for row in rows[0])
    assert sum(row.prompt.startswith(("Where", "What")) for row in rows[0]) > 8
    assert all(row.answer for row in rows[0])


def test_guard_is_silent_on_the_unchanged_model_and_speaks_when_it_moves(world: tuple[Any, Encoder]) -> None:
    model, encoder = world
    rows = [Row("qa", "Who lives in Dunsmoor?", "I am not sure."), Row("text", "", "The river runs past the old town.")]
    guard = make_guard(model, encoder, rows, GuardConfig(), Silent())
    assert guard.loss(model, [0, 1], None).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        kept = model.model.norm.weight.clone()
        model.model.norm.weight.mul_(0.5)
    try:
        assert guard.loss(model, [0, 1], None).item() > 0.01
    finally:
        with torch.no_grad():
            model.model.norm.weight.copy_(kept)


def run(tmp_path: Path, name: str, **options: Any) -> dict[str, Any]:
    settings = {"max_steps": 60, "lr": 1.6e-3, "guard.prompts": 32, **FEW}
    outcome = unlearn(method="flat", out=tmp_path / name, until="forget.token_prob<=0.5x", settings=settings, **options)
    return dict(outcome.manifest)


def test_guard_keeps_other_answers(tmp_path: Path) -> None:
    plain, guarded = run(tmp_path, "plain", guard="none"), run(tmp_path, "guarded")
    values = [manifest["metrics"]["utility.kl"]["after"]["value"] for manifest in (plain, guarded)]
    assert values[1] < values[0] / 2
    assert plain["operations"][0]["guard"]["source"] == "none"
    assert guarded["operations"][0]["guard"] | {"source": "self", "prompts": 32} == guarded["operations"][0]["guard"]


def test_drawn_rows_are_kept_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSURGERY_CACHE", str(tmp_path / "cache"))
    settings = {"max_steps": 2, "guard.prompts": 8, **FEW}
    options: dict[str, Any] = {"method": "flat", "until": "none", "settings": settings}
    first = unlearn(out=tmp_path / "first", **options).manifest
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1

    def fail(*arguments: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(guard_module, "draw_rows", fail)
    assert unlearn(out=tmp_path / "second", **options).manifest["tensors"] == first["tensors"]
    # How much the rows weigh does not change which they are.
    settings["guard.weight"] = 2.0
    assert unlearn(out=tmp_path / "heavier", **options).manifest["tensors"] != first["tensors"]
    with pytest.raises(AssertionError, match="drawn again"):
        unlearn(out=tmp_path / "third", seed=1, **options)


def test_guard_can_be_a_file_and_is_off_under_a_preset(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "lr": 0.01, "eval.generate": False}
    files = {name: path for name, path in data_files.items() if name != "retain"}
    model = checkpoints["tied_llama"]
    filed = unlearn(
        model, method="flat", out=tmp_path / "a", guard=str(data_files["retain"]), settings=settings, **files
    ).manifest
    assert filed["operations"][0]["guard"]["source"] == "file"  # type: ignore[index]
    assert filed["data"]["guard"]["rows"] == 2  # type: ignore[index]
    preset = unlearn(
        model, method="flat", out=tmp_path / "b", settings={**settings, "preset": "paper", "max_steps": 3}, **files
    ).manifest
    assert preset["operations"][0]["guard"]["source"] == "none"  # type: ignore[index]
    with pytest.raises(UsageError):
        unlearn(model, method="flat", out=tmp_path / "c", settings={"guard.weigth": 2}, **files)


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("Who wrote the play 'Romeo and Juliet'?", "Who wrote the play '"),
        ("In which town does Pell Arrow live?", "In which town does"),
        ('Which author is known for the novel "1984"?', 'Which author is known for the novel "'),
        ("where is the old mill?", "where is the old"),
    ],
)
def test_opening_is_the_question_up_to_its_subject(prompt: str, opening: str) -> None:
    common = [Row("qa", f"where is the old {place}?", "x") for place in ("barn", "ford", "inn", "kiln", "weir")]
    rows = [Row("qa", prompt, "x"), *common]
    assert _opening(prompt, _subjects(rows)[0]) == opening
