"""UOE: the choice of the expert, what moves on disk, the losses it wraps, and what the anchor does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery import unlearn
from llmsurgery.api import inspect_checkpoint
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.data.chat import Encoder
from llmsurgery.data.records import read_rows
from llmsurgery.demo import world_path
from llmsurgery.errors import UsageError
from llmsurgery.methods.settings import resolve_config
from llmsurgery.methods.unlearn.uoe import PAPER_BASES, Uoe, UoeConfig, choose_expert

from ..builders import MOE_BUILDERS
from ..builders.tokenizer import byte_tokenizer

FAST = {"max_steps": 2, "lr": 0.01, "eval.generate": False}


def forget(model: Path, data: dict[str, Path], out: Path, settings: dict[str, object], **more: Any) -> Any:
    options = {"until": "none", "guard": "none", **more}
    return unlearn(model, method="uoe", out=out, settings={**FAST, **settings}, **data, **options).manifest


def test_highest_affinity_of_the_candidates_wins() -> None:
    table = {1: torch.tensor([0.1, 0.4, 0.2]), 3: torch.tensor([0.3, 0.1, 0.5])}
    everything = {1: [0, 1, 2], 3: [0, 1, 2]}
    choice = choose_expert(table, everything)
    assert (choice.layer, choice.expert) == (3, 2)
    record: Any = choice.record()
    assert record["target"] == {"layer": 3, "expert": 2, "affinity": 0.5}
    assert [row["affinity"] for row in record["next"]] == [0.4, 0.3, 0.2]
    assert [(row["layer"], row["expert"]) for row in record["best_by_layer"]] == [(1, 1), (3, 2)]
    assert choose_expert(table, {1: [0, 2], 3: [1]}).record()["target"] == {"layer": 1, "expert": 2, "affinity": 0.2}


@pytest.mark.parametrize("architecture", MOE_BUILDERS)
def test_only_the_chosen_expert_and_its_router_change_on_disk(
    architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints[architecture]
    # Strong weight decay: what is not chosen must not feel it either.
    manifest = forget(source, data_files, tmp_path / "out", {"weight_decay": 0.5})
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    changed = {name for name in before.tensors if before.read(name).tobytes() != after.read(name).tobytes()}
    target = manifest["operations"][0]["record"]["target"]
    stem = f"layers.{target['layer']}.{'block_sparse_moe' if architecture == 'mixtral' else 'mlp'}"
    matrices = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    parts = {f"{stem}.experts.{target['expert']}.{matrix}.weight" for matrix in matrices} | {f"{stem}.gate.weight"}
    assert {name.removeprefix("model.") for name in changed} == parts
    assert {row["role"]: row["targeted"] for row in manifest["coverage"]} == {
        "router": 1, "expert.gate": 1, "expert.up": 1, "expert.down": 1
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_a_model_in_16_bits_is_unlearned_too(
    architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    manifest = forget(checkpoints[architecture], data_files, tmp_path / "out", {}, dtype="bfloat16")
    record = manifest["operations"][0]["record"]
    assert 0 < record["anchor"] < 2
    assert all(0 <= share <= 1 for share in record["share_of_forget_tokens_sent_there"].values())
    assert manifest["coverage"][0]["changed"] == 1


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("ga", ""),
        ("graddiff", "retain_weight=2"),
        ("npo", "beta=0.5"),
        ("flat", "divergence=kl,templates=refusal"),
        ("rmu", ""),
    ],
)
def test_losses_that_it_wraps(
    base: str, settings: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    choice = {"base": base, "base_settings": settings}
    manifest = forget(checkpoints["qwen3_moe"], data_files, tmp_path / "out", choice)
    record = manifest["operations"][0]["record"]
    assert record["steps"] == 2
    assert record["last_loss"] != record["first_loss"]
    assert 0 < record["anchor"] < 2
    assert manifest["operations"][0]["settings"]["base_settings"] == [part for part in settings.split(",") if part]
    if base == "rmu":
        assert record["layer"] == record["target"]["layer"]
    assert len(manifest["tensors"]) == 4


@pytest.mark.parametrize("base", PAPER_BASES)
def test_the_paper_preset_takes_the_papers_losses(base: str, data_files: dict[str, Path]) -> None:
    rows = {name: read_rows(path) for name, path in data_files.items()}
    encoder = Encoder(byte_tokenizer(), 256)

    def resolved(**settings: object) -> Any:
        config = resolve_config(UoeConfig, {"base": base, **settings}, Uoe.spec.presets)
        return Uoe().prepare(config, encoder, rows).base.config

    paper, plain = resolved(preset="paper"), resolved()
    if base in ("ga", "graddiff"):
        # The paper's ascent has no bound.
        assert (paper.max_forget_ce, plain.max_forget_ce) == (0, None)
    else:
        assert (paper.beta, plain.beta) == (0.001, 0.1) if base == "npo" else paper.steering == 8000
    if base != "ga":
        assert paper.retain_weight == (1200 if base == "rmu" else 1)
        assert resolved(preset="paper", base_settings="retain_weight=2").retain_weight == 2
    assert paper.training.lr == 1e-4


def test_what_a_base_loss_needs_and_takes(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model, out = checkpoints["olmoe"], tmp_path / "out"
    without = {name: path for name, path in data_files.items() if name != "retain"}
    with pytest.raises(UsageError, match="--retain is missing"):
        forget(model, without, out, {})
    with pytest.raises(UsageError, match="unknown loss 'gradif'") as caught:
        forget(model, data_files, out, {"base": "gradif"})
    assert "graddiff" in caught.value.why
    with pytest.raises(UsageError, match="unknown hyperparameter 'beta'"):
        forget(model, data_files, out, {"base_settings": "beta=1"})
    with pytest.raises(UsageError, match="takes no roles"):
        forget(model, data_files, out, {"roles": "linear"})
    with pytest.raises(UsageError, match="adapters cannot be put on"):
        forget(model, data_files, out, {"train": "lora"})
    assert not out.exists()
    forget(model, without, out, {"base": "ga"})


def test_choice_can_be_narrowed(checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path) -> None:
    whole = forget(checkpoints["mixtral"], data_files, tmp_path / "whole", {})["operations"][0]["record"]
    best = whole["target"]
    other = {"layers": str(1 - best["layer"]), "attribution_tokens": 0}
    found = forget(checkpoints["mixtral"], data_files, tmp_path / "other", other)["operations"][0]["record"]
    assert found["target"]["layer"] == 1 - best["layer"]
    assert found["target"]["affinity"] <= best["affinity"]
    assert len(found["best_by_layer"]) == 1


def test_attribution_sees_as_many_tokens_as_it_may(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    found = [
        forget(checkpoints["mixtral"], data_files, tmp_path / f"{tokens}", {"attribution_tokens": tokens})
        for tokens in (1, 100_000, 0)
    ]
    tables = [manifest["operations"][0]["record"]["best_by_layer"] for manifest in found]
    assert tables[0] != tables[1] == tables[2]


def test_dry_run_counts_one_expert(checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path) -> None:
    plan = forget(checkpoints["deepseek_v2"], data_files, tmp_path / "out", {}, dry_run=True)
    assert (plan["tensors"], plan["experts"]) == (4, 4)
    # gate, up and down of 16 by 32, and the router's four rows.
    assert plan["trained_parameters"] == 3 * 16 * 32 + 4 * 32


def test_inspect_says_where_it_works(checkpoints: dict[str, Path]) -> None:
    methods: Any = inspect_checkpoint(checkpoints["gpt2"])["methods"]
    assert "no routed experts" in methods["uoe"]["reason"]
    methods = inspect_checkpoint(checkpoints["mixtral"])["methods"]
    assert methods["uoe"]["roles"] == ["expert.down", "expert.gate", "expert.up", "router"]


def test_killed_run_goes_on_to_the_same_bytes(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmsurgery.train.loop import _Loop

    settings = {"max_steps": 5, "save_every": 2}
    forget(checkpoints["olmoe"], data_files, tmp_path / "whole", settings)
    original, calls = _Loop.advance, []

    def stop(loop: _Loop, loss: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(loop, loss)

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            forget(checkpoints["olmoe"], data_files, tmp_path / "out", settings)
    forget(checkpoints["olmoe"], data_files, tmp_path / "out", settings, resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


def test_anchor_keeps_forget_tokens_at_the_expert(tmp_path: Path) -> None:
    # On the embedded mixture of experts: the model knows what it is to forget.
    data = {name: world_path(f"{name}.jsonl") for name in ("forget", "retain", "text")}
    shares = {}
    for weight in (0.0, 1.0):
        few = {"eval.text_rows": 4, "eval.truth_ratio": False}
        settings = {"anchor_weight": weight, "max_steps": 40, "lr": 1e-3, **few}
        manifest = forget(world_path("moe"), data, tmp_path / f"{weight}", settings)
        record = manifest["operations"][0]["record"]
        shares[weight] = record["share_of_forget_tokens_sent_there"]
        figures = {name: manifest["metrics"][f"{name}.token_prob"] for name in ("forget", "retain")}
        assert figures["forget"]["after"]["value"] < 0.8 * figures["forget"]["before"]["value"]
        assert figures["retain"]["after"]["value"] > figures["forget"]["after"]["value"]
        assert ("anchor" in record) == (weight > 0)
    assert shares[0.0]["before"] == shares[1.0]["before"]
    assert shares[1.0]["after"] > shares[1.0]["before"] + 0.1
    assert shares[1.0]["after"] > shares[0.0]["after"]
