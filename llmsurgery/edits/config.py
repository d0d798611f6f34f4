"""Values of JSON side files -> the files' new bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.checkpoint.json_text import dump_like
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.strict_json import parse_object
from llmsurgery.edits.kinds import Config, Edit, File, Json, Removed
from llmsurgery.errors import InputError, SurgeryError

# A model may well come without it; every other file that is to be changed must be there.
_MAY_BE_NEW = "generation_config.json"
_NOT_SETTINGS = (".safetensors.index.json", "surgery.json")


def beside_files(checkpoint: Checkpoint, edits: Iterable[Edit]) -> list[File]:
    """Return the files that edits leave beside the weights, each with its last content.

    A file whose content stays what it is in the source is left out. Keys keep their order, new ones come last, and the
    text is laid out as before.

    Args:
        checkpoint: The source.
        edits: All edits, in the order in which they apply; those of tensors are passed over.

    Raises:
        InputError: The file is missing, or the path leads through something that has no keys.
        DamagedError: The file is not a JSON object.
        SurgeryError: The path names no value of a JSON side file, or the value is not JSON: a method's bug.
    """
    contents: dict[str, bytes] = {}
    for edit in edits:
        if isinstance(edit, File):
            contents[edit.path] = edit.content
        elif isinstance(edit, Config):
            file = _file_of(edit)
            contents[file] = _changed(edit, contents[file] if file in contents else _read(checkpoint, file))
    return [File(path, content) for path, content in contents.items() if content != _present(checkpoint, path)]


def _file_of(edit: Config) -> str:
    if len(edit.path) < 2:
        raise SurgeryError(f"the path {edit.path!r} names no value of a file")
    file = inside_name(edit.path[0], "an edit")
    if not file.endswith(".json") or file.endswith(_NOT_SETTINGS):
        raise SurgeryError(f"{file!r} holds no settings")
    return file


def _present(checkpoint: Checkpoint, file: str) -> bytes | None:
    path = checkpoint.root / file
    return path.read_bytes() if path.is_file() else None


def _read(checkpoint: Checkpoint, file: str) -> bytes:
    content = _present(checkpoint, file)
    if content is None and file != _MAY_BE_NEW:
        raise InputError(
            f"{str(checkpoint.root / file)!r} does not exist",
            "the operation sets a value in it",
            "restore the file from the model's source",
        )
    return content or b""


def _changed(edit: Config, content: bytes) -> bytes:
    file, *keys, last = edit.path
    document: dict[str, Any] = parse_object(content, Path(file), "configuration", strict=False) if content else {}
    before = json.dumps(document)
    values = document
    for depth, key in enumerate(keys):
        if isinstance(edit.value, Removed) and key not in values:
            return content
        found = values.setdefault(key, {})
        if not isinstance(found, dict):
            way = ".".join(keys[: depth + 1])
            raise InputError(
                f"{'.'.join((*keys, last))} cannot be set in {file}",
                f"{way} is {json.dumps(found)[:100]}, which has no keys",
                f"correct {file}, or choose settings that leave it alone",
            )
        values = found
    if isinstance(edit.value, Removed):
        values.pop(last, None)
    else:
        values[last] = plain_json(edit.value, edit.path)
    # Equal by value is not enough: 1 and true are not the same JSON.
    return content if content and json.dumps(document) == before else dump_like(content, document)


def plain_json(value: Json, path: tuple[str, ...]) -> Json:
    """Return a value as dicts, lists and plain scalars.

    Raises:
        SurgeryError: It is not JSON: a method's bug.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, path) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, path) for item in value]
    raise SurgeryError(f"the value of {'.'.join(path)} is a {type(value).__name__}, which is not JSON")
