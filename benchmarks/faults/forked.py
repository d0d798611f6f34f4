"""Runs of the command line in forked children, which can be killed, interrupted or starved at a chosen moment.

A child starts with everything imported, so that a run of a tiny model takes a fraction of a second and nearly all of
that is the run itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmsurgery.cli.app import run

HUNG = 1000
"""In place of an exit code: the run did not end in time and was killed."""
LIMIT = 120.0
"""Seconds after which a run counts as hung; the longest takes some."""


def start(words: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """Start a run in a child of this process and return the child's number.

    Args:
        words: The command line without the program.
        log: Where standard output and error go.
        before: Called in the child before the run.
    """
    return start_function(lambda: run(list(words)), log, before)


def start_function(function: Callable[[], int], log: Path, before: Callable[[], None] | None = None) -> int:
    """Start a function in a child that ends with the number it returns; arguments as for `start`."""
    import torch

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            # A shell that started this in the background has switched interrupts off.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            if before is not None:
                before()
            code = function()
            stream.flush()
    finally:
        os._exit(code)


def cpu_seconds(child: int) -> float:
    """Return the processor time that a living child has used."""
    # The number of a process's clock, as clock_getcpuclockid of the C library makes it on Linux.
    return time.clock_gettime((~child << 3) | 2)


def wait_until(child: int, seconds: float) -> bool:
    """Wait until a child has used some processor time; return whether it did before it ended."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        left = seconds - cpu_seconds(child)
        if left <= 0:
            return True
        time.sleep(min(max(left / 2, 0.001), 0.05))
    return False


def wait(child: int, limit: float = LIMIT) -> int:
    """Wait for a child and return its exit code, minus the signal that ended it, or `HUNG`."""
    deadline = time.monotonic() + limit
    pause = 0.001
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return HUNG
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


def run_forked(words: Sequence[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """Run a command in a child and return its exit code; arguments as for `start`."""
    return wait(start(words, log, before))


class FileEvents:
    """Counts what a child does to files below a folder, and acts just before one of these events.

    Events are opening for writing, making, renaming, removing and linking, changes of mode, and every write and sync
    of a descriptor by the toolkit's own code.

    Args:
        below: The folder.
        act: Called at the event.
        number: Which event, counted from 1; 0 for none.
        place: File into which the event is written before `act` is called, and the total by `report`.
    """

    NAMES = frozenset(
        {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
    )
    CALLS = ("pwrite", "fsync", "copy_file_range")

    def __init__(self, below: Path, act: Callable[[], None], number: int, place: Path) -> None:
        self.below, self.act, self.number, self.place = str(below), act, number, place
        self.count = 0

    def install(self) -> None:
        """Begin to count; cannot be taken back, so it is called in a child."""
        sys.addaudithook(self._heard)
        for name in self.CALLS:
            self._wrap(name, getattr(os, name))

    def report(self) -> None:
        """Write down how many events there were, and the processor time of the whole."""
        self.place.write_text(f"{self.count} {time.process_time()}")

    def _wrap(self, name: str, original: Callable[..., Any]) -> None:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self._happens(f"os.{name}", "")
            return original(*arguments, **named)

        setattr(os, name, wrapped)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self.NAMES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fspath(arguments[0])
        if isinstance(path, str) and path.startswith(self.below):
            self._happens(event, path[len(self.below) :])

    def _happens(self, event: str, path: str) -> None:
        self.count += 1
        if self.count == self.number:
            descriptor = os.open(self.place, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, f"{event} {path}".encode("utf-8", "replace"))
            os.close(descriptor)
            self.act()


def kill_self() -> None:
    """End this process at once, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_self() -> None:
    """Send this process what Ctrl-C sends."""
    os.kill(os.getpid(), signal.SIGINT)


def killing(place: Any, name: str, count: int, when: str) -> Callable[[], None]:
    """Return what makes a child kill itself before or after the nth call of a function.

    Args:
        place: The module or class that holds the function.
        name: Its name there.
        count: Which call, counted from 1.
        when: "before" or "after".
    """

    def install() -> None:
        original = getattr(place, name)
        calls: list[None] = []

        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls.append(None)
            if len(calls) == count and when == "before":
                kill_self()
            result = original(*arguments, **named)
            if len(calls) == count:
                kill_self()
            return result

        setattr(place, name, wrapped)

    return install
