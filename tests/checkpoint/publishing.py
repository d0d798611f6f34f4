"""What the tests of the writer share."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgery.checkpoint import Checkpoint, Publication

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


Usage = namedtuple("Usage", "total used free")


def refuse(code: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def patched(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    return checkpoint.read(name, start, stop) ^ 1


def publish_patch(checkpoint: Checkpoint, out: Path, name: str, **options: Any) -> Publication:
    with Publication(checkpoint, out, rewrite=[name], **options) as publication:
        publication.patch_rows(name, 2, patched(checkpoint, name, 2, 5))
        publication.publish()
    return publication


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
