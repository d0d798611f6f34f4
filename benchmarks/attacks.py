"""Attacks on results made before, with rows that the source does not know as their control.

    python -m benchmarks.attacks NAME SOURCE RESULT... --forget F --retain R --control C [--set NAME=VALUE ...]

F and R are what the results were made with, C holds rows of the same form that the source does not know. The document
of `llmsurgery eval` is kept as `attacks_NAME`, with no more than names of files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write_result


def main() -> None:
    """Attack all results in one call, so that they share the source's trial, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("source", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    for data in ("forget", "retain", "control"):
        parser.add_argument(f"--{data}", type=Path, required=True)
    parser.add_argument("--attack", default="relearn,quantize")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    words = [sys.executable, "-m", "llmsurgery", "eval", *map(str, options.results), "--source", str(options.source)]
    words += [word for data in ("forget", "retain", "control") for word in (f"--{data}", str(getattr(options, data)))]
    words += ["--attack", options.attack, "--json", "--set", "generate=false", "--set", "text_rows=1"]
    words += [word for setting in options.set for word in ("--set", setting)]
    started = time.perf_counter()
    document: dict[str, Any] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=False).stdout)
    if "models" not in document:
        raise SystemExit(f"eval failed: {document}")
    shared = {**document["attacks"], "control_rows": options.control.name}
    content: dict[str, object] = {
        "model": options.source.name,
        "attacks": shared,
        "results": {Path(model["path"]).name: model["attacks"] for model in document["models"]},
        "seconds": time.perf_counter() - started,
    }
    write_result(f"attacks_{options.name}", content)


if __name__ == "__main__":
    main()
