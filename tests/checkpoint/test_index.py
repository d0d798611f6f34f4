from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint import Checkpoint, decode, encode, require_finite
from llmsurgery.errors import DamagedError, InputError, SurgeryError, UnsupportedError

from .builders import pack, random_tensors, sharded, side_files, single, snapshot, write_index, write_safetensors

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def test_single_file(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    before = snapshot(root)
    checkpoint = Checkpoint.open(str(root))
    assert checkpoint.root == root
    assert list(checkpoint.headers) == ["model.safetensors"]
    assert checkpoint.shards == [root / "model.safetensors"]
    assert checkpoint.config["model_type"] == "llama"
    for name, (code, array) in random_tensors("a").items():
        raw = checkpoint.read(name)
        assert checkpoint.info(name).dtype == code
        assert raw.shape == array.shape
        assert raw.tobytes() == array.tobytes()
        raw[...] = 0  # the caller's own memory
    assert checkpoint.nbytes == sum(array.nbytes for _, array in random_tensors("a").values())
    assert snapshot(root) == before


def test_shards_and_tensors_outside_the_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    index = json.loads((root / "model.safetensors.index.json").read_text())["weight_map"]
    del index["b.f32"]
    write_index(root, {name: f"./{file}" for name, file in index.items()})
    checkpoint = Checkpoint.open(root)
    assert list(checkpoint.headers) == [FIRST, SECOND]
    assert set(checkpoint.tensors) == set(random_tensors("a")) | set(random_tensors("b"))
    assert checkpoint.file_of("b.f32") == SECOND


def test_the_only_safetensors_file_of_another_name(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / "model.safetensors").rename(root / "weights.safetensors")
    assert list(Checkpoint.open(root).headers) == ["weights.safetensors"]


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    write_safetensors(root / "model.safetensors", random_tensors("whole"))
    assert list(Checkpoint.open(root).headers) == ["model.safetensors"]


def test_shard_in_a_folder_and_links_into_a_cache(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (root / FIRST).rename(blobs / "abc")
    (root / FIRST).symlink_to(Path("..") / "blobs" / "abc")
    (root / "part").mkdir()
    (root / SECOND).rename(root / "part" / SECOND)
    index = dict.fromkeys(random_tensors("a"), FIRST) | dict.fromkeys(random_tensors("b"), f"part/{SECOND}")
    write_index(root, index)
    checkpoint = Checkpoint.open(root)
    assert checkpoint.file_of("b.f16") == f"part/{SECOND}"
    assert checkpoint.read("a.f16").tobytes() == random_tensors("a", seed=1)["a.f16"][1].tobytes()


def test_row_reads_and_blocks(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m", rows=10))
    full = checkpoint.read("a.bf16")
    np.testing.assert_array_equal(checkpoint.read("a.bf16", 3, 7), full[3:7])
    np.testing.assert_array_equal(checkpoint.read("a.bf16", 8), full[8:])
    assert checkpoint.read("a.bf16", 4, 4).shape == (0, 5)
    np.testing.assert_array_equal(checkpoint.read("a.f16", 2, 3), checkpoint.read("a.f16")[2:3])
    assert checkpoint.read("a.scalar").shape == ()
    assert list(checkpoint.row_blocks("a.bf16", max_bytes=35)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(checkpoint.row_blocks("a.bf16", max_bytes=1)) == [(row, row + 1) for row in range(10)]
    assert list(checkpoint.row_blocks("a.bf16")) == [(0, 10)]
    assert list(checkpoint.row_blocks("a.scalar")) == [(0, 1)]
    for start, stop in ((-1, 2), (0, 11), (5, 4)):
        with pytest.raises(IndexError):
            checkpoint.read("a.bf16", start, stop)
    with pytest.raises(IndexError):
        checkpoint.read("a.scalar", 1, 1)


def test_empty_tensors(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    arrays = {"none": np.zeros((0, 4), "<f4"), "thin": np.zeros((5, 0), "<f4")}
    write_safetensors(root / "model.safetensors", {name: ("F32", array) for name, array in arrays.items()})
    checkpoint = Checkpoint.open(root)
    assert checkpoint.read("none").shape == (0, 4)
    assert checkpoint.read("thin", 1, 3).shape == (2, 0)
    assert list(checkpoint.row_blocks("none")) == []
    assert list(checkpoint.row_blocks("thin")) == [(0, 5)]


def test_unknown_tensor_lists_the_nearest(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path / "m"))
    with pytest.raises(DamagedError, match=r"a\.scalr.*\n.*a\.scalar"):
        checkpoint.info("a.scalr")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    content = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(DamagedError, match="truncated"):
        checkpoint.read("a.mask", 0, 3)


def _remove(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return change


def _text(name: str, text: str | bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def _index(weight_map: object) -> Callable[[Path], None]:
    return lambda root: write_index(root, weight_map)


def _shard_name(name: str) -> Callable[[Path], None]:
    return _index(dict.fromkeys(random_tensors("a"), FIRST) | dict.fromkeys(random_tensors("b"), name))


def _outside_copy(root: Path) -> None:
    shutil.copy(root / SECOND, root.parent / SECOND)
    _shard_name(f"../{SECOND}")(root)


def _outside_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    (root / SECOND).rename(root.parent / "elsewhere" / SECOND)
    (root / "part").symlink_to(root.parent / "elsewhere")
    _shard_name(f"part/{SECOND}")(root)


def _dangling(root: Path) -> None:
    (root / SECOND).unlink()
    (root / SECOND).symlink_to("nowhere")


def _twice(root: Path) -> None:
    write_safetensors(root / SECOND, random_tensors("b") | {"a.f32": random_tensors("a")["a.f32"]})


def _truncated(root: Path) -> None:
    (root / SECOND).write_bytes((root / SECOND).read_bytes()[:-1])


def _no_tensors(root: Path) -> None:
    (root / FIRST).write_bytes(pack({}))
    write_index(root, {"x": FIRST})


def _adapter(root: Path) -> None:
    _remove("config.json")(root)
    _text("adapter_config.json", "{}")(root)


def _adapter_with_config(root: Path) -> None:
    _remove(FIRST, SECOND, "model.safetensors.index.json")(root)
    _text("adapter_config.json", "{}")(root)
    write_safetensors(root / "adapter_model.safetensors", random_tensors("a"))


def _only(*names: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        _remove(FIRST, SECOND, "model.safetensors.index.json")(root)
        for name in names:
            (root / name).write_bytes(b"x")

    return change


def _quantised_name(name: str, code: str = "I32", dtype: str = "<i4") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        write_safetensors(root / FIRST, random_tensors("a", seed=1) | {name: (code, np.zeros(4, dtype))})

    return change


def _config(value: object) -> Callable[[Path], None]:
    return _text("config.json", json.dumps(value))


CASES: dict[str, tuple[Callable[[Path], None], type[SurgeryError]]] = {
    "no config": (_remove("config.json"), InputError),
    "config not JSON": (_text("config.json", "{"), DamagedError),
    "config not UTF-8": (_text("config.json", b'{"a": "\xff"}'), DamagedError),
    "config a list": (_text("config.json", "[]"), DamagedError),
    "no weights": (_only(), InputError),
    "pickle": (_only("pytorch_model.bin"), UnsupportedError),
    "sharded pickle": (_only("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), UnsupportedError),
    "pt": (_only("model.pt"), UnsupportedError),
    "pth": (_only("consolidated.00.pth"), UnsupportedError),
    "gguf": (_only("model.gguf"), UnsupportedError),
    "only training arguments": (_only("training_args.bin"), InputError),
    "two files without index": (_remove("model.safetensors.index.json"), DamagedError),
    "adapter": (_adapter, UnsupportedError),
    "adapter with config": (_adapter_with_config, UnsupportedError),
    "index not JSON": (_text("model.safetensors.index.json", "{"), DamagedError),
    "index a list": (_text("model.safetensors.index.json", "[]"), DamagedError),
    "index without map": (_text("model.safetensors.index.json", "{}"), DamagedError),
    "empty map": (_index({}), DamagedError),
    "map a list": (_index(["a"]), DamagedError),
    "file a number": (_index({"a.f32": 1}), DamagedError),
    "map with a tensor twice": (
        _text("model.safetensors.index.json", f'{{"weight_map": {{"a.f32": "{FIRST}", "a.f32": "{SECOND}"}}}}'),
        DamagedError,
    ),
    "missing shard": (_remove(SECOND), DamagedError),
    "dangling shard": (_dangling, DamagedError),
    "tensor missing from shard": (_index({"a.f32": SECOND, "b.f32": SECOND}), DamagedError),
    "tensor missing everywhere": (_index({"a.f32": FIRST, "nope": SECOND}), DamagedError),
    "tensor stored twice": (_twice, DamagedError),
    "shard truncated": (_truncated, DamagedError),
    "shards without tensors": (_no_tensors, DamagedError),
    "above the directory": (_outside_copy, DamagedError),
    "absolute": (_shard_name("/etc/passwd"), DamagedError),
    "up and back": (_shard_name(f"x/../{SECOND}"), DamagedError),
    "backslash": (_shard_name(f"..\\{SECOND}"), DamagedError),
    "drive": (_shard_name(f"c:{SECOND}"), DamagedError),
    "empty name": (_shard_name(""), DamagedError),
    "dot": (_shard_name("."), DamagedError),
    "zero byte": (_shard_name("a\0b"), DamagedError),
    "surrogate": (_shard_name("\ud800"), DamagedError),
    "folder linked outside": (_outside_link, DamagedError),
    "quantization_config": (_config({"quantization_config": {"quant_method": "gptq"}}), UnsupportedError),
    "nested quantization_config": (_config({"text_config": {"quantization_config": {"bits": 4}}}), UnsupportedError),
    "qweight": (_quantised_name("l.qweight"), UnsupportedError),
    "scales": (_quantised_name("l.scales", "F16", "<f2"), UnsupportedError),
    "absmax": (_quantised_name("l.weight.absmax", "F32", "<f4"), UnsupportedError),
    "quant_state": (_quantised_name("l.weight.quant_state.bitsandbytes__nf4", "U8", "u1"), UnsupportedError),
    "weight_scale": (_quantised_name("l.weight_scale", "F32", "<f4"), UnsupportedError),
    "fp8": (_quantised_name("l.weight", "F8_E4M3", "u1"), UnsupportedError),
    "packed experts": (_quantised_name("l.experts.gate_up_proj_blocks", "U8", "u1"), UnsupportedError),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refusals(tmp_path: Path, case: str) -> None:
    change, kind = CASES[case]
    root = sharded(tmp_path / "m")
    change(root)
    before = snapshot(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        Checkpoint.open(root)
    assert type(caught.value) is kind
    assert caught.value.what
    assert caught.value.why
    assert caught.value.fix
    str(caught.value).encode()
    assert snapshot(tmp_path) == before


def test_exit_codes_and_ways_out(tmp_path: Path) -> None:
    root = tmp_path / "m"
    root.mkdir()
    side_files(root)
    (root / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="safe_serialization=True") as caught:
        Checkpoint.open(root)
    assert caught.value.exit_code == 4
    for path in (tmp_path / "none", root / "config.json"):
        with pytest.raises(InputError) as missing:
            Checkpoint.open(path)
        assert missing.value.exit_code == 3


def test_integer_buffers_and_empty_quantisation_are_fine(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    _config({"quantization_config": None, "rope": float("inf")})(root)
    masks = {"h.attn.bias": ("U8", np.ones((2, 2), "u1")), "ids": ("I64", np.arange(3, dtype="<i8"))}
    write_safetensors(root / "model.safetensors", masks)
    assert Checkpoint.open(root).read("ids").tolist() == [0, 1, 2]


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_require_finite(code: str) -> None:
    values = np.ones((4, 3))
    with np.errstate(all="ignore"):
        values[0, 0] = np.finfo(np.float16).max
        require_finite(encode(values, code), code, "w")
        for bad in (np.nan, np.inf, -np.inf):
            values[2, 1] = values[3, 0] = bad
            raw = encode(values, code)
            assert not np.isfinite(decode(raw, code)).all()
            with pytest.raises(DamagedError, match=r"'w' holds 2 .*\[2, 1\]"):
                require_finite(raw, code, "w")
            with pytest.raises(DamagedError, match=r"\[101, 1\]"):
                require_finite(raw[1:], code, "w", first_row=100)
            with pytest.raises(DamagedError):
                require_finite(raw[2, 1:2].reshape(()), code, "w")


def test_require_finite_passes_integers() -> None:
    # All bits set would be a NaN in any floating dtype of that width.
    raw = np.full(3, -1, dtype="<i4")
    require_finite(raw, "I32", "w")
    with pytest.raises(DamagedError):
        require_finite(raw.view("<f4"), "F32", "w")
