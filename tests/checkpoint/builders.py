"""Small checkpoints written byte by byte, so that the tests do not depend on the library they replace."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensors = Mapping[str, tuple[str, np.ndarray]]


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from any header, right or wrong."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (code, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(code, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    path.write_bytes(pack(header, data))
    return path


def random_tensors(prefix: str, seed: int = 0, rows: int = 8) -> dict[str, tuple[str, np.ndarray]]:
    """One tensor of each editable dtype, one scalar, one of bytes."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}.bf16": ("BF16", (rng.normal(size=(rows, 5)).astype(np.float32).view(np.uint32) >> 16).astype("<u2")),
        f"{prefix}.f32": ("F32", rng.normal(size=(rows, 3)).astype("<f4")),
        f"{prefix}.f16": ("F16", rng.normal(size=rows).astype("<f2")),
        f"{prefix}.f64": ("F64", rng.normal(size=(2, 3, 4)).astype("<f8")),
        f"{prefix}.scalar": ("F32", np.array(1.5, dtype="<f4")),
        f"{prefix}.mask": ("BOOL", np.array([0, 1, 1], dtype=np.uint8)),
    }


def side_files(root: Path) -> None:
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 5}))
    (root / "tokenizer.json").write_text("{}")
    (root / "README.md").write_text("# card\n")
    (root / "assets").mkdir()
    (root / "assets" / "template.jinja").write_text("{{ messages }}")
    (root / "config.json").chmod(0o600)
    (root / "README.md").chmod(0o644)
    (root / "tokenizer.json").chmod(0o444)


def single(root: Path, **options: Any) -> Path:
    root.mkdir(parents=True)
    side_files(root)
    write_safetensors(root / "model.safetensors", random_tensors("a", **options), {"format": "pt"}).chmod(0o640)
    root.chmod(0o750)
    return root


def sharded(root: Path, **options: Any) -> Path:
    root.mkdir(parents=True)
    side_files(root)
    weight_map = {}
    for number, prefix in enumerate(("a", "b"), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        tensors = random_tensors(prefix, seed=number, **options)
        write_safetensors(root / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    write_index(root, weight_map)
    return root


def write_index(root: Path, weight_map: object) -> None:
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, modification time and content of everything below a directory, links not followed."""
    result = {}
    for folder, names, files in os.walk(root):
        for name in [".", *names, *files]:
            path = Path(folder) / name
            status = path.lstat()
            content = ""
            if path.is_symlink():
                content = str(path.readlink())
            elif path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            result[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return result
