from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from llmsurgery.checkpoint import FLOAT, ITEMSIZE, decode, encode, storage_dtype
from llmsurgery.errors import DamagedError, UnsupportedError

# code: (mantissa bits, exponent bits)
FORMATS = {"F16": (10, 5), "BF16": (7, 8), "F32": (23, 8)}


def exact_bits(value: float, code: str) -> int:
    """Round to nearest even with rational numbers only."""
    mantissa, exponent = FORMATS[code]
    sign = int(math.copysign(1, value) < 0) << (mantissa + exponent)
    infinity = ((1 << exponent) - 1) << mantissa
    if math.isinf(value):
        return sign | infinity
    bias = (1 << (exponent - 1)) - 1
    magnitude = abs(Fraction(value))
    power = max(math.frexp(value)[1] - 1, 1 - bias) if value else 1 - bias
    steps = magnitude / Fraction(2) ** (power - mantissa)
    whole = round(steps)  # Python rounds fractions half to even
    # A carry into the next power of two, up to infinity, is an addition on the bit pattern.
    bits = whole if power == 1 - bias else ((power + bias - 1) << mantissa) + whole
    return sign | min(bits, infinity)


def bits_of(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")


def all_patterns(code: str) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(storage_dtype(code))


def hard_values(code: str, seed: int, count: int = 4000) -> np.ndarray:
    """Ties between neighbours and values one double step beside them, over the whole range."""
    rng = np.random.default_rng(seed)
    mantissa, exponent = FORMATS[code]
    low = rng.integers(0, ((1 << exponent) - 1) << mantissa, size=count)
    edges = [0, 1, (1 << mantissa) - 1, 1 << mantissa, (((1 << exponent) - 1) << mantissa) - 1]
    low[: len(edges)] = edges
    below = decode(low.astype(storage_dtype(code).str.replace("f", "u")).view(storage_dtype(code)), code)
    below = below.astype(np.float64)
    # Half a step, from the exponent alone, so that the largest finite value has a tie above it as well.
    bias = (1 << (exponent - 1)) - 1
    power = np.maximum(np.frexp(below)[1] - 1, 1 - bias)
    tie = below + np.ldexp(0.5, power - mantissa)
    values = [below, tie, np.nextafter(tie, 0), np.nextafter(tie, np.inf), tie * (1 + 2.0**-40), tie * (1 - 2.0**-40)]
    joined = np.concatenate([*values, rng.normal(size=count), np.ldexp(rng.normal(size=count), -140)])
    return np.concatenate([joined, -joined])


@pytest.mark.parametrize("code", sorted(FORMATS))
def test_encode_rounds_once_to_nearest_even(code: str) -> None:
    values = hard_values(code, seed=1, count=1500)
    got = bits_of(encode(values, code))
    expected = [exact_bits(float(value), code) for value in values]
    np.testing.assert_array_equal(got, expected)


def test_rounding_through_float32_would_be_wrong() -> None:
    # Just above the tie of two BF16 neighbours, by less than float32 can tell: 1.0 is the wrong answer.
    value = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 3 * 2.0**-8 - 2.0**-40])
    np.testing.assert_array_equal(encode(value, "BF16"), [0x3F81, 0x3F81])
    # The same trap for F16.
    value = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40])
    np.testing.assert_array_equal(bits_of(encode(value, "F16")), [0x3C01, 0x3C01])


@pytest.mark.parametrize("code", ["BF16", "F16"])
@pytest.mark.parametrize("width", [np.float32, np.float64])
def test_every_pattern_survives_decode_and_encode(code: str, width: type) -> None:
    patterns = all_patterns(code)
    values = decode(patterns, code)
    assert values.dtype == np.float32
    nan = np.isnan(values)
    with np.errstate(invalid="ignore"):
        back = encode(values.astype(width), code)
    np.testing.assert_array_equal(bits_of(back)[~nan], bits_of(patterns)[~nan])
    assert np.isnan(decode(back, code)[nan]).all()


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_tie_goes_to_the_even_neighbour(code: str) -> None:
    mantissa, exponent = FORMATS[code]
    low = np.arange(((1 << exponent) - 1) << mantissa, dtype=np.uint16)
    values = decode(low.view(storage_dtype(code)), code).astype(np.float64)
    above = np.append(values[1:], 2.0 ** (1 << (exponent - 1)))
    tie = (values + above) / 2
    even = low + (low & 1)
    for sign, flag in ((1, 0), (-1, 0x8000)):
        np.testing.assert_array_equal(bits_of(encode(sign * tie, code)), even | flag)
        np.testing.assert_array_equal(bits_of(encode(sign * np.nextafter(tie, 0), code)), low | flag)
        np.testing.assert_array_equal(bits_of(encode(sign * np.nextafter(tie, np.inf), code)), (low + 1) | flag)


def test_float32_input_rounds_like_float64() -> None:
    values = hard_values("BF16", seed=3).astype(np.float32)
    np.testing.assert_array_equal(encode(values, "BF16"), encode(values.astype(np.float64), "BF16"))


@pytest.mark.parametrize("code", sorted(FLOAT))
def test_special_values(code: str) -> None:
    values = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e300, -1e300, 5e-324, -5e-324])
    with np.errstate(all="raise"):
        back = decode(encode(values, code), code)
    assert back[0] == np.inf
    assert back[1] == -np.inf
    assert np.isnan(back[2])
    np.testing.assert_array_equal(np.signbit(back[3:]), np.signbit(values[3:]))
    if code != "F64":
        assert back[5] == np.inf
        assert back[7] == 0


def test_nan_payloads_that_lie_in_the_cut_bits_stay_nan() -> None:
    patterns = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(decode(encode(patterns, "BF16"), "BF16")).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4), (70_000, 2)])
@pytest.mark.parametrize("code", sorted(FLOAT))
def test_shapes_and_dtypes(shape: tuple[int, ...], code: str) -> None:
    values = np.random.default_rng(0).normal(size=shape) * np.ones(shape)
    raw = encode(np.asarray(values), code)
    assert raw.shape == shape
    assert raw.dtype == storage_dtype(code)
    assert decode(raw, code).dtype == (np.float64 if code == "F64" else np.float32)
    assert decode(raw, code).shape == shape


def test_strided_input_and_output_own_their_memory() -> None:
    values = np.arange(24, dtype=np.float64).reshape(4, 6)
    np.testing.assert_array_equal(decode(encode(values.T[::2], "BF16"), "BF16"), values.T[::2])
    raw = np.ones(3, dtype="<f4")
    decode(raw, "F32")[:] = 7
    encode(raw, "F32")[:] = 7
    assert (raw == 1).all()


def test_unknown_and_uneditable_codes() -> None:
    for call in (storage_dtype, lambda code: encode(np.ones(1), code), lambda code: decode(np.ones(1), code)):
        with pytest.raises(DamagedError, match="F7"):
            call("F7")
    for code in ("I64", "U8", "F8_E4M3", "F4"):
        with pytest.raises(UnsupportedError):
            encode(np.ones(1), code)
    with pytest.raises(UnsupportedError):
        storage_dtype("F4")
    with pytest.raises(TypeError):
        encode(np.ones(1, dtype=np.int64), "F32")


def test_item_sizes_agree_with_storage() -> None:
    assert {code: storage_dtype(code).itemsize for code in ITEMSIZE} == ITEMSIZE
    assert all(storage_dtype(code).byteorder in "<|=" for code in ITEMSIZE)
