"""Device, dtype, seeds and memory readings."""

from __future__ import annotations

import os
import platform
import random
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsurgery.compute.halving import is_memory_error
from llmsurgery.errors import ResourceError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda` or `cuda:i`.

    Raises:
        UsageError: The name is none of these.
        ResourceError: A CUDA device was asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu)|cuda(?::([0-9]+))?", name)
    if match is None:
        raise UsageError(f"unknown device {name!r}", "devices are auto, cpu, cuda and cuda:0, cuda:1, ...", "")
    if not match[1] and (not torch.cuda.is_available() or int(match[2] or 0) >= torch.cuda.device_count()):
        raise ResourceError(
            f"device {name!r} is not there",
            f"torch sees {torch.cuda.device_count()} CUDA devices",
            "use --device cpu or --device auto",
        )
    return torch.device(name)


def has_native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; elsewhere fp32 is several times faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        # Not Linux: recent ARM processors have it, and nothing else tells.
        return platform.machine().lower() in {"arm64", "aarch64"}
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", " bf16"))


def resolve_dtype(name: str, stored: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype for `auto`, `float32`, `bfloat16` or `float16`.

    Args:
        name: The option.
        stored: Most frequent dtype code of the checkpoint; `auto` follows it where the device is fast in it.
        device: Where the model runs.

    Raises:
        UsageError: An unknown dtype.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if stored == "BF16" and has_native_bfloat16() else torch.float32
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"dtypes are auto, {', '.join(DTYPES)}", "")
    return DTYPES[name]


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def repeatable_kernels(device: torch.device) -> Iterator[None]:
    """Run a block with CUDA kernels that give the same bits every time, where there are such kernels.

    Sums of many threads in no fixed order change the last bits of a gradient, and with them the weights written:
    a run that is repeated, or goes on after a kill, would end in other bytes. Operations without an ordered kernel
    run as usual. On other devices nothing changes.

    Args:
        device: Where the model runs.
    """
    if device.type != "cuda":
        yield
        return
    # Read when cuBLAS makes its workspaces, on the first product of two matrices.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would write into every new tensor what is overwritten anyway.
    deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled


SMALL_MODEL = 20_000_000
"""Parameters below which one thread is as fast as many, and far faster on a busy machine."""


@contextmanager
def suitable_threads(parameters: int, device: torch.device) -> Iterator[None]:
    """Run a block with one thread if the model is tiny; an explicit OMP_NUM_THREADS is respected.

    Threads that wait for each other at every small operation stand still when another program has one of the cores.

    Args:
        parameters: Number of parameters of the model.
        device: Where it runs.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resident_bytes() -> int:
    """Return the resident set of this process now, in bytes; its peak so far where only that can be read."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


LEAN_THRESHOLD = 65536
"""Bytes from which on malloc maps a block by itself, and gives it back as soon as it is freed.

Every new page costs time in the kernel; a larger threshold saves some of it, but not the memory of steps of few rows.
"""


def lean_allocator(parameters: int, device: torch.device) -> None:
    """Let the C library give the memory of freed tensors back at once, for the rest of this process.

    By default it keeps blocks of up to 32 MiB, and cannot use many of them again: aligned blocks of one size do not
    fit where such a block lay. In training, where long-lived and short-lived tensors alternate, that holds up to half
    as much again as all tensors together; `benchmarks/` has what it saves and what it costs. An explicit
    MALLOC_MMAP_THRESHOLD_ is respected, and tiny models are left alone. Where the C library is another one, nothing
    happens.

    Args:
        parameters: Number of parameters of the model.
        device: Where it runs.
    """
    import ctypes

    if device.type != "cpu" or parameters < SMALL_MODEL or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        # -3: M_MMAP_THRESHOLD. Setting it also keeps it from growing.
        library.mallopt(-3, LEAN_THRESHOLD)


def peak_memory() -> dict[str, int]:
    """Return the peak resident set of this process and the peak memory of its busiest card, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        # Not of the current card alone: --device cuda:1 does not make it the current one.
        cards = range(torch.cuda.device_count())
        peaks["device_bytes"] = max(int(torch.cuda.max_memory_allocated(card)) for card in cards)
    return peaks


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn running out of memory into the error that has its exit code.

    Raises:
        ResourceError: In place of any out-of-memory error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        message = str(error)
        raise ResourceError(
            "out of memory",
            message.splitlines()[0][:200] if message else "an allocation failed",
            "use --batch-size auto or a smaller one, --quantize nf4, --set gradient_checkpointing=true, or a lower "
            "--set max_length=...; --dry-run predicts what a run needs",
        ) from error
