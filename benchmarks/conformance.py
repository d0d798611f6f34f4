"""The conformance suite as a table: every method on every architecture, checks passed and seconds.

    LLMSURGERY_CONFORMANCE=all python -m benchmarks.conformance [--name NAME] [METHOD ...]

Without METHOD all of them. NAME is that of the file of results; a part of the methods is best kept beside the whole.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.record import write_result


def main() -> None:
    """Run the suite and write the result."""
    from llmsurgery.methods.registry import all_methods

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD")
    parser.add_argument("--name", default="conformance")
    options = parser.parse_args()
    asked = [word for name in options.methods for word in (f"[{name}-", f"-{name}-")]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.xml"
        words = [sys.executable, "-m", "pytest", "tests/conformance", "-q", "-n", "1", f"--junitxml={log}"]
        words += ["-k", " or ".join(asked)] if asked else []
        code = subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode
        suite = ElementTree.parse(log)
    methods = {method.spec.name for method in all_methods()}
    table: dict[str, dict[str, Any]] = {}
    for case in suite.iter("testcase"):
        found = re.fullmatch(r"\w+\[(.+)\]", case.get("name", ""))
        # Parameters are "method-architecture", with the kind of training before them in some checks.
        method, _, architecture = (found[1] if found else "").rpartition("-")
        method = method.removeprefix("lora-").removeprefix("full-")
        if method not in methods:
            continue
        row = table.setdefault(method, {})
        cell = row.setdefault(architecture, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        bad = case.find("failure") is not None or case.find("error") is not None
        cell["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
        cell["seconds"] = round(cell["seconds"] + float(case.get("time", 0)), 3)
    write_result(options.name, {"exit_code": code, "methods": table})


if __name__ == "__main__":
    main()
