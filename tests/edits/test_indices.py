from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmsurgery.checkpoint.container import Part, PartReader, read_container, write_container
from llmsurgery.edits.indices import ENCODINGS, FlagReader, Sizes, encode_flags
from llmsurgery.errors import DamagedError


def reader(path: Path, encoded: bytes) -> PartReader:
    with path.open("wb") as stream:
        write_container(stream, [Part("at", "U8", (len(encoded),), partial(iter, [encoded]))], {})
    return PartReader(read_container(path).tensors["at"])


def pieces(flags: np.ndarray, seed: int) -> list[np.ndarray]:
    cuts = np.sort(np.random.default_rng(seed).integers(0, flags.size + 1, 6))
    return np.split(flags, cuts)


def examples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    blocks = np.zeros(5000, dtype=bool)
    blocks[300:700] = blocks[4000:] = True
    rare = np.zeros(300_000, dtype=bool)
    rare[[0, 1, 127, 128, 20_000, 299_999]] = True
    return {
        "none": np.zeros(100, dtype=bool),
        "all": np.ones(101, dtype=bool),
        "dense": rng.random(4099) < 0.6,
        "sparse": rng.random(20_011) < 0.01,
        "rows": blocks,
        "rare": rare,
        "one": np.ones(1, dtype=bool),
    }


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("example", examples())
def test_flags_survive_whatever_the_blocks(example: str, encoding: str, tmp_path: Path) -> None:
    flags = examples()[example]
    sizes = Sizes()
    for block in pieces(flags, 1):
        sizes.add(block)
    encoded = b"".join(encode_flags(encoding, pieces(flags, 1)))
    expected = {"gaps": sizes.gaps, "runs": sizes.runs, "bits": (flags.size + 7) // 8}[encoding]
    assert len(encoded) == expected
    assert sizes.count == flags.sum()
    decoder = FlagReader(encoding, reader(tmp_path / "at", encoded), flags.size)
    found = np.concatenate([decoder.take(block.size) for block in pieces(flags, 2)])
    decoder.finish()
    assert np.array_equal(found, flags)


@pytest.mark.parametrize(("example", "encoding"), [("rare", "gaps"), ("rows", "runs"), ("dense", "bits")])
def test_the_smallest_encoding_is_chosen(example: str, encoding: str) -> None:
    sizes = Sizes()
    sizes.add(examples()[example])
    assert sizes.best()[0] == encoding


@pytest.mark.parametrize(
    ("encoding", "encoded"),
    [
        ("gaps", b"\xff" * 30 + b"\x01"),  # an integer longer than any
        ("gaps", b"\x05\x80"),  # an integer that never ends
        ("gaps", b"\x7f\x7f"),  # beyond the tensor
        ("runs", b"\x05\x7f"),
        ("runs", b"\x05"),  # half a pair
        ("bits", b"\x01"),  # too short
        ("bits", b"\x01" * 40),  # too long
    ],
)
def test_damaged_positions_are_refused(encoding: str, encoded: bytes, tmp_path: Path) -> None:
    decoder = FlagReader(encoding, reader(tmp_path / "at", encoded), 100)

    def decode() -> None:
        decoder.take(100)
        decoder.finish()

    with pytest.raises(DamagedError):
        decode()
