"""Stored number formats: sizes, exact decoding, and encoding rounded once to nearest even."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.errors import DamagedError, UnsupportedError

# Every dtype code the safetensors format defines, in bits, because three of them are smaller than a byte.
BITS: dict[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# Bytes per entry of the dtypes whose entries are whole bytes.
ITEMSIZE: dict[str, int] = {code: bits // 8 for code, bits in BITS.items() if bits % 8 == 0}

# The dtypes an edit may change.
FLOAT = frozenset({"F64", "F32", "F16", "BF16"})

# Narrow floats that only quantised checkpoints hold.
NARROW = frozenset(code for code in BITS if code.startswith(("F8_", "F6_")) or code == "F4")

_NATIVE = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "C64": "c8"}

# Entries converted at a time, so that the temporaries stay in the processor's cache.
_CHUNK = 1 << 16


def entry_bits(code: str) -> int:
    """Return the size of one entry in bits.

    Args:
        code: A safetensors dtype code.

    Raises:
        DamagedError: The format defines no such code.
    """
    if code not in BITS:
        raise DamagedError(
            f"unknown dtype {code!r}",
            "the safetensors format defines no such dtype",
            "fetch the checkpoint again, or save it anew with a current version of safetensors",
        )
    return BITS[code]


def storage_dtype(code: str) -> np.dtype[Any]:
    """Return the little-endian numpy dtype that holds the stored bytes of a dtype code.

    Formats that numpy does not know (BF16, F8_*, BOOL with its free byte values) are held as unsigned integers, so
    that the bytes survive every copy unchanged.

    Args:
        code: A safetensors dtype code.

    Raises:
        DamagedError: The format defines no such code.
        UnsupportedError: The entries are smaller than a byte.
    """
    bits = entry_bits(code)
    if bits % 8:
        raise UnsupportedError(
            f"dtype {code} packs several entries into one byte",
            "only quantised checkpoints hold it, and their entries have no address of their own",
            "use the unquantised checkpoint",
        )
    return np.dtype("<" + _NATIVE.get(code, f"u{bits // 8}"))


def _require_float(code: str) -> None:
    if code not in FLOAT:
        entry_bits(code)
        raise UnsupportedError(
            f"values of dtype {code} cannot be edited",
            f"only {', '.join(sorted(FLOAT))} hold editable weights",
            "leave this tensor out of the edit, or use an unquantised checkpoint",
        )


def decode(raw: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """Return the exact values of stored entries: float32, or float64 for F64.

    Args:
        raw: Stored entries, of dtype `storage_dtype(code)` and any shape.
        code: Their dtype code, one of `FLOAT`.

    Returns:
        A new array of the same shape.

    Raises:
        DamagedError: The format defines no such code.
        UnsupportedError: The code is not an editable float.
    """
    _require_float(code)
    if code == "F64":
        return raw.astype(np.float64)
    if code == "BF16":
        bits = raw.astype(np.uint32)
        bits <<= np.uint32(16)  # numpy 1.26 widens a scalar array by a plain int
        return bits.view(np.float32)
    with np.errstate(all="ignore"):
        return raw.astype(np.float32)


def encode(values: npt.NDArray[Any], code: str) -> npt.NDArray[Any]:
    """Round float64 or float32 values once, to nearest even, to a stored dtype.

    Values beyond the largest finite one become infinite as IEEE 754 says, NaN stays NaN.

    Args:
        values: What to store, float64 or float32, any shape.
        code: The dtype code to store it in, one of `FLOAT`.

    Returns:
        A new array of dtype `storage_dtype(code)` and the same shape.

    Raises:
        TypeError: The values are neither float64 nor float32.
        DamagedError: The format defines no such code.
        UnsupportedError: The code is not an editable float.
    """
    _require_float(code)
    if values.dtype not in (np.dtype(np.float64), np.dtype(np.float32)):
        raise TypeError(f"values to store must be float64 or float32, not {values.dtype}")
    if code != "BF16":
        # One conversion by numpy is one rounding: the way from float64 to float16 does not pass through float32.
        with np.errstate(all="ignore"):
            return values.astype(storage_dtype(code))
    result = np.empty(values.shape, dtype=np.uint16)
    flat, out = values.reshape(-1), result.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        out[start : start + _CHUNK] = _round_to_bf16(flat[start : start + _CHUNK])
    return result if sys.byteorder == "little" else result.astype("<u2")


def _round_to_bf16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round a 1-D chunk to BF16 bit patterns without the error of rounding twice.

    Rounding through float32 is wrong only where float32 lands exactly half way between two BF16 values although the
    value itself lies to one side. Those few entries are decided by comparing with the value.
    """
    with np.errstate(all="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    low = bits & np.uint32(0xFFFF)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    if values.dtype == np.float64:
        half = np.flatnonzero(low == 0x8000)
        exact, landed = np.abs(values[half]), np.abs(single[half]).astype(np.float64)
        below = (bits[half] >> np.uint32(16)).astype(np.uint16)
        rounded[half] = np.where(exact == landed, rounded[half], below + (exact > landed).astype(np.uint16))
    nan = np.isnan(single)
    if nan.any():
        # Cutting the payload could leave no bit set, which is infinity: the quiet bit keeps it a NaN.
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return rounded
