"""What long work reports to; the command line prints it, the Python API ignores it by default."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Tick(Protocol):
    """Advances one task."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Report `steps` more units of work and a short note such as the current loss."""


class Progress(Protocol):
    """A sink for tasks of known length and for notices."""

    def task(self, name: str, total: int) -> AbstractContextManager[Tick]:
        """Open a task of `total` units."""

    def notice(self, message: str) -> None:
        """Tell the user something worth knowing that is not an error."""


class Silent:
    """Reports nothing; keeps the notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    @contextmanager
    def _task(self) -> Iterator[Tick]:
        def tick(steps: int = 1, note: str = "") -> None:
            del steps, note

        yield tick

    def task(self, name: str, total: int) -> AbstractContextManager[Tick]:
        """Open a task that reports nothing."""
        del name, total
        return self._task()

    def notice(self, message: str) -> None:
        """Keep a notice."""
        self.notices.append(message)
