"""Places that cannot be written, disks that fill up, two runs for one place, and a clock that goes backwards."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

from benchmarks.faults.forked import killing, run_forked, start, wait
from benchmarks.faults.kills import Stage
from benchmarks.faults.places import RUNS, beside, leavings, read_only, small_disk, unlearn
from benchmarks.faults.tally import Tally
from benchmarks.kill_resume import contents

_Usage = namedtuple("_Usage", "total used free")
FULL, USAGE = 7, 2


def full_disks(stage: Stage, tries: int) -> Tally:
    """Run onto disks of growing size, every second time with a free space that is promised and not there."""
    tally = Tally("full disk", "exit code 7, nothing left but a state; or enough space, and the undisturbed bytes")

    def promise() -> None:
        setattr(shutil, "disk_usage", lambda _: _Usage(10**12, 0, 10**12))  # noqa: B010

    kinds = ("training", "closed form")
    for number in range(tries):
        kind = kinds[number // 2 % 2]
        whole = stage.whole(kind)
        # From the least that holds anything to somewhat more than the run has on its disk at once.
        size = 16 + int((number // 2) / max(1, (tries - 1) // 2) * 1.7 * _need(stage) / 1024)
        disk = stage.work / f"disk{number}"
        with small_disk(disk, size) as why:
            if why:
                tally.skipped = why
                return tally
            out = disk / "result"
            code = run_forked(whole.words(out), stage.log, promise if number % 2 else None)
            problems = stage.problems_of_source()
            if code == 0:
                problems += [] if contents(out) == whole.files else ["other bytes than those of the undisturbed run"]
            else:
                problems += [] if code == FULL else [f"exit code {code}: {stage.message()}"]
                problems += [f"{left} left" for left in [leavings(out)] if left]
        tally.add(f"exit code {code}", problems, f"{kind}, {size} KiB{', promised' if number % 2 else ''}")
    return tally


def _need(stage: Stage) -> int:
    """Return bytes that an undisturbed output takes."""
    stage.whole("training")
    found = next(stage.work.glob("out*/result"))
    return sum(path.stat().st_size for path in found.rglob("*") if path.is_file())


def read_only_sources(stage: Stage) -> Tally:
    """Edit a source that cannot be written, and write onto a place that cannot."""
    tally = Tally("read-only source, unwritable target", "0 and the undisturbed bytes; 7 and nothing left")
    mount = stage.work / "fixed"
    with read_only(stage.model, mount) as why:
        if why:
            tally.skipped = why
            return tally
        for kind in ("training", "closed form"):
            out = stage.out()
            code = run_forked(RUNS[kind](mount, stage.data, out), stage.log)
            problems = stage.problems_of_source() + ([f"exit code {code}: {stage.message()}"] if code else [])
            if code == 0 and _weights(out) != _weights_of(stage.whole(kind).files):
                problems.append("other weights than those of the undisturbed run")
            tally.add(f"exit code {code}", problems, f"read-only source, {kind}")
    place = stage.work / "place"
    place.mkdir()
    (stage.work / "file").write_text("not a folder")
    with read_only(place, stage.work / "closed") as why:
        targets = {"a file for a folder": stage.work / "file" / "out", "a device": Path("/dev/null/out")}
        if not why:
            targets["a read-only file system"] = stage.work / "closed" / "out"
        for name, out in targets.items():
            code = run_forked(unlearn(stage.model, stage.data, out), stage.log)
            problems = stage.problems_of_source()
            problems += [] if code == FULL else [f"exit code {code}: {stage.message()}"]
            problems += [f"{beside(out)} left"] if out.parent.is_dir() and beside(out) else []
            tally.add(f"exit code {code}", problems, name)
    return tally


def _weights_of(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors") and "/" not in name}


def _weights(out: Path) -> dict[str, str]:
    return _weights_of(contents(out))


def two_runs(stage: Stage, tries: int, seed: int = 7) -> Tally:
    """Start two runs for one place, the second some time after the first."""
    tally = Tally("two runs for one place", "one publishes the undisturbed bytes, the other is refused with 2")
    generator = random.Random(seed)
    for number in range(tries):
        kind = ("closed form", "training")[number % 2]
        whole, out = stage.whole(kind), stage.out()
        delay = generator.uniform(0, whole.seconds) * (number % 3 > 0)
        first = start(whole.words(out), stage.log)
        time.sleep(delay)
        second = start(whole.words(out), stage.log.with_name("log2"))
        codes = sorted((wait(first), wait(second)))
        problems = stage.problems_of_source()
        if codes != [0, USAGE]:
            problems.append(f"exit codes {codes}: {stage.message()}")
        elif contents(out) != whole.files or beside(out) != [out.name]:
            problems.append(f"other bytes, or left: {beside(out)}")
        tally.add(f"exit codes {codes}", problems, f"{kind}, {delay:.2f} s apart")
    return tally


def clocks(stage: Stage, tries: int) -> Tally:
    """Run while the clock goes backwards, on a source from the future."""
    tally = Tally("clock going backwards", "the undisturbed bytes; so too when killed and gone on with")

    def backwards() -> None:
        began, calls = time.time(), iter(range(10**9))
        setattr(time, "time", lambda: began - 3600.0 * next(calls))  # noqa: B010
        setattr(time, "time_ns", lambda: int(time.time() * 1e9))  # noqa: B010

    def backwards_and_killed() -> None:
        backwards()
        killing(os, "pwrite", 2, "before")()

    for number in range(tries):
        kind = ("training", "closed form")[number % 2]
        whole, out = stage.whole(kind), stage.out()
        killed = number % 4 > 1
        code = run_forked(whole.words(out), stage.log, backwards_and_killed if killed else backwards)
        if code == -signal.SIGKILL:
            code = run_forked([*whole.words(out), "--resume"], stage.log, backwards)
        problems = [f"exit code {code}: {stage.message()}"] if code else []
        if code == 0 and (contents(out) != whole.files or beside(out) != [out.name]):
            problems.append("other bytes, or something left")
        tally.add(f"exit code {code}", problems + stage.problems_of_source(), f"{kind}{', killed' if killed else ''}")
    return tally
