"""The one object that prints: human, quiet or JSON; results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import GateError, SurgeryError

if TYPE_CHECKING:
    from rich.console import Console

    from llmsurgery.compute.progress import Tick

_SHOW_AFTER_SECONDS = 2.0


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Go on in silence when the reader of stdout has closed its end, as `head` does; the work is done all the same."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # rich raises SystemExit for a broken pipe. Later prints, and the flush at exit, go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output:
    """Prints for one command.

    Args:
        as_json: Print exactly one JSON document on stdout.
        quiet: Print only the essential result, one line.
        verbose: Add tracebacks to errors.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def _console(self, stderr: bool = False) -> Console:
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        # Without a terminal a table takes the width it needs; a log or a pipe has no columns to keep to.
        width = None if stream.isatty() else 160
        return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())

    def show(self, *things: object) -> None:
        """Print results for people; nothing under `--json` or `--quiet`."""
        if not self.as_json and not self.quiet:
            console = self._console()
            with _reader_may_leave():
                for thing in things:
                    console.print(thing, markup=False) if isinstance(thing, str) else console.print(thing)

    def essential(self, line: str) -> None:
        """Print the one line that `--quiet` leaves; nothing without `--quiet` or under `--json`."""
        if self.quiet and not self.as_json:
            with _reader_may_leave():
                print(line)

    def document(self, content: object) -> None:
        """Print the JSON document of the command; nothing without `--json`."""
        if self.as_json:
            with _reader_may_leave():
                print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))

    def notice(self, message: str) -> None:
        """Tell the user something that is not an error."""
        if not self.quiet:
            print(f"note: {message}", file=sys.stderr)

    def error(self, error: SurgeryError, exit_code: int) -> None:
        """Print an error in its three parts, as JSON under `--json`."""
        if self.as_json:
            document: dict[str, Any] = {"error": error.as_dict(), "exit_code": exit_code}
            if isinstance(error, GateError) and error.report is not None:
                document["report"] = error.report
            print(json.dumps(document, indent=2, ensure_ascii=False))
        parts = [f"error: {error.what}"]
        parts += [f"  why: {error.why}"] if error.why else []
        parts += [f"  fix: {error.fix}"] if error.fix else []
        print("\n".join(parts), file=sys.stderr)
        if self.verbose:
            traceback.print_exception(error, file=sys.stderr)

    def bug(self, error: BaseException) -> None:
        """Print the traceback of an error that should not exist, and ask for a report."""
        if self.as_json:
            what = {"kind": "bug", "what": f"{type(error).__name__}: {error}", "why": "", "fix": "report it"}
            print(json.dumps({"error": what, "exit_code": 1}, indent=2, ensure_ascii=False))
        traceback.print_exception(error, file=sys.stderr)
        print(
            "error: this is a bug of llmsurgery\n  fix: report it with the command line and the lines above",
            file=sys.stderr,
        )

    def task(self, name: str, total: int) -> AbstractContextManager[Tick]:
        """Open a progress task; a bar appears on a terminal once it has run for two seconds."""
        return self._task(name, total)

    @contextmanager
    def _task(self, name: str, total: int) -> Iterator[Tick]:
        from llmsurgery.compute.progress import Silent

        if self.quiet or not sys.stderr.isatty():
            with Silent().task(name, total) as silent:
                yield silent
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        bar = Progress(*columns, console=self._console(stderr=True), transient=True)
        identity = bar.add_task(name, total=total, note="", rate="")
        started = time.monotonic()
        done = 0

        def tick(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            elapsed = time.monotonic() - started
            rate = f"{done / elapsed:.1f}/s" if elapsed > 0 else ""
            bar.update(identity, advance=steps, note=note, rate=rate)
            if not bar.live.is_started and elapsed > _SHOW_AFTER_SECONDS:
                bar.start()

        try:
            yield tick
        finally:
            bar.stop()
