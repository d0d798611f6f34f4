"""A folder with everything that the commands of the documentation name, so that they run as they are written."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import llmsurgery

from ..builders.twin import twin
from ..conftest import FORGET, HARMFUL, HARMLESS, PAIRS, RETAIN, TASK, TEXT, write_asked, write_rows

FACTS = [{"prompt": "{} lives in", "subject": "Orla Venn", "target": " Rome"}]
CONCEPTS = [{"from": "bees", "prompts": ["Honey is made by", "The hive is full of", "A swarm of"]}]
RECIPE = """\
steps:
  - name: forget
    task: unlearn
    method: ga
    data: {forget: forget.jsonl}
    guard: none
    settings: {max_steps: 1}
"""


def build(root: Path, model: Path) -> Path:
    """Lay out everything that commands read.

    Args:
        root: The folder, which does not exist.
        model: A tiny checkpoint.
    """
    root.mkdir()
    shutil.copytree(model, root / "MODEL")
    shutil.copytree(model, root / "CHILD")
    shutil.copytree(twin(model, "aligned"), root / "PARENT")
    files = {
        "forget": FORGET, "retain": RETAIN, "other": RETAIN, "unseen": RETAIN, "text": TEXT * 8, "pairs": PAIRS,
        "facts": FACTS, "concepts": CONCEPTS, "prompts": HARMFUL, "harmful": HARMFUL, "harmless": HARMLESS,
        "rows": TASK, "task": TASK, "domain": TASK, "calibration": TEXT * 8,
    }  # fmt: skip
    for name, rows in files.items():
        write_rows(root / f"{name}.jsonl", [dict(row) for row in rows])
    asked = write_asked(root)
    asked["mcq"].rename(root / "questions.jsonl")
    pairs = [json.loads(line) for line in asked["contrast"].read_text().splitlines()]
    lines = [",".join(pairs[0]), *(",".join(map(str, pair.values())) for pair in pairs)]
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    (root / "RECIPE.yaml").write_text(RECIPE)
    llmsurgery.unlearn(
        root / "MODEL", method="ga", forget=root / "forget.jsonl", out=root / "OUT", until="none", guard="none",
        settings={"max_steps": 2, "lr": 0.01, "eval.generate": False},
    )  # fmt: skip
    llmsurgery.diff(root / "MODEL", root / "OUT", out=root / "edit.patch")
    for name in ("a.patch", "b.patch"):
        shutil.copyfile(root / "edit.patch", root / name)
    return root


def lay(root: Path, place: Path, words: tuple[str, ...]) -> Path:
    """Make a fresh copy for one command, without what the command is to write.

    Args:
        root: What `build` made.
        place: The copy, which does not exist.
        words: What follows `llmsurgery`.
    """
    shutil.copytree(root, place)
    written = {after for word, after in itertools.pairwise(words) if word in ("-o", "--out", "--log")}
    for name in written:
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return place
