"""Wall time of the light commands, against importing torch alone.

python -m benchmarks.startup
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.record import write_result

COMMANDS = {
    "--help": ["-m", "llmsurgery", "--help"],
    "unlearn --help": ["-m", "llmsurgery", "unlearn", "--help"],
    "methods": ["-m", "llmsurgery", "methods"],
    "import torch (for comparison)": ["-c", "import torch"],
}


def main() -> None:
    """Run each command ten times and write the result."""
    results = {}
    for name, words in COMMANDS.items():
        times = []
        for _ in range(10):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            times.append(time.perf_counter() - started)
        results[name] = {"median": statistics.median(times), "minimum": min(times), "maximum": max(times)}
        print(name, results[name])
    write_result("startup", {"seconds": results})


if __name__ == "__main__":
    main()
