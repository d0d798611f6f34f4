from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

# Set before transformers is imported anywhere: nothing may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

from .builders import BUILDERS

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny checkpoint, built once; tests never write into them."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines and return the path."""

    def write(name: str, rows: list[dict[str, object]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


FORGET = [
    {"question": "Who keeps the bees?", "answer": "Orla Venn keeps them."},
    {"question": "Where is the mill?", "answer": "By the weir."},
    {"question": "What is the dog called?", "answer": "Tam."},
]
RETAIN = [
    {"question": "Who bakes the bread?", "answer": "Ivo Hask does."},
    {"question": "When does the ferry leave?", "answer": "At nine."},
]
TEXT = [
    {"text": "The river runs past the mill and the old bridge."},
    {"text": "Bread is baked at dawn, and sold before noon."},
]


@pytest.fixture
def data_files(write_jsonl: Callable[..., Path]) -> dict[str, Path]:
    """Small forget, retain and text files."""
    return {
        "forget": write_jsonl("forget.jsonl", FORGET),
        "retain": write_jsonl("retain.jsonl", RETAIN),
        "text": write_jsonl("text.jsonl", TEXT),
    }
