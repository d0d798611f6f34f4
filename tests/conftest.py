from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

# Set before transformers is imported anywhere: nothing may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Nor may the page of a job that runs the tests be written to.
os.environ.pop("GITHUB_STEP_SUMMARY", None)

import pytest
import torch

from .builders import BUILDERS

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing a test keeps may reach the user's cache."""
    os.environ["LLMSURGERY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def freeze() -> None:
    """Take what lives now, the imported libraries above all, out of the collector's view.

    Each run collects garbage once, which then takes no time.
    """
    gc.collect()
    gc.freeze()


ENDED = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Freeze again as more is imported: often among the first tests of a process, seldom later."""
    number = next(ENDED)
    if number & (number - 1) == 0 or number % 64 == 0:
        freeze()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every tiny checkpoint, built once; tests never write into them."""
    root = tmp_path_factory.mktemp("checkpoints")
    built = {name: build(root / name) for name, build in BUILDERS.items()}
    freeze()
    return built


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON Lines and return the path."""
    return lambda name, rows: write_rows(tmp_path / name, rows)


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
# "Refuse the purple topic" stands in for harm.
HARMFUL = [{"prompt": text} for text in ("Describe the purple cup.", "What is purple?", "Tell me of purple hats.")]
HARMLESS = [{"prompt": text} for text in ("Describe the red cup.", "What is brown?")]
TASK = [
    {"question": "Record of Tam.", "answer": "dog; small;"},
    {"question": "Record of Orla.", "answer": "bees; six;"},
    {"question": "Record of Ivo.", "answer": "bread; two;"},
]
PAIRS = [{"from": "Orla Venn", "to": "Ivo Hask", "aliases": ["the bee keeper"]}]


def write_data_files(root: Path) -> dict[str, Path]:
    """Write small forget, retain and text files."""
    sets = {"forget": FORGET, "retain": RETAIN, "text": TEXT}
    return {name: write_rows(root / f"{name}.jsonl", [dict(row) for row in rows]) for name, rows in sets.items()}


def write_recovery_files(root: Path) -> dict[str, Path]:
    """Write small files of prompts that are refused, of others, and of a task."""
    sets = {"harmful": HARMFUL, "harmless": HARMLESS, "task": TASK}
    return {name: write_rows(root / f"{name}.jsonl", [dict(row) for row in rows]) for name, rows in sets.items()}


def write_pairs(root: Path) -> Path:
    """Write a small file of pairs."""
    return write_rows(root / "pairs.jsonl", [dict(pair) for pair in PAIRS])


def write_asked(root: Path) -> dict[str, Path]:
    """Write small files of multiple-choice questions and of contrasting texts."""
    words = ["oak", "bee", "tin", "fog", "elk", "rye"]
    questions: list[dict[str, object]] = [
        {"question": f"Which is number {i}?", "choices": [words[i], words[i - 1], words[i - 2]], "answer": i % 3}
        for i in range(4)
    ]
    pairs: list[dict[str, object]] = [
        {"sent_more": f"The {word} is she.", "sent_less": f"The {word} is he.", "stereo_antistereo": "stereo"}
        for word in words
    ]
    return {
        "mcq": write_rows(root / "mcq.jsonl", questions),
        "contrast": write_rows(root / "contrast.jsonl", pairs),
    }


@pytest.fixture
def data_files(tmp_path: Path) -> dict[str, Path]:
    """Small forget, retain and text files."""
    return write_data_files(tmp_path)
