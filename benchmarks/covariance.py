"""Statistics of a wide layer from few tokens: what `KeyStatistics` takes, against an eigendecomposition of C.

    python -m benchmarks.covariance [--size 14336] [--tokens 2000] [--eigh 7168]

The keys are random with a spectrum that falls over three decades; times do not depend on the values. `--eigh` is the
side of the matrix that is decomposed for comparison; where it is smaller than `--size` the table says by how much the
time is scaled.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch

from benchmarks.record import write_result
from llmsurgery.compute.device import peak_memory
from llmsurgery.compute.statistics import KeyStatistics


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of some work; the latter hold on a shared core."""
    started, spent = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - spent


def thin(size: int, tokens: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Return times of one solve and of the protected directions, each on statistics that nothing is known of yet."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, size, generator=draw) * torch.logspace(1, -2, size)
    right = torch.randn(size, 1, generator=draw)
    found: dict[str, list[tuple[float, float]]] = {"solve": [], "protected": []}
    for _ in range(repeats):
        found["solve"].append(timed(lambda: KeyStatistics.of_keys(0, keys).solve(right, 1e-2)))
        found["protected"].append(timed(lambda: KeyStatistics.of_keys(0, keys).protected(0.02)))
        print(found, flush=True)
    return found


def decomposed(size: int) -> tuple[float, float]:
    """Return the time that all eigenvalues and eigenvectors of a symmetric fp32 matrix take."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(2000, size, generator=draw) * torch.logspace(1, -2, size)
    matrix = keys.T @ keys / len(keys)
    return timed(lambda: torch.linalg.eigh(matrix))


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=14336)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--eigh", type=int, default=7168)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times = thin(options.size, options.tokens, options.repeats)
    peak = peak_memory()["rss_bytes"]
    content = {
        "size": options.size,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seconds": {name: [wall for wall, _ in rows] for name, rows in times.items()},
        "cpu_seconds": {name: [cpu for _, cpu in rows] for name, rows in times.items()},
        "peak_bytes": peak,
        "eigh": {"size": options.eigh, **dict(zip(("seconds", "cpu_seconds"), decomposed(options.eigh), strict=True))},
    }
    write_result("covariance", content)


if __name__ == "__main__":
    main()
