"""List what of a checkpoint directory belongs into an edited copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmsurgery.checkpoint.index import Checkpoint
from llmsurgery.checkpoint.oserrors import reading
from llmsurgery.checkpoint.paths import real_path
from llmsurgery.checkpoint.refuse import OTHER_SUFFIXES, PICKLE_SUFFIXES

STATE = ".llmsurgery-state"
"""Directory inside an unfinished output that holds what an interrupted run goes on from."""

# Version control, caches, our own undo data and states describe the source or a run, not the result.
PRIVATE_NAMES = frozenset({".git", ".cache", ".llmsurgery", STATE})
_STALE_SUFFIXES = (*PICKLE_SUFFIXES, *OTHER_SUFFIXES, ".onnx_data")
_STALE_INDEX = ".index.json"
# Root-level names under which publishers keep a second copy of the same weights.
_WEIGHT_PREFIXES = ("model", "consolidated", "pytorch_model")


@dataclass
class Inventory:
    """The files of a source directory, sorted by what becomes of them.

    Attributes:
        files: Files to carry over, by relative name; the path may be a symbolic link.
        folders: Sub-directories that hold them, by relative name, parents first.
        skipped: Relative names of weights that the edit would make stale.
        notices: What a user should know about the rest.
    """

    files: dict[str, Path]
    folders: dict[str, Path]
    skipped: list[str]
    notices: list[str]

    @classmethod
    def of(cls, source: Checkpoint) -> Inventory:
        """List the directory of a checkpoint.

        Args:
            source: The checkpoint.

        Raises:
            InputError: A directory of it may not be read.
        """
        result = cls({}, {}, [], [])
        edited_before = (source.root / "surgery.json").exists()
        found: dict[str, Path] = {}
        for relative, path in _walk(source.root, real_path(source.root), "", result.notices):
            if relative in source.headers or not _is_record(relative, edited_before):
                found[relative] = path
        # An index may name a shard in a folder that is otherwise left out.
        found.update({name: source.root / name for name in source.headers})
        for relative, path in found.items():
            if relative not in source.headers and _is_stale(relative, source.index_file):
                result.skipped.append(relative)
            else:
                result.files[relative] = path
        for relative in result.files:
            for parent in reversed(Path(relative).parents[:-1]):
                result.folders[parent.as_posix()] = source.root / parent
        if result.skipped:
            names = ", ".join(map(repr, result.skipped[:5])) + (", ..." if len(result.skipped) > 5 else "")
            result.notices.append(f"left out, because the edit makes these copies of the weights stale: {names}")
        return result


def _walk(folder: Path, real_root: Path, prefix: str, notices: list[str]) -> Iterator[tuple[str, Path]]:
    with reading(folder):
        entries = sorted(folder.iterdir())
    for path in entries:
        relative = prefix + path.name
        if path.name in PRIVATE_NAMES or path.name.endswith(".partial"):
            continue
        if path.is_dir():
            real = real_path(path)
            # A link to a folder outside could drag in anything; one to a parent would never end.
            if path.is_symlink() and (not real.is_relative_to(real_root) or real_path(folder).is_relative_to(real)):
                notices.append(f"left out: {relative!r} is a link to a folder outside of the checkpoint")
                continue
            yield from _walk(path, real_root, relative + "/", notices)
        elif path.is_file():
            yield relative, path
        else:
            notices.append(f"left out: {relative!r} is not a file, or is a link to nothing")


def _is_record(relative: str, edited_before: bool) -> bool:
    """Tell whether a root-level file was written by an earlier run about its own edit."""
    if relative == "surgery.json" or ("/" not in relative and relative.endswith(".report.json")):
        return True
    return edited_before and relative == "report.html"


def _is_stale(relative: str, index_file: str | None) -> bool:
    name = relative.lower()
    if name.endswith(_STALE_SUFFIXES):
        return True
    if "/" in relative:
        return False
    if name.endswith(_STALE_INDEX):
        return relative != index_file
    # The index in use names its files, which never come here: any other is a second or an old copy.
    return name.endswith(".safetensors") and name.startswith(_WEIGHT_PREFIXES)
