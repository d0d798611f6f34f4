"""Plans of methods that train nothing: made from headers, whatever the size of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmsurgery import redirect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.errors import UsageError
from llmsurgery.run.headers import plan_from_headers
from llmsurgery.run.request import Request

from ..builders.sparse import llama_70b

HEAVY = ("torch", "transformers", "peft", "accelerate", "scipy")
NAMES = {"source": "Orla Venn", "target": "Ivo Hask"}


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_70b(tmp_path_factory.mktemp("huge") / "model")


def test_a_model_of_70_billion_is_planned_from_headers(huge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    original = os.preadv

    def spy(descriptor: int, buffers: Any, offset: int) -> int:
        count = original(descriptor, buffers, offset)
        fetched.append(count)
        return count

    monkeypatch.setattr(os, "preadv", spy)
    plan: Any = redirect(huge, method="rocr", dry_run=True, settings={"layers": "8,9,10"}, **NAMES).manifest
    headers = sum(int.from_bytes(path.open("rb").read(8), "little") + 8 for path in huge.glob("*.safetensors"))
    sides = sum(path.stat().st_size for path in huge.glob("*.json"))
    assert Checkpoint.open(huge).nbytes > 140 * 10**9
    assert sum(fetched) <= 3 * (headers + sides) < 10**6
    assert plan["targets"] == {"mlp.down": {"tensors": 3, "parameters": 3 * 8192 * 28672, "bytes": 6 * 8192 * 28672}}
    assert plan["bytes_to_rewrite"] == 6 * 8192 * 28672


def test_memory_of_a_streamed_run_does_not_grow_with_the_model(huge: Path) -> None:
    own = {"layers": "8,9,10", "stats_tokens": 4096}
    plans: list[Any] = [
        redirect(huge, method="rocr", dry_run=True, settings={**own, "eval.figures": figures}, **NAMES).manifest
        for figures in ("all", "edit")
    ]
    whole, edit = (plan["memory_bytes"] for plan in plans)
    assert whole > 140 * 10**9
    # Embedding, three blocks and one more, and one matrix in float32 twice.
    assert edit < 14 * 10**9


def test_planning_loads_nothing_heavy(huge: Path) -> None:
    words = [
        "redirect",
        str(huge),
        "--method",
        "rocr",
        "--from",
        "Orla Venn",
        "--to",
        "Ivo Hask",
        "--stats-tokens",
        "99",
        "--strict",
        "--dry-run",
        "--json",
    ]
    code = (
        "import sys\nfrom llmsurgery.cli.app import run\n"
        f"code = run({words!r})\n"
        f"print('LOADED', sorted(set(sys.modules) & set({HEAVY!r})), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document, _, last = done.stdout.rpartition("LOADED")
    assert last.split() == ["[]", "0"]
    plan = json.loads(document)
    assert plan["source"]["bytes"] > 140 * 10**9
    assert (plan["operations"][0]["settings"]["stats_tokens"], plan["operations"][0]["settings"]["strict"]) == (
        99,
        True,
    )


def test_what_is_wrong_with_a_request_shows_in_the_plan_too(huge: Path, tmp_path: Path) -> None:
    for options in (
        {"until": "forget.prob<=1"},
        {"quantize": "int8"},
        {"guard": "self"},
        {"require": ["redirect.kl_alias<=1"]},
        {"settings": {"eval.figures": "edit"}, "require": ["utility.ppl_ratio<=2"]},
        {"settings": {"layers": "80"}},
    ):
        with pytest.raises(UsageError):
            redirect(huge, method="rocr", dry_run=True, **NAMES, **options)  # type: ignore[arg-type]


def test_questions_with_options_are_counted_in_a_plan_of_another_task(huge: Path, tmp_path: Path) -> None:
    questions = tmp_path / "mcq.jsonl"
    row = {"question": "What is blue?", "choices": ["grass", "the sky"], "answer": 1}
    questions.write_text(2 * (json.dumps(row) + "\n"))
    names, data = (NAMES["source"], NAMES["target"]), {"mcq": str(questions)}
    plan: Any = plan_from_headers(Request("redirect", "rocr", str(huge), data, concepts=names, dry_run=True))
    assert plan["data"]["mcq"] == 2
