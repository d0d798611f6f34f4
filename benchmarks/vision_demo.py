"""The vision-language methods on the embedded demo: what pictures change, and what is answered right.

python -m benchmarks.vision_demo
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

RUNS: dict[str, dict[str, Any]] = {
    "vlm-calibrate": {"method": "vlm-calibrate"},
    "vlm-calibrate content_free=both": {"method": "vlm-calibrate", "settings": {"content_free": "both"}},
    "vlm-contrast": {"method": "vlm-contrast"},
    "vlm-contrast alpha=0.5": {"method": "vlm-contrast", "settings": {"alpha": 0.5}},
    "vlm-contrast form=folded": {"method": "vlm-contrast", "settings": {"form": "folded"}},
}


def main() -> None:
    """Run all and write the result."""
    from llmsurgery import debias

    results = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            manifest: Any = debias(out=Path(folder) / "out", **options).manifest
        results[name] = {
            "export": manifest["export"],
            "metrics": manifest["metrics"],
            "record": manifest["operations"][0]["record"],
            "seconds": manifest["cost"]["seconds"],
        }
        print(name, {key: round(row["after"]["value"], 3) for key, row in manifest["metrics"].items()})
    write_result("vision_demo", {"runs": results})


if __name__ == "__main__":
    main()
