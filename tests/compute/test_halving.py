"""Rows per forward that halve."""

from __future__ import annotations

import pytest
import torch

from llmsurgery.compute.device import memory_errors
from llmsurgery.compute.halving import Halving, is_memory_error
from llmsurgery.errors import ResourceError

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError(CPU_MESSAGE), True),
        (RuntimeError("unable to mmap 201 bytes from file <model.safetensors>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (OSError("out of memory"), False),
    ],
)
def test_what_is_a_memory_error(error: Exception, expected: bool) -> None:
    assert is_memory_error(error) is expected
    with pytest.raises(ResourceError if expected else type(error)), memory_errors():
        raise error


def test_torch_says_so_in_words_that_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_memory_error(caught.value)


def test_rows_halve_until_the_work_fits() -> None:
    tried: list[int] = []
    told: list[str] = []

    def work(size: int) -> str:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError
        return "done"

    rows = Halving(11, True, told.append)
    assert rows.run(work) == "done"
    assert tried == [11, 5, 2]
    assert rows.size == 2
    assert len(told) == 2
    assert rows.run(work) == "done"
    assert tried == [11, 5, 2, 2]


@pytest.mark.parametrize(("size", "automatic"), [(1, True), (8, False)])
def test_nothing_halves_below_one_or_unasked(size: int, automatic: bool) -> None:
    rows = Halving(size, automatic, lambda _: None)

    def work(size: int) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        rows.run(work)
    assert rows.size == size


def test_other_errors_pass() -> None:
    tried: list[int] = []

    def work(size: int) -> None:
        tried.append(size)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        Halving(8, True, lambda _: None).run(work)
    assert tried == [8]
