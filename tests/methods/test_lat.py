"""Targeted LAT: recipes, wrapped losses, what the attack changes and what it must not, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmsurgery import unlearn
from llmsurgery.arch.spec import Structure
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.cli.app import run
from llmsurgery.data.records import read_rows
from llmsurgery.errors import UsageError
from llmsurgery.methods.settings import resolve_config
from llmsurgery.methods.unlearn.lat import Lat, LatConfig, attacked_places
from llmsurgery.train.adversary import Adversary, Strength
from llmsurgery.train.attacked import settled
from llmsurgery.train.pooling import row_means
from llmsurgery.train.scorer import Scorer

from ..train.bench import config as training
from .worked import DATA, LossBench

FAST = {"max_steps": 4, "lr": 0.01, "eval.generate": False, "batch_size": 2, "pgd_steps": 2, "model_steps": 2}


def config(**settings: object) -> LatConfig:
    resolved: LatConfig = resolve_config(LatConfig, settings, Lat.spec.presets)
    return resolved


def forget(model: Path, data: dict[str, Path], out: Path, method: str = "lat", **settings: Any) -> Any:
    options = {"until": settings.pop("until", "none"), "guard": "none", "batch_size": settings.pop("micro", None)}
    chosen = {**FAST, **settings} if method == "lat" else settings
    return unlearn(model, method=method, out=out, settings=chosen, **options, **data).manifest


def record_of(manifest: Any) -> Any:
    return manifest["operations"][0]["record"]


@pytest.mark.parametrize(
    ("layers", "settings", "places"),
    [
        (32, {}, [8, 16, 24, 30]),
        (5, {}, [1, 2, 3]),
        (2, {}, [0]),
        (1, {}, [0]),
        (32, {"attack_layers": "embedding,8,16"}, [-1, 8, 16]),
        (32, {"base": "rmu"}, [6]),
        (32, {"base": "rmu", "base_settings": "layer=20"}, [8, 16]),
        (2, {"base": "rmu", "base_settings": "layer=0"}, [-1]),
    ],
)
def test_where_it_attacks(layers: int, settings: dict[str, object], places: list[int]) -> None:
    structure: Any = type("Shape", (), {"layers": layers})
    assert attacked_places(config(**settings), structure) == places


@pytest.mark.parametrize("preset", Lat.spec.presets)
def test_recipes_of_the_authors_resolve(preset: str, checkpoints: dict[str, Path]) -> None:
    chosen = config(preset=preset)
    structure: Any = type("Shape", (), {"layers": 32})
    assert (
        attacked_places(chosen, structure)
        == {
            "paper": [7],
            "wmdp-rmu": [7],
            "jailbreak": [-1, 8, 16, 24, 30],
            "jailbreak-llama3": [-1, 8, 16, 24, 30],
            "backdoor": [4, 12, 20, 28],
        }[preset]
    )
    assert (chosen.pgd_steps, chosen.model_steps) == (16, 4)
    assert chosen.training.max_length == {"paper": 600, "wmdp-rmu": 768}.get(preset, 512)
    assert chosen.fresh_optimizer == (preset not in {"wmdp-rmu", "backdoor"})


def test_what_cannot_be(checkpoints: dict[str, Path]) -> None:
    bench = LossBench(checkpoints["sharded_llama"])
    method = Lat()
    for settings, said in (
        ({"attack_layers": "2"}, "2 cannot be attacked"),
        ({"attack_layers": "embeding"}, "embeding cannot be attacked"),
        ({"base": "nppo"}, "unknown loss"),
        ({"base_settings": "beta=1"}, "has no base_settings"),
    ):
        with pytest.raises(UsageError, match=said):
            method.plan(config(**settings), bench.structure)
    data = {"forget": DATA["forget"]}
    for settings, said in (
        ({}, "--retain is missing"),
        ({"base": "graddiff"}, "--retain is missing"),
        ({"adversary_toward": 0, "adversary_away": 0}, "nothing to minimise"),
        ({"targeted": False, "base": "ga"}, "no untargeted adversary"),
        ({"targeted": False, "base": "preference"}, "no untargeted adversary"),
        ({"toward_weight": 0, "away_weight": 0}, "no forget term"),
        ({"targeted": False, "adversary_away": 0}, "nothing to minimise"),
    ):
        with pytest.raises(UsageError, match=said):
            method.prepare(config(**settings), bench.encoder, data)
    assert len(method.prepare(config(kl_weight=0), bench.encoder, data).forget) == 4


def test_wrapped_loss_says_what_moves(checkpoints: dict[str, Path]) -> None:
    structure: Structure = LossBench(checkpoints["sharded_llama"]).structure
    chosen = config(base="rmu", base_settings="layer=0", roles="mlp.down")
    assert [(tensor.layer, tensor.label) for tensor in Lat().plan(chosen, structure)] == [(0, "mlp.down")]


def test_states_fall_between_outer_steps() -> None:
    own = training(save_every=10, batch_size=4)
    assert settled(own, 20, 4, False).save_every == 12
    assert settled(own, 20, 1, False) == own
    assert settled(own, 20, 4, True).check_every == 20
    assert settled(training(check_every=3), 20, 4, True).check_every == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_mode": "normalised", "sft_weight": 1.0, "attack_positions": "all"},
        {"targeted": False, "attack_layers": "embedding"},
        {"base": "preference"},
        {"base": "preference", "preference": "ipo", "refresh_every": 1},
        {"base": "ga"},
        {"base": "npo", "base_settings": "beta=0.5"},
        {"base": "flat", "base_settings": "templates=refusal"},
        {"base": "dpo"},
        {"base": "undial"},
        {"base": "rmu", "base_settings": "layer=1", "roles": "mlp.down", "train": "full"},
        {"gradient_checkpointing": True},
    ],
)
def test_every_base_trains_under_attack(
    settings: dict[str, object], checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    record = record_of(forget(checkpoints["sharded_llama"], data_files, tmp_path / "out", **settings))
    assert record["steps"] == 4
    assert record["last_loss"] != record["first_loss"]
    assert record["adversary_after"] < record["adversary_before"]
    assert all(value > 0 for value in record["attack_radius"].values())


@pytest.mark.parametrize("base", ["graddiff", "npo", "rmu"])
def test_ball_without_extent_is_plain_training_bit_for_bit(
    base: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model, shared = checkpoints["gemma2"], {"max_steps": 5, "lr": 0.01, "eval.generate": False, "batch_size": 2}
    where = {"roles": "mlp.down", "layers": "0,1"}
    plain = forget(model, data_files, tmp_path / "plain", base, **shared, **where)
    none = {"eps": 0, "base": base, "model_steps": 1, **shared, **where}
    same = forget(model, data_files, tmp_path / "none", **none)
    assert same["tensors"] == plain["tensors"]
    other = forget(model, data_files, tmp_path / "some", **{**none, "eps": 1.0})
    assert other["tensors"] != plain["tensors"]


def test_parts_of_a_batch_give_the_same_training(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    model = checkpoints["olmo2"]
    losses = [
        record_of(forget(model, data_files, tmp_path / f"{micro}", batch_size=3, micro=micro))["last_loss"]
        for micro in (3, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_rows_of_an_outer_step_stay_and_are_attacked_once(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[tuple[str, ...]] = []
    original = Adversary.attack

    def watch(adversary: Adversary, rows: Any, *more: Any) -> Any:
        attacked.append(tuple(row.where for row in rows))
        return original(adversary, rows, *more)

    monkeypatch.setattr(Adversary, "attack", watch)
    model = checkpoints["tied_llama"]
    forget(model, data_files, tmp_path / "one", max_steps=6, model_steps=3)
    assert len(attacked) == 2
    attacked.clear()
    forget(model, data_files, tmp_path / "two", max_steps=6, model_steps=3, refresh_every=2)
    assert len(attacked) == 4
    assert attacked[0] == attacked[1]
    assert attacked[2] == attacked[3]


@pytest.mark.parametrize("base", ["toward-away", "preference", "graddiff"])
def test_interrupted_run_ends_in_the_same_bytes(
    base: str, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    from llmsurgery.train.loop import _Loop

    words = ["unlearn", str(checkpoints["gpt2"]), "--method", "lat", "--guard", "none", "--until", "none", "-q"]
    words += [part for name in ("forget", "retain") for part in (f"--{name}", str(data_files[name]))]
    # Asked to keep a state after every step; it keeps one after every outer step.
    settings = {**FAST, "base": base, "max_steps": 8, "model_steps": 3, "save_every": 1}
    words += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    outs = [tmp_path / name for name in ("whole", "parts")]
    assert run([*words, "-o", str(outs[0])]) == 0
    original, calls = _Loop.advance, []

    def stop(loop: _Loop, loss: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(loop, loss)

    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "advance", stop)
        assert run([*words, "-o", str(outs[1])]) == 130
    assert run([*words, "-o", str(outs[1]), "--resume"]) == 0
    manifests = [json.loads((out / "surgery.json").read_text()) for out in outs]
    assert record_of(manifests[0]) == record_of(manifests[1])
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_fresh_optimizer_remembers_no_outer_step(
    fresh: bool, checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path
) -> None:
    """Without moments AdamW moves every number by the step size, whatever its gradient: by 1 or 3 of it in 3 steps."""
    source, lr = checkpoints["gemma2"], 0.001
    options = {"max_steps": 3, "model_steps": 1, "eps": 0, "lr": lr, "weight_decay": 0, "clip": 0}
    where = {"train": "full", "roles": "mlp.down", "layers": "1", "fresh_optimizer": fresh}
    (name,) = forget(source, data_files, tmp_path / "out", **options, **where)["tensors"]
    before, after = (Checkpoint.open(root).read(name) for root in (source, tmp_path / "out"))
    steps = np.abs(after.astype(np.float64) - before) / lr
    whole = np.minimum(np.abs(steps - 1), np.abs(steps - 3)) < 0.01
    assert (whole.mean() > 0.95) == fresh


def test_stop_rule_must_hold_under_attack_too(memorising: Path, tmp_path: Path) -> None:
    data = {"forget": memorising / "some.jsonl", "retain": memorising / "others.jsonl"}
    settings = {
        "train": "full", "roles": "all", "lr": 3e-4, "max_steps": 80, "batch_size": 4, "pgd_steps": 8, "eps": 2.0,
        "templates": str(memorising / "one.txt"),
    }  # fmt: skip
    steps = [
        record_of(
            forget(
                memorising / "model",
                data,
                tmp_path / f"{attacked}",
                until="forget.token_prob<=0.5x",
                until_attacked=attacked,
                check_every=1,
                **settings,
            )
        )
        for attacked in (False, True)
    ]
    assert steps[0]["stopped"] == steps[1]["stopped"] == "until"
    assert steps[0]["steps"] < steps[1]["steps"]


def test_preference_pairs_as_data(
    checkpoints: dict[str, Path], write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = [
        {"prompt": "Name the colour. ", "chosen": "I will not.", "rejected": "It is purple."},
        {"prompt": "Name the flower. ", "chosen": "No.", "rejected": "It is a violet."},
    ]
    data = {"forget": write_jsonl("forget.jsonl", pairs), "retain": write_jsonl("retain.jsonl", pairs[:1])}
    for base in ("toward-away", "preference"):
        settings = {"base": base, "max_steps": 30, "lr": 0.01, "train": "full", "roles": "all", "eps": 0.1}
        manifest = forget(checkpoints["sharded_llama"], data, tmp_path / base, **settings)
        # The retain row is the chosen answer, so that one rises while the rejected ones fall.
        moved = {name: manifest["metrics"][f"{name}.prob"] for name in ("forget", "retain")}
        assert moved["forget"]["after"]["value"] < moved["forget"]["before"]["value"]
        assert moved["retain"]["after"]["value"] > moved["retain"]["before"]["value"]


def attacked_probability(model: Path, rows: list[Any], radius: float) -> float:
    """Mean probability of answer tokens after a fresh targeted attack of 32 steps behind block 0."""
    bench = LossBench(model)
    encoded = [bench.encoder.encode(row) for row in rows]
    with bench.trainable(training(roles="attn.o")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt")
        with adversary.installed() as calm:
            scorer = Scorer(calm, bench.encoder.pad_id)

            def surprisal() -> torch.Tensor:
                scores, owners = scorer.log_probabilities(encoded)
                return -row_means(scores, owners, len(encoded)).sum()

            found = adversary.attack(encoded, surprisal, Strength({0: radius}, 0.05, 32, 0.0)) if radius else None
            bench.model.eval()
            with adversary.under(found), torch.no_grad():
                return float(scorer.log_probabilities(encoded)[0].exp().mean())


def test_attack_brings_back_what_plain_training_hid(memorising: Path, tmp_path: Path) -> None:
    data = {"forget": memorising / "some.jsonl", "retain": memorising / "others.jsonl"}
    settings = {
        **{"train": "full", "roles": "all", "lr": 3e-4, "max_steps": 80, "batch_size": 4, "attack_layers": "0"},
        **{"pgd_steps": 16, "model_steps": 4, "templates": str(memorising / "one.txt")},
    }
    rows, attacked = read_rows(data["forget"]), {}
    for eps in (0.0, 4.0):
        out = tmp_path / f"{eps}"
        metrics = forget(memorising / "model", data, out, **settings, eps=eps)["metrics"]
        # Seen from outside both have forgotten the rows and kept the others.
        assert metrics["forget.token_prob"]["after"]["value"] < 0.1
        assert metrics["retain.token_prob"]["after"]["value"] > 0.9
        attacked[eps] = attacked_probability(out, rows, 4.0)
    assert attacked[0.0] > 0.3
    assert attacked[4.0] < 0.05
