"""Bounds on the time and memory that a chat template, which comes with a checkpoint, may take.

The sandbox of transformers keeps a template from the system, not from loops without an end or texts without a bound.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10.0
"""Processor time for one row; templates in use take a thousandth of a second."""
_AGAIN = 0.2
BYTES = 1 << 30
"""Memory for one row, beside what the process holds already."""


class TemplateTimeError(Exception):
    """A template took too much time."""


@contextmanager
def bounded() -> Iterator[None]:
    """Run a block with an end.

    Time is bounded in the main thread alone, where signals arrive; memory where the system tells its use.

    Raises:
        TemplateTimeError: The block took too much time.
        MemoryError: It took too much memory.
    """
    with _bounded_memory(), _bounded_time():
        yield


def _end(*_: object) -> None:
    raise TemplateTimeError(f"it took more than {SECONDS:g} s")


@contextmanager
def _bounded_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGVTALRM, _end)
    # Processor time: on a busy machine a good template may have to wait for long. And again and again: jinja2 swallows
    # what is raised while it computes constants, and computes them anew when the template runs.
    before = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, _AGAIN)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_VIRTUAL, *before)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, used + BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
