"""Faults and hostile input, as a table: how often each was tried, survived, and what was lost (nothing may be).

    python -m benchmarks.faults [--share 1] [GROUP...]

With groups, the rows of the others are those of the newest result. A share below 1 is not written down.

Runs are those of tiny models, in forked children that start with everything imported. What is drawn is drawn from
seeds. Full disks and read-only places need root; without it they are skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults import corpus, hostile, kills, targets
from benchmarks.faults.kills import Stage
from benchmarks.faults.places import RUNS
from benchmarks.faults.tally import Tally
from benchmarks.table.page import newest

Group = Callable[[Stage, float], Tally]


def _count(whole: int, share: float) -> int:
    return max(1, round(whole * share))


def _step(share: float, step: int) -> int:
    return 1 if share == 1 else step


GROUPS: dict[str, Group] = {
    "kills": lambda stage, share: kills.kills(stage, _count(50, share)),
    "interrupts": lambda stage, share: kills.interrupts(stage, _count(20, share)),
    "full-disks": lambda stage, share: targets.full_disks(stage, _count(20, share)),
    "read-only": lambda stage, share: targets.read_only_sources(stage),
    "two-runs": lambda stage, share: targets.two_runs(stage, _count(10, share)),
    "clocks": lambda stage, share: targets.clocks(stage, _count(8, share)),
    "weights": lambda stage, share: corpus.damaged_weights(stage.work, _count(500, share)),
    "indexes": lambda stage, share: corpus.damaged_indexes(stage.work, _count(200, share)),
    "side-files": lambda stage, share: corpus.damaged_side_files(stage.work, _count(150, share)),
    "data": lambda stage, share: corpus.damaged_data(stage.work, _count(400, share)),
    "recipes": lambda stage, share: corpus.damaged_recipes(
        stage.work, hostile.manifest_of(stage), _count(200, share), bombs=share == 1
    ),
    "templates": lambda stage, share: hostile.templates(stage, _count(len(hostile.TEMPLATES), share)),
    "links": lambda stage, share: hostile.links(stage, _step(share, 3)),
    "modes": lambda stage, share: hostile.modes(stage, _step(share, 2)),
    "secrets": lambda stage, share: hostile.secrets(stage, _step(share, 4)),
}


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def warm_up(stage: Stage) -> None:
    """Run every kind of run once in this process, so that its children find everything imported."""
    from llmsurgery.cli.app import run

    for words in RUNS.values():
        if code := run([*words(stage.model, stage.data, stage.out()), "-q"]):
            raise SystemExit(code)
    # Each run collects garbage once; without the imported libraries in its view that takes no time.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Try every fault, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--share", type=float, default=1.0, help="of the tries of every group")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A process that has trained on a GPU cannot fork children that do.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from benchmarks.record import environment, write_result

    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMSURGERY_CACHE"] = str(Path(folder) / "cache")
        stage = Stage(Path(folder))
        warm_up(stage)
        for name in options.groups or GROUPS:
            begun, used = time.perf_counter(), processor_seconds()
            tally = GROUPS[name](stage, options.share)
            spent = {
                "seconds": round(time.perf_counter() - begun, 1),
                "cpu_seconds": round(processor_seconds() - used, 1),
            }
            rows.append({"group": name, **tally.record(), **spent, "commit": environment()["commit"]})
            print(f"{tally.name}: {tally.tried} tried, {tally.survived} survived, {len(tally.lost)} lost", flush=True)
            print("".join(f"    {line}\n" for line in tally.lost), end=f"    {tally.skipped}\n" * bool(tally.skipped))
    lost = sum(len(row["lost"]) for row in rows if isinstance(row["lost"], list))
    if options.share == 1:
        earlier = newest("faults") if options.groups else None
        write_result("faults", {"rows": in_order([*(earlier or {"rows": []})["rows"], *rows])})
    raise SystemExit(1 if lost else 0)


def in_order(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Return the last row of each group, in the order of the groups."""
    last = {str(row["group"]): row for row in rows}
    return [last[name] for name in GROUPS if name in last]


if __name__ == "__main__":
    main()
