from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, file_digest, tensor_digest
from llmsurgery.errors import DamagedError, InputError

from .builders import random_tensors, single


def test_tensor_digest_is_that_of_its_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    for name, (_, array) in random_tensors("a").items():
        info = checkpoint.info(name)
        assert tensor_digest(info.path, info.start, info.end) == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_file_digest_across_block_edges(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "f").write_bytes(content)
    assert file_digest(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    assert tensor_digest(str(tmp_path / "f"), size // 3, size) == hashlib.sha256(content[size // 3 :]).hexdigest()


def test_range_past_the_end_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123")
    with pytest.raises(DamagedError, match="truncated"):
        tensor_digest(tmp_path / "f", 0, 4)
    with pytest.raises(InputError):
        file_digest(tmp_path / "none")
    with pytest.raises(DamagedError):
        file_digest(tmp_path)


def test_the_byte_layer_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'safetensors', 'scipy'}"
    code = f"import llmsurgery.checkpoint, sys; sys.exit(len({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
