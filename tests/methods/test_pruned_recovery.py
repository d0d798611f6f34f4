"""Recovery of LLM-Pruner: it wins loss back, is stored as trained, goes on after a kill, and is off by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmsurgery import prune
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import Row
from llmsurgery.data.windows import text_pieces
from llmsurgery.errors import DivergedError, InputError, SurgeryError, UsageError
from llmsurgery.methods import folding
from llmsurgery.train import loop
from llmsurgery.train.loop import TrainingResult

from ..builders.saving import SIZES, fill, save
from ..conftest import write_rows
from .test_pat import IDS, TEXT, logits_of, relative_error, single

OFF: dict[str, Any] = {"window": 16, "samples": 4, "eval.generate": False, "eval.text_tokens": 64}
SETTINGS: dict[str, Any] = {**OFF, "max_steps": 6, "lr": 0.01, "max_length": 32, "save_every": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("recovery") / "text.jsonl", [dict(row) for row in TEXT])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, tied, two query heads to a key-value head, biases everywhere."""
    torch.manual_seed(22)
    shape = LlamaConfig(
        **SIZES, num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )  # fmt: skip
    return save(fill(LlamaForCausalLM(shape), 22), tmp_path_factory.mktemp("tied"), torch.float32)


def run(model: Path, text: Path, out: Path, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    options = {"dtype": "float32", "calibration": text, "sparsity": 0.5, **options}
    settings = SETTINGS if settings is None else settings
    outcome = prune(model, method="llm-pruner", out=out, text=text, settings=settings, **options)
    manifest: dict[str, Any] = outcome.manifest
    return manifest


def weights(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*root.glob("*.safetensors"), root / "config.json"]}


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(model, text, out)


def test_recovery_lowers_the_loss_of_the_pruned_model(
    whole: tuple[Path, dict[str, Any]], model: Path, text: Path, tmp_path: Path
) -> None:
    pruned = run(model, text, tmp_path / "out", OFF)
    record, plain = (manifest["operations"][0]["record"] for manifest in (whole[1], pruned))
    assert record["steps"] == 6
    assert record["stopped"] == "max_steps"
    assert record["loss_recovered"] < record["loss_pruned"] - 0.2
    assert "loss_pruned" not in plain
    # The same heads and channels go, in a checkpoint of the same shapes.
    assert all(record[name] == value for name, value in plain.items())
    found = [manifest["metrics"] for manifest in (whole[1], pruned)]
    assert found[0]["size.params"] == found[1]["size.params"]
    assert found[0]["utility.ppl"]["after"]["value"] < found[1]["utility.ppl"]["after"]["value"]
    # The stored result has the loss of the model in training, or a notice would tell.
    assert not any("stored result" in notice for notice in whole[1]["notices"])
    moved = {row["role"]: row["changed"] for row in whole[1]["coverage"]}
    assert moved.keys() >= {"attn.q", "attn.o", "mlp.gate", "mlp.down"}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        (None, {}),
        (None, {"part": "channels", "train": "full", "roles": "all"}),
        ("qwen3", {"part": "heads"}),
        ("olmo2", {"train": "full", "roles": "all"}),
        ("gemma3", {}),
    ],
)
def test_what_is_stored_is_the_model_in_training(
    architecture: str | None,
    settings: dict[str, Any],
    checkpoints: dict[str, Path],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = model
    if architecture is not None:
        (tmp_path / "model").mkdir()
        root = single(checkpoints[architecture], tmp_path / "model")
    kept: list[torch.Tensor] = []

    def draw(trainable: Any, *_: Any) -> TrainingResult:
        random = torch.Generator().manual_seed(5)
        with torch.no_grad():
            trained = trainable.model.eval()
            ids = IDS.to(trained.device)
            kept.append(trained(input_ids=ids).logits.cpu())
            for parameter in trainable.parameters:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.device))
            kept.append(trained(input_ids=ids).logits.cpu())
        return TrainingResult(1, "max_steps", 0.0, 0.0, 0.0, 1)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", draw)
        run(root, text, tmp_path / "out", {**SETTINGS, **settings})
    assert relative_error(logits_of(tmp_path / "out")[0], kept[1]) <= 1e-5
    # Before its first step it is the pruned model.
    off = {name: value for name, value in {**OFF, **settings}.items() if name not in ("train", "roles")}
    run(root, text, tmp_path / "pruned", off)
    logits, pruned = logits_of(tmp_path / "pruned")
    assert relative_error(logits, kept[0]) <= 1e-5
    assert relative_error(kept[0], kept[1]) > 0.01
    tied = pruned.get_input_embeddings().weight is pruned.get_output_embeddings().weight
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight) == tied


def test_without_steps_it_is_the_bare_pruning(model: Path, text: Path, tmp_path: Path) -> None:
    manifests = [
        run(model, text, tmp_path / name, {**OFF, **settings})
        for name, settings in {"usual": {}, "none": {"max_steps": 0, "epochs": 0}}.items()
    ]
    assert weights(tmp_path / "usual") == weights(tmp_path / "none")
    assert "steps" not in manifests[0]["operations"][0]["record"]
    assert manifests[0]["operations"][0]["settings"]["lr"] is None
    # Every row of a matrix is one of the source, but for the columns that went.
    source, result = (AutoModelForCausalLM.from_pretrained(path) for path in (model, tmp_path / "usual"))
    wide, narrow = (found.model.layers[0].mlp.gate_proj.weight for found in (source, result))
    rows = {tuple(row.tolist()) for row in wide}
    assert {tuple(row.tolist()) for row in narrow} < rows


