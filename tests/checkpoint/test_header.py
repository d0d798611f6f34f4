from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsurgery.checkpoint import read_header
from llmsurgery.errors import DamagedError, InputError

from .builders import entry, pack, random_tensors, write_safetensors

GOOD = entry("U8", [2], 0, 2)


def test_reads_offsets_in_file_order(tmp_path: Path) -> None:
    tensors = random_tensors("x")
    path = write_safetensors(tmp_path / "m.safetensors", tensors, {"format": "pt"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.file_size == len(content)
    assert list(header.tensors) == list(tensors)
    for name, (code, array) in tensors.items():
        info = header.tensors[name]
        assert (info.name, info.dtype, info.shape, info.path) == (name, code, array.shape, path)
        assert content[info.start : info.end] == array.tobytes()
        assert (info.nbytes, info.size) == (array.nbytes, array.size)


def test_file_order_is_the_order_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(pack({"late": entry("U8", [2], 3, 5), "early": entry("U8", [3], 0, 3)}, b"12345"))
    assert list(read_header(path).tensors) == ["early", "late"]


def test_agrees_with_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros((0, 4), np.float16), "c": np.array(3)}
    library.save_file(arrays, tmp_path / "m.safetensors", {"k": "v"})
    header = read_header(str(tmp_path / "m.safetensors"))
    content = (tmp_path / "m.safetensors").read_bytes()
    for name, array in arrays.items():
        info = header.tensors[name]
        assert info.shape == array.shape
        assert content[info.start : info.end] == array.tobytes()
    write_safetensors(tmp_path / "own.safetensors", {n: ("F32", a.astype("<f4")) for n, a in arrays.items()})
    np.testing.assert_array_equal(library.load_file(tmp_path / "own.safetensors")["b"], arrays["b"])


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{}", b""),
        (b"{}   ", b""),
        ({"__metadata__": None, "a": GOOD}, b"12"),
        ({"a": {**GOOD, "extra": 1}}, b"12"),
        ({"a": entry("F4", [4], 0, 2), "b": entry("F6_E2M3", [4], 2, 5)}, b"12345"),
        ({"empty": entry("F32", [0, 3], 2, 2), "a": GOOD}, b"12"),
        ({"name": entry("U8", [1, 2, 1], 0, 2)}, b"12"),
    ],
)
def test_accepts_what_the_format_allows(tmp_path: Path, header: Any, data: bytes) -> None:
    path = tmp_path / "m"
    path.write_bytes(pack(header, data))
    names = (header if isinstance(header, dict) else json.loads(header)).keys() - {"__metadata__"}
    assert read_header(path).tensors.keys() == names


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length past the end": pack({}, length=1000),
    "length of 2**63": pack({}, length=1 << 63),
    "zero length": pack(b""),
    "not UTF-8": pack(b'{"\xff": 1}'),
    "not JSON": pack(b"{'a': 1}"),
    "not closed": pack(b'{"a": {'),
    "a list": pack(b"[]"),
    "leading space": pack(b" {}"),
    "byte order mark": pack(b"\xef\xbb\xbf{}"),
    "duplicate tensor": pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8"}}'),
    "duplicate key": pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "nested too deeply": pack(b'{"a":' + b"[" * 200_000),
    "integer of 10000 digits": pack(b'{"a":{"shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}', b"1"),
    "lone surrogate": pack(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "NaN": pack(b'{"a": NaN}'),
    "metadata not an object": pack({"__metadata__": [], "a": GOOD}, b"12"),
    "metadata of numbers": pack({"__metadata__": {"k": 1}, "a": GOOD}, b"12"),
    "entry not an object": pack({"a": [1]}),
    "no dtype": pack({"a": {"shape": [2], "data_offsets": [0, 2]}}, b"12"),
    "no shape": pack({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"12"),
    "no offsets": pack({"a": {"dtype": "U8", "shape": [2]}}, b"12"),
    "unknown dtype": pack({"a": entry("F7", [2], 0, 2)}, b"12"),
    "dtype a list": pack({"a": {**GOOD, "dtype": ["U8"]}}, b"12"),
    "negative length": pack({"a": entry("U8", [-2], 0, 2)}, b"12"),
    "two negative lengths": pack({"a": entry("U8", [-2, -1], 0, 2)}, b"12"),
    "boolean length": pack({"a": entry("U8", [2, True], 0, 2)}, b"12"),
    "float length": pack({"a": entry("U8", [2.0], 0, 2)}, b"12"),
    "text length": pack({"a": entry("U8", ["2"], 0, 2)}, b"12"),
    "shape a number": pack({"a": {**GOOD, "shape": 2}}, b"12"),
    "33 dimensions": pack({"a": entry("U8", [1] * 32 + [2], 0, 2)}, b"12"),
    "product wraps at 64 bits": pack({"a": entry("U8", [1 << 32, 1 << 32], 0, 0)}),
    "product wraps to the size": pack({"a": entry("U8", [(1 << 63) + 1, 2], 0, 2)}, b"12"),
    "huge beside an empty dimension": pack({"a": entry("U8", [1 << 62, 1 << 62, 0], 0, 0)}),
    "length above 64 bits": pack({"a": entry("U8", [1 << 70], 0, 2)}, b"12"),
    "negative offset": pack({"a": entry("U8", [2], -2, 0)}, b"12"),
    "float offset": pack({"a": entry("U8", [2], 0.0, 2)}, b"12"),
    "boolean offset": pack({"a": entry("U8", [1], False, True)}, b"1"),
    "three offsets": pack({"a": {**GOOD, "data_offsets": [0, 1, 2]}}, b"12"),
    "offsets reversed": pack({"a": entry("U8", [2], 2, 0)}, b"12"),
    "offset above 64 bits": pack({"a": entry("U8", [2], 0, 1 << 80)}, b"12"),
    "shape too small": pack({"a": entry("U8", [1], 0, 2)}, b"12"),
    "shape too large": pack({"a": entry("F32", [1], 0, 2)}, b"12"),
    "half a byte": pack({"a": entry("F4", [3], 0, 2)}, b"12"),
    "truncated": pack({"a": entry("U8", [3], 0, 3)}, b"12"),
    "overlap": pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
    "same range": pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"12"),
    "empty tensor inside another": pack({"a": GOOD, "b": entry("U8", [0], 1, 1)}, b"12"),
    "hole": pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"),
    "hole at the start": pack({"a": entry("U8", [1], 1, 2)}, b"12"),
    "trailing bytes": pack({"a": GOOD}, b"123"),
    "only trailing bytes": pack({}, b"1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_headers_are_damaged(tmp_path: Path, case: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(DamagedError) as caught:
        read_header(path)
    error = caught.value
    assert error.exit_code == 8
    assert "broken.safetensors" in error.what
    assert error.why
    assert error.fix
    str(error).encode("utf-8")  # printable, and not a megabyte of hostile text
    assert len(str(error)) < 2000


def test_errors_name_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(pack({"model.layers.0.w": entry("U8", [3], 0, 3)}, b"12"))
    with pytest.raises(DamagedError, match=r"model\.layers\.0\.w"):
        read_header(path)


def test_header_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(pack({}, length=100_000_001))
    os.truncate(path, 200_000_000)  # sparse
    reads: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: reads.append(len(buffers[0])) or preadv(fd, buffers, at))
    with pytest.raises(DamagedError, match="100000001"):
        read_header(path)
    assert sum(reads) == 8


def test_missing_file_directory_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_header(tmp_path / "none")
    with pytest.raises(DamagedError):
        read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DamagedError):
        read_header(tmp_path / "pipe")


def test_header_of_many_tensors_is_read(tmp_path: Path) -> None:
    """What would fill the memory is refused by its length; an honest header of that length is not."""
    name = "model.layers.{}.mlp.experts.{}.gate_proj.weight"
    header = {
        name.format(layer, expert): entry("BF16", [0, 7168], 0, 0) for layer in range(100) for expert in range(300)
    }
    path = tmp_path / "m"
    path.write_bytes(pack(header))
    assert path.stat().st_size > 2_500_000
    assert len(read_header(path).tensors) == 30_000
    path.write_bytes(pack(b'{"a":[' + b"[]," * 1_000_000 + b"0]}"))
    with pytest.raises(DamagedError, match="MiB of memory"):
        read_header(path)
