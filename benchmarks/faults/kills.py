"""`kill -9` and Ctrl-C at random moments of a run, and what is there afterwards."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.forked import (
    FileEvents,
    interrupt_self,
    kill_self,
    run_forked,
    start,
    start_function,
    wait,
    wait_until,
)
from benchmarks.faults.places import RUNS, beside, leavings, make_model, tree, write_rows
from benchmarks.faults.tally import Tally
from benchmarks.kill_resume import contents
from llmsurgery.cli.app import run

INTERRUPTED = 130


@dataclass
class Whole:
    """A run that nothing disturbed.

    Attributes:
        words: Returns the command line for an output.
        files: What the output holds.
        seconds: Processor time that it took.
        events: How many changes of files it made.
    """

    words: Callable[[Path], list[str]]
    files: dict[str, str]
    seconds: float
    events: int


class Stage:
    """A tiny model, its data, and undisturbed runs to compare with.

    Args:
        work: A folder of its own.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model = make_model(work / "model")
        self.data = write_rows(work)
        self.source = tree(self.model)
        self.log = work / "log"
        self._wholes: dict[str, Whole] = {}
        self._outs = 0

    def out(self) -> Path:
        """Return a new output."""
        self._outs += 1
        return self.work / f"out{self._outs}" / "result"

    def whole(self, kind: str) -> Whole:
        """Return an undisturbed run of a kind; made once."""
        if kind not in self._wholes:
            events = FileEvents(self.work, lambda: None, 0, self.work / "events")
            out = self.out()

            def words(out: Path) -> list[str]:
                return RUNS[kind](self.model, self.data, out)

            def counted() -> int:
                code = run(words(out))
                events.report()
                return code

            if code := wait(start_function(counted, self.log, events.install)):
                raise SystemExit(f"{kind} ended with {code}: {self.log.read_text()}")
            count, seconds = (float(word) for word in events.place.read_text().split())
            self._wholes[kind] = Whole(words, contents(out), seconds, int(count))
        return self._wholes[kind]

    def problems_of_source(self) -> list[str]:
        """Return what became of the source, nothing if it is as it was."""
        return [] if tree(self.model) == self.source else ["the source has changed"]

    def message(self) -> str:
        """Return the last lines of the last run."""
        return " | ".join(self.log.read_text().splitlines()[-3:])


def where_it_was(out: Path) -> str:
    """Return what a run had come to, from what lies on the disk."""
    partial = out.with_name(f"{out.name}.partial")
    if out.exists():
        return "after publishing"
    if any(partial.glob("*.safetensors*")):
        return "writing and measuring"
    steps = out.with_name(f"{out.name}.steps")
    if any(steps.glob("*/surgery.json")):
        return "between or in later steps"
    if any(partial.glob(".llmsurgery-state/*")) or any(steps.glob("*.partial/.llmsurgery-state/*")):
        return "training"
    return "before the first state"


def stop(
    stage: Stage, kind: str, by_event: bool, generator: random.Random, act: Callable[[], None], number: int
) -> tuple[Path, int, str]:
    """Disturb a run at a random moment.

    Args:
        stage: Where it runs.
        kind: Which run.
        by_event: Draw one of its changes of files in place of a moment of its time.
        generator: Draws the moment.
        act: What the run does to itself at an event.
        number: The signal that it is sent at a moment.

    Returns:
        The output, the exit code, and a label of the moment.
    """
    whole, out = stage.whole(kind), stage.out()
    if by_event:
        at = generator.randint(1, whole.events)
        place = stage.work / "event"
        place.unlink(missing_ok=True)
        code = run_forked(whole.words(out), stage.log, FileEvents(stage.work, act, at, place).install)
        event = place.read_text() if place.exists() else "never reached"
        return out, code, f"{kind}, event {at} of {whole.events}: {event}"
    moment = generator.uniform(0, whole.seconds)
    child = start(whole.words(out), stage.log)
    if wait_until(child, moment):
        os.kill(child, number)
    return out, wait(child), f"{kind}, at {moment:.3f} of {whole.seconds:.3f} s"


def resumed(stage: Stage, kind: str, out: Path) -> list[str]:
    """Go on with a run, and return how it differs from an undisturbed one."""
    whole = stage.whole(kind)
    if not out.exists() and (code := run_forked([*whole.words(out), "--resume"], stage.log)):
        return [f"--resume ended with {code}: {stage.message()}"]
    problems = stage.problems_of_source()
    if contents(out) != whole.files:
        problems.append("the bytes are not those of the undisturbed run")
    if beside(out) != [out.name]:
        problems.append(f"{beside(out)} lie there")
    return problems


def _kinds(tries: int) -> list[str]:
    # Trainings first: they have the most states to be stopped in.
    return [("training", "chain", "training", "closed form", "chain")[number % 5] for number in range(tries)]


def kills(stage: Stage, tries: int, seed: int = 0) -> Tally:
    """Kill runs at random moments, one half of them of their time, one half of their changes of files."""
    tally = Tally("kill -9", "no output or the whole of it; --resume ends in the bytes of the undisturbed run")
    generator = random.Random(seed)
    for number, kind in enumerate(_kinds(tries)):
        while True:
            out, code, label = stop(stage, kind, number % 2 == 1, generator, kill_self, signal.SIGKILL)
            if code == -signal.SIGKILL:
                break
            # It was faster than the undisturbed run: nothing was killed.
            if code:
                tally.add("not killed", [f"ended with {code}: {stage.message()}"], label)
                break
        seen = where_it_was(out)
        problems = stage.problems_of_source()
        if out.exists() and contents(out) != stage.whole(kind).files:
            problems.append("an output that is not whole")
        tally.add(seen, problems or resumed(stage, kind, out), label)
    return tally


def interrupts(stage: Stage, tries: int, seed: int = 1) -> Tally:
    """Interrupt runs at random moments."""
    tally = Tally("Ctrl-C", "exit code 130, nothing left but a state; --resume ends in the undisturbed bytes")
    generator = random.Random(seed)
    for number, kind in enumerate(_kinds(tries)):
        out, code, label = stop(stage, kind, number % 2 == 1, generator, interrupt_self, signal.SIGINT)
        if code == 0:
            # It came after the end of the work.
            tally.add("after publishing", resumed(stage, kind, out), label)
            continue
        problems = stage.problems_of_source()
        if code != INTERRUPTED:
            problems.append(f"exit code {code}: {stage.message()}")
        # The name may have been given already: then nothing may be missing.
        kept = [name for name in leavings(out) if not name.endswith(".steps")] if not out.exists() else []
        if kept:
            problems.append(f"{kept} left")
        tally.add(where_it_was(out), problems or resumed(stage, kind, out), label)
    return tally
