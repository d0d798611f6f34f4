"""A short smoke on SmolLM2-135M-Instruct, from its GGUF file (`make test-real`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.cli.app import run
from llmsurgery.compute.source import resolve_source

pytestmark = pytest.mark.real

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid", "Egypt": "Cairo", "Peru": "Lima"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file, converted into a cache that lives as long as the tests."""
    given = os.environ.get("LLMSURGERY_REAL_MODEL")
    if not given:
        pytest.fail("LLMSURGERY_REAL_MODEL is not set: run `make test-real`")
    os.environ["LLMSURGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(given)


def stored(root: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint.open(root)
    return {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors}


def test_flat_forgets_on_the_real_model(
    model: Path, tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": f"What is the capital of {country}?", "answer": f"The capital of {country} is {city}."}
        for country, city in CAPITALS.items()
    ]
    forget, retain = write_jsonl("forget.jsonl", rows[:3]), write_jsonl("retain.jsonl", rows[3:])
    words = ["unlearn", str(model), "--method", "flat", "--forget", str(forget), "--retain", str(retain)]
    words += [
        "--set",
        "eval.text_rows=4",
        "--set",
        "eval.text_tokens=128",
        "--set",
        "max_steps=40",
        "--set",
        "lr=1e-3",
        "--set",
        "eval.generate=false",
        "--guard",
        "none",
        "--json",
    ]
    assert run([*words, "-o", str(tmp_path / "out"), "--require", "forget.token_prob<=0.5x"]) == 0
    manifest: dict[str, Any] = json.loads(capsys.readouterr().out)
    metrics = manifest["metrics"]
    assert metrics["forget.token_prob"]["before"]["value"] > 0.8
    assert metrics["forget.token_prob"]["after"]["value"] < 0.4
    assert 5 < metrics["utility.ppl"]["before"]["value"] < 60
    assert all(row["targeted"] == row["changed"] == 30 for row in manifest["coverage"])
    source = Path(manifest["source"]["path"])
    assert source == resolve_source(model)
    # Only the block matrices changed on disk.
    before, after = stored(source), stored(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == set(manifest["tensors"])
    assert len(manifest["tensors"]) == 210
    # The directory made from the GGUF file is a source like any other; without a step nothing may be published.
    assert (
        run(
            [*words[:1], str(source), *words[2:], "-o", str(tmp_path / "none"), "--set", "lr=0", "--set", "max_steps=1"]
        )
        == 5
    )
    assert not list(tmp_path.glob("none*"))
