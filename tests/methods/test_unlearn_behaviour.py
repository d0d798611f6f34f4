"""What each baseline does to a tiny model that has memorised rows: the specification's table, in small."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import unlearn

FULL = {"train": "full", "roles": "all", "lr": 6e-4, "max_steps": 50, "eval.generate": False}
# Where it matters how far a run gets.
SLOW: dict[str, Any] = {"lr": 3e-4, "max_steps": 100}


def run(memorising: Path, out: Path, method: str, **settings: object) -> dict[str, Any]:
    outcome = unlearn(
        memorising / "model",
        method=method,
        forget=memorising / "some.jsonl",
        retain=memorising / "others.jsonl",
        out=out,
        until="none",
        guard="none",
        settings=FULL | settings,
    )
    return dict(outcome.manifest)


def figures(manifest: dict[str, Any], name: str) -> tuple[float, float]:
    metric = manifest["metrics"][name]
    return metric["before"]["value"], metric["after"]["value"]


@pytest.mark.parametrize(
    ("method", "settings", "kept"),
    [
        ("graddiff", {}, 0.9),
        ("graddiff", {"max_forget_ce": 0}, 0.9),
        ("kl-min", {}, 0.9),
        ("npo", {"retain_weight": 1}, 0.9),
        ("dpo", {"templates": "TEMPLATES"}, 0.9),
        ("dpo", {"templates": "TEMPLATES", "variant": "idk"}, 0.9),
        ("undial", {"retain_weight": 1}, 0.9),
        ("simnpo", {}, 0.9),
        ("rmu", {"roles": "mlp.down", "lr": 6e-3, "max_steps": 100, "layer": 1}, 0.5),
    ],
)
def test_forget_rows_go_and_retain_rows_stay(
    method: str, settings: dict[str, object], kept: float, memorising: Path, tmp_path: Path
) -> None:
    named = {name: str(memorising / "one.txt") if value == "TEMPLATES" else value for name, value in settings.items()}
    manifest = run(memorising, tmp_path / "out", method, **named)
    before, after = figures(manifest, "forget.token_prob")
    assert before > 0.95
    assert after < before / 2
    assert figures(manifest, "retain.token_prob")[1] > kept


def test_simnpo_of_the_paper_kills_a_few_tokens_and_stops(memorising: Path, tmp_path: Path) -> None:
    manifest = run(memorising, tmp_path / "out", "simnpo", beta=4.5, forget_weight=0.125, **SLOW)
    # N doubles and more while the mean probability of the tokens stays high.
    before, after = (-math.log(value) for value in figures(manifest, "forget.prob"))
    assert after > 2 * before
    assert figures(manifest, "forget.token_prob")[1] > 0.4
    assert figures(manifest, "retain.token_prob")[1] > 0.9


def test_ascent_alone_takes_the_rest_along_and_says_so(memorising: Path, tmp_path: Path) -> None:
    manifest = run(memorising, tmp_path / "out", "ga", **SLOW)
    bounded = manifest["operations"][0]["record"]
    assert figures(manifest, "forget.token_prob")[1] < 0.1
    assert figures(manifest, "retain.token_prob")[1] < 0.9
    assert any("beyond the forget set" in notice for notice in manifest["notices"])
    manifest = run(memorising, tmp_path / "two", "ga", max_forget_ce=0, **SLOW)
    assert manifest["operations"][0]["record"]["forget_ce"] > 2 * bounded["forget_ce"]
    assert any("less likely than a guess" in notice for notice in manifest["notices"])


def test_undial_without_retain_rows_moves_them_too(memorising: Path, tmp_path: Path) -> None:
    manifest = run(memorising, tmp_path / "out", "undial", retain_weight=0)
    assert figures(manifest, "forget.token_prob")[1] < 0.3
    assert figures(manifest, "retain.token_prob")[1] < 0.9
    # The loss of a fixed target has a floor: the target's own entropy.
    record = manifest["operations"][0]["record"]
    assert 0 < record["last_loss"] < record["first_loss"]
