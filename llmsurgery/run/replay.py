"""A manifest as a recipe: the operations that it records, with every resolved setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmsurgery.checkpoint import Checkpoint, file_digest, tensor_digest
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.demo import WORLD
from llmsurgery.errors import InputError
from llmsurgery.methods.registry import find_method
from llmsurgery.run.manifest import FORMAT
from llmsurgery.run.overrides import Recorded
from llmsurgery.run.recipe import Recipe

GUARD = "guard"
DEMO = "demo"
"""What a manifest says in place of the path of an embedded model."""


def is_manifest(document: Mapping[str, Any]) -> bool:
    """Tell a manifest from a recipe."""
    return "format" in document and "operations" in document


def recipe_of(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the recipe of a manifest.

    Args:
        manifest: Of a single operation or of a recipe.
        where: The file, for messages.

    Raises:
        InputError: It was made by another version or command, or is incomplete.
    """
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{where} has format {manifest['format']!r}", f"this version replays format {FORMAT}", "use its version"
        )
    try:
        recipe: dict[str, Any] = {
            "model": manifest["source"]["given"],
            "save": manifest["save"],
            "undo": manifest["cost"]["undo_bytes"] is not None or manifest["save"] != "full",
        }
        if "steps" not in manifest:
            (operation,) = manifest["operations"]
            return recipe | {"steps": [_step(operation, manifest)]}
        by_name = {operation["name"]: operation for operation in manifest["operations"]}
        steps = []
        for step in manifest["steps"]:
            operation = by_name.get(step["name"]) or step["operation"]
            steps.append({**_step(operation, operation), "name": step["name"], "needs": step["needs"]})
        gates = [gate["gate"] for gate in manifest["gates"] if gate["step"] is None]
        return recipe | {"require": gates, "steps": steps}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{where} cannot be replayed",
            f"its record of operations is not that of a run: {error!r}",
            "give the manifest of an operation or of a recipe",
        ) from error


def _step(operation: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step that asks for what an operation resolved.

    Args:
        operation: The record of the operation.
        beside: Where its data and further models are recorded.
    """
    if "method" not in operation:
        raise ValueError(f"`{operation['task']}` is no operation of a method")
    guard, data = dict(operation[GUARD]), {name: _path(name, entry) for name, entry in beside["data"].items()}
    source, pairs = guard.pop("source"), operation.get("pairs", [])
    step: dict[str, Any] = {
        "task": operation["task"],
        "method": operation["method"],
        "settings": {
            **operation["settings"],
            **{f"eval.{name}": value for name, value in operation["evaluation"].items()},
            **{f"guard.{name}": value for name, value in guard.items()},
        },
        GUARD: data.pop(GUARD) if source == "file" else source,
        "data": data,
        "retain_model": (beside.get("retain_model") or {}).get("path"),
        "models": {
            name: entry["path"]
            for name, entry in (beside.get("models") or {}).items()
            if entry.get("path", DEMO) != DEMO
        },
        **{key: operation[key] for key in ("seed", "device", "dtype", "quantize", "batch_size", "require")},
    }
    if find_method(operation["method"], operation["task"]).spec.trained:
        step["until"] = operation["until"] or "none"
    if pairs and "pairs" not in data:
        (pair,) = pairs
        step |= {"from": pair["from"], "to": pair.get("to")}
    return step


def _path(name: str, entry: Mapping[str, Any]) -> str:
    """Return where a data file lies: what ships with the package may lie elsewhere on this machine."""
    path = Path(entry["path"])
    if not path.exists():
        shipped = [GENERAL_TEXT, *sorted(WORLD.rglob(path.name))]
        for other in shipped:
            if file_digest(other) == entry["sha256"]:
                return str(other)
    return str(path)


def recorded_of(manifest: Mapping[str, Any], recipe: Recipe, replaced: set[str]) -> Recorded:
    """Return what must be as it was for a replay to be one.

    Args:
        manifest: The manifest.
        recipe: The recipe made of it.
        replaced: Dotted paths that the command line replaces.
    """
    names = [str(step.name) for step in recipe.steps]
    data: dict[str, dict[str, str]] = {}
    for name, step in zip(names, recipe.steps, strict=True):
        entries = manifest["data"]
        if "steps" in manifest:
            found = [step for step in manifest["steps"] if step["name"] == name]
            operations = [operation for operation in manifest["operations"] if operation["name"] == name]
            entries = (operations or [found[0]["operation"]])[0]["data"]
        kept = {
            key: entry["sha256"]
            for key, entry in entries.items()
            if not {f"data.{key}", f"steps.{name}.data.{key}"} & replaced
        }
        if f"steps.{name}.guard" in replaced or step.guard in (None, "none", "self"):
            kept.pop(GUARD, None)
        data[name] = kept
    if "model" in replaced:
        return Recorded(None, {}, data)
    before = {
        name: str(record["sha256_before"]) for name, record in manifest["tensors"].items() if record["sha256_before"]
    }
    return Recorded(manifest["source"]["config_sha256"], before, data)


def check_source(recorded: Recorded, source: Checkpoint) -> None:
    """Refuse another source than the recorded one.

    Raises:
        InputError: Names what differs.
    """
    if recorded.config_sha256 is None:
        return
    what = None
    if file_digest(source.root / "config.json") != recorded.config_sha256:
        what = "config.json differs"
    for name, digest in recorded.tensors.items():
        info = source.tensors.get(name)
        if what is None and (info is None or tensor_digest(info.path, info.start, info.end) != digest):
            what = f"tensor {name!r} differs"
    if what is not None:
        raise InputError(
            f"{str(source.root)!r} is not the recorded source: {what}",
            "a replay from another model gives another result",
            "give the right model with model=DIR",
        )


def check_data(recorded: Recorded, digests: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse data that are not the recorded ones.

    Args:
        recorded: What the manifest says.
        digests: Step -> data name -> digest of what was found.

    Raises:
        InputError: Names the first.
    """
    for step, entries in recorded.data.items():
        for name, digest in entries.items():
            if name in digests[step] and digests[step][name] != digest:
                raise InputError(
                    f"the data {name!r} of step {step} are not those of the manifest",
                    "their SHA-256 differs, and the replay would give another result",
                    f"restore the file, or say that another is meant with steps.{step}.data.{name}=FILE",
                )
