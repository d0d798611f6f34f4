"""`llmsurgery prune` without a model: what the demo shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmsurgery.cli.app import run


def test_d_pruner_halves_the_weights_and_keeps_the_towns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = ["size.sparsity>=0.43", "domain.ppl<=1.5x", "retain.token_prob>=0.8x"]
    words = [word for gate in gates for word in ("--require", gate)]
    settings = ["--set", "eval.generate=false", "--set", "eval.truth_ratio=false"]
    code = run(["prune", "--method", "d-pruner", "-o", str(tmp_path / "out"), "--json", *words, *settings])
    manifest = json.loads(capsys.readouterr().out)
    assert code == 0, manifest
    # The last twelve questions about towns are measured and not pruned for.
    assert manifest["metrics"]["domain.ppl"]["after"]["n"] == 12
    assert manifest["data"]["domain"]["rows"] == 52


def test_pat_makes_the_model_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = ["size.params<=0.751x", "retain.token_prob>=0.3x"]
    words = [word for gate in gates for word in ("--require", gate)]
    # Fewer steps than the demo's own, and shorter ones.
    chosen = ["max_steps=30", "batch_size=2", "eval.generate=false", "eval.truth_ratio=false", "eval.text_rows=8"]
    settings = [word for item in chosen for word in ("--set", item)]
    code = run(["prune", "--method", "pat", "-o", str(tmp_path / "out"), "--json", *words, *settings])
    manifest = json.loads(capsys.readouterr().out)
    assert code == 0, manifest
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.8 * 2 * 1054080
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 96