@pytest.mark.parametrize("when", ["training", "behind"])
def test_a_killed_recovery_goes_on(
    when: str,
    whole: tuple[Path, dict[str, Any]],
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = loop._Loop.advance

    def stop(self: Any, loss: Any) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        return original(self, loss)

    def stop_behind(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "training":
            patch.setattr(loop._Loop, "advance", stop)
        else:
            patch.setattr(folding, "folding_check", stop_behind)
        with pytest.raises(KeyboardInterrupt):
            run(model, text, tmp_path / "out")
    with pytest.raises(UsageError, match="differs in settings"):
        run(model, text, tmp_path / "out", {**SETTINGS, "rank": 4}, resume=True)
    manifest = run(model, text, tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(whole[0])
    assert manifest["operations"][0]["record"] == whole[1]["operations"][0]["record"]


def test_divergence_ends_in_its_own_code(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        run(model, text, tmp_path / "out", {**SETTINGS, "lr": 1e18, "warmup_steps": 4, "save_every": 1})
    assert caught.value.exit_code == 9
    assert "--resume" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_smaller_model(model: Path, text: Path, tmp_path: Path) -> None:
    plans = {
        name: run(model, text, tmp_path / "out", settings, dry_run=True)
        for name, settings in {"off": OFF, "on": SETTINGS, "full": {**SETTINGS, "train": "full"}}.items()
    }
    phases = {name: plan["memory"]["phases"] for name, plan in plans.items()}
    assert set(phases["off"]) == {"loading", "before", "gradients", "result"}
    assert set(phases["on"]) == {*phases["off"], "training"}
    assert plans["off"]["trained_parameters"] == 0
    # Rank 8 on matrices of two heads of 8 each, one of keys and values, and of 32 channels; two blocks.
    width, heads, groups, inner = 32, 16, 8, 32
    matrices = [(width, heads), (width, groups), (width, groups), (heads, width), *[(width, inner)] * 3]
    assert plans["on"]["trained_parameters"] == 2 * 8 * sum(one + other for one, other in matrices)
    assert plans["full"]["trained_parameters"] == 2 * sum(one * other for one, other in matrices)
    assert plans["on"]["memory"]["step"] == {"sequences": 4, "tokens": 32}
    # Sums in fp32 of the gradients of all matrices of the source.
    entries = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert phases["off"]["gradients"] - plans["off"]["memory"]["base"] > 2 * 4 * entries
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "options", "error", "what"),
    [
        ({**OFF, "rank": 4, "lr": 1e-3}, {}, UsageError, "rank, lr would do nothing"),
        ({**SETTINGS, "roles": "embed"}, {}, UsageError, "adapters cannot be put on embed"),
        ({**SETTINGS, "layers": "7"}, {}, SurgeryError, "layer"),
        (SETTINGS, {"quantize": "nf4"}, UsageError, "has no --quantize"),
        (SETTINGS, {"until": "forget.prob<=0.1"}, UsageError, "has no --until"),
        (SETTINGS, {"guard": "self"}, UsageError, "has no --guard"),
        (SETTINGS, {"save": "adapter"}, UsageError, "no adapter to save"),
        ({**SETTINGS, "max_steps": -1}, {}, UsageError, "out of bounds"),
    ],
)
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any],
    options: dict[str, Any],
    error: type[SurgeryError],
    what: str,
    model: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    for dry_run in (True, False):
        with pytest.raises(error, match=what) as caught:
            run(model, text, tmp_path / "out", settings, dry_run=dry_run, **options)
        assert caught.value.what
        assert caught.value.why
        assert caught.value.fix
    assert not list(tmp_path.iterdir())


def test_what_is_trained_on(model: Path, text: Path, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"question": "Who?", "answer": "Orla. " * 20}])
    with pytest.raises(InputError, match="do not fit into 32") as caught:
        run(model, text, tmp_path / "out", calibration=long)
    assert "max_length" in caught.value.fix
    questions = write_rows(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Orla."}] * 3)
    settings = {**SETTINGS, "max_steps": 0, "epochs": 1, "batch_size": 2, "max_length": 256, "lr": 20.0}
    manifest = run(model, text, tmp_path / "out", settings, calibration=questions)
    record = manifest["operations"][0]["record"]
    assert (record["rows"], record["steps"], record["stopped"]) == (3, 2, "epochs")
    # Steps as large as that spoil the model.
    assert any("recovery raised the loss" in notice for notice in manifest["notices"])


def test_text_is_cut_into_pieces(model: Path) -> None:
    encoder = Encoder(load_tokenizer(model), 256)
    rows = [Row("text", "", "a" * 10), Row("text", "", "b" * 10)]
    pieces = text_pieces(encoder, rows, 8)
    # An end token behind each row, and a rest of six.
    assert [len(piece) for piece in pieces] == [8, 8, 6]
    joined = [token for piece in pieces for token in piece]
    assert [i for i, token in enumerate(joined) if token == encoder.end_id] == [10, 21]
    assert text_pieces(encoder, rows, 8, 1) == pieces[:1]
    # Three tokens are no piece.
    assert [len(piece) for piece in text_pieces(encoder, rows, 19)] == [19]
