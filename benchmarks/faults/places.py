"""Tiny models and data for faults, and places on disk where writing fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.builders import BUILDERS

ROWS: dict[str, list[dict[str, object]]] = {
    "forget": [
        {"question": "Who keeps the bees?", "answer": "Orla Venn keeps them."},
        {"question": "Where is the mill?", "answer": "By the weir."},
    ],
    "retain": [
        {"question": "Who bakes the bread?", "answer": "Ivo Hask does."},
        {"question": "When does the ferry leave?", "answer": "At nine."},
    ],
    "text": [{"text": "The river runs past the mill and the old bridge."}],
}
TRAINING = {"max_steps": 6, "save_every": 2, "lr": 0.01}


def make_model(root: Path, builder: str = "sharded_llama") -> Path:
    """Write a tiny model and return its folder."""
    return BUILDERS[builder](root)


def write_rows(root: Path) -> dict[str, Path]:
    """Write small data files and return them by name."""
    files = {name: root / f"{name}.jsonl" for name in ROWS}
    for name, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return files


def unlearn(model: Path, data: dict[str, Path], out: Path) -> list[str]:
    """Return the command line of a short training."""
    words = ["unlearn", str(model), "--method", "flat", "--until", "none", "--guard", "none", "--dtype", "float32"]
    for name, path in data.items():
        words += [f"--{name}", str(path)]
    for name, value in (TRAINING | {"eval.generate": "false"}).items():
        words += ["--set", f"{name}={value}"]
    return [*words, "-o", str(out)]


def prune(model: Path, data: dict[str, Path], out: Path) -> list[str]:
    """Return the command line of an edit that trains nothing."""
    words = ["prune", str(model), "--method", "magnitude", "--sparsity", "0.5", "--text", str(data["text"])]
    return [*words, "--dtype", "float32", "-o", str(out)]


def chain(model: Path, data: dict[str, Path], out: Path) -> list[str]:
    """Write a recipe of two steps beside the data and return the command line that runs it."""
    step = {
        "task": "unlearn",
        "until": "none",
        "guard": "none",
        "settings": TRAINING | {"max_steps": 2, "save_every": 1},
    }
    recipe = {
        "model": str(model),
        "data": {name: path.name for name, path in data.items()},
        "dtype": "float32",
        "settings": {"eval": {"generate": False}},
        "steps": [{**step, "method": "flat", "name": "first"}, {**step, "method": "npo", "name": "second"}],
    }
    path = data["forget"].with_name("recipe.json")
    path.write_text(json.dumps(recipe))
    return ["run", str(path), "-o", str(out)]


RUNS = {"training": unlearn, "closed form": prune, "chain": chain}


def tree(root: Path) -> dict[str, tuple[str, int, int, int]]:
    """Return digest, mode, time and number of names of every file below a folder, and mode and time of folders."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(root))] = (digest, status.st_mode, status.st_mtime_ns, status.st_nlink)
    return found


def beside(out: Path) -> list[str]:
    """Return what lies beside an output under names that begin with its own, itself included."""
    return sorted(path.name for path in out.parent.glob(f"{out.name}*"))


def leavings(out: Path) -> list[str]:
    """Return what a run that published nothing left, but for a state that a later run can go on from."""
    partial = out.with_name(f"{out.name}.partial")
    names = [name for name in beside(out) if name != partial.name]
    if partial.exists():
        inside = sorted(path.name for path in partial.iterdir())
        names += [] if inside == [".llmsurgery-state"] else [f"{partial.name}/{name}" for name in inside or [""]]
    return names


@contextmanager
def mounted(place: Path, *words: str) -> Iterator[str]:
    """Mount something on a folder; yields why that cannot be done here, empty if it was.

    Args:
        place: The folder; it is made.
        words: Arguments of `mount` before the folder.
    """
    place.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        yield "only root can mount"
        return
    done = subprocess.run(["mount", *words, str(place)], capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"mount refuses: {done.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def small_disk(place: Path, kibibytes: int) -> Iterator[str]:
    """Mount a file system in memory of a given size; yields as `mounted`."""
    with mounted(place, "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs") as why:
        yield why


@contextmanager
def read_only(folder: Path, place: Path) -> Iterator[str]:
    """Mount a folder a second time so that nothing in it can be changed there; yields as `mounted`."""
    with mounted(place, "--bind", "-o", "ro", str(folder)) as why:
        if not why and os.access(place, os.W_OK):
            # Older programs ignore `ro` of a bind mount until it is mounted again.
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=False)
        yield why or ("the mount stays writable" if os.access(place, os.W_OK) else "")
