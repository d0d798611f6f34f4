"""FLAT on the embedded demo without a guard and with one.

python -m benchmarks.guard_demo
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

RUNS: dict[str, dict[str, Any]] = {
    "--guard none": {"guard": "none"},
    "--guard self": {"guard": "self"},
    "--guard self --set guard.weight=3 --set max_steps=400": {
        "guard": "self",
        "settings": {"guard.weight": 3, "max_steps": 400},
    },
}


def main() -> None:
    """Run all and write the result."""
    from llmsurgery import unlearn

    results = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            manifest: Any = unlearn(method="flat", out=Path(folder) / "out", **options).manifest
        results[name] = {
            "metrics": manifest["metrics"],
            "record": manifest["operations"][0]["record"],
            "seconds": manifest["cost"]["seconds"],
        }
        print(name, {key: round(row["after"]["value"], 3) for key, row in manifest["metrics"].items()})
    write_result("guard_demo", {"runs": results})


if __name__ == "__main__":
    main()
