"""Rows per forward that halve when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

_MESSAGES = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; on the CPU torch raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_memory() -> None:
    """Give back what nothing refers to any more; to be called outside of the handler of the error."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Halving:
    """A number of rows per forward, which halves when memory runs out if it may.

    Attributes:
        size: Rows per forward now.
        automatic: Whether it may halve.
    """

    def __init__(self, size: int, automatic: bool, tell: Callable[[str], None]) -> None:
        self.size, self.automatic, self._tell = size, automatic, tell

    def run(self, work: Callable[[int], T]) -> T:
        """Do work that takes the number of rows, again from its start with half of them as often as it takes.

        Args:
            work: What is done; nothing of a failed try may be left behind.
        """
        while True:
            try:
                return work(self.size)
            except (MemoryError, RuntimeError) as error:
                if not self.automatic or self.size == 1 or not is_memory_error(error):
                    raise
            # Out of the handler: the traceback holds on to the tensors of the failed forward.
            self.size //= 2
            free_memory()
            self._tell(f"out of memory: going on with {self.size} rows per forward")
