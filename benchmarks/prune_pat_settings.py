"""Runs of PAT with several settings in one table, from what `llmsurgery prune --method pat --json` printed.

    python -m benchmarks.prune_pat_settings DOCUMENT.json ... [--gpu NAME] [--commit HASH] [--note TEXT]

Runs of this length are made side by side on a GPU elsewhere; GPU and commit are those of that place. A row is named
after its file. All must have the same text, data, steps and width.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import record

KEPT = ("steps", "row_loss", "loss_rounded", "undecided_gates", "kept_width", "removed_share_of_all")


def one_run(path: Path) -> dict[str, Any]:
    """Return what matters of one run."""
    manifest: Any = json.loads(path.read_text())
    (operation,) = manifest["operations"]
    perplexity = manifest["metrics"]["utility.ppl"]
    return {
        "name": path.stem,
        "settings": operation["settings"],
        "record": {name: operation["record"][name] for name in KEPT},
        "ppl": {"source": perplexity["before"], "result": perplexity["after"]},
        "parameters": manifest["metrics"]["size.params"]["after"]["value"],
        "cost": manifest["cost"],
        "data": {name: {"sha256": file["sha256"], "rows": file["rows"]} for name, file in manifest["data"].items()},
        "device": operation["device"],
        "dtype": operation["dtype"],
        "versions": manifest["versions"],
    }


def main() -> None:
    """Read the documents and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--gpu", help="the card of the runs")
    parser.add_argument("--commit", help="commit of the runs")
    parser.add_argument("--note", default="", help="a sentence for the table")
    options = parser.parse_args()
    runs = [one_run(path) for path in options.documents]
    for name in ("data", "versions", "dtype", "parameters"):
        if any(run[name] != runs[0][name] for run in runs):
            raise SystemExit(f"these runs differ in {name}")
    place: dict[str, object] = {**runs[0]["versions"], "gpu": options.gpu, "cpu": "", "cores": None}
    own = record.environment() if options.gpu is None else {}
    place = {**place, **own, "commit": options.commit or own.get("commit")}
    record.write_result("prune_pat_settings", {"environment": place, "note": options.note, "runs": runs})


if __name__ == "__main__":
    main()
