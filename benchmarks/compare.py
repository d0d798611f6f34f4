"""`llmsurgery compare` with its document kept among the results.

    python -m benchmarks.compare NAME WORD...
    python -m benchmarks.compare NAME --join FILE... [--drop SETTING...]

NAME is "demo" or "smollm2" (with "_attacks" where the results were attacked); WORDs go to `llmsurgery compare`. With
`--join`, documents of comparisons that ran apart, on the same model and data, become one: a long comparison can so be
run in groups. `--drop` leaves settings that all share out of the labels (a trailing dot stands for all of a prefix).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_result


def run_compare(words: Sequence[str]) -> dict[str, Any]:
    """Run the comparison; paths are cut to their last part."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmsurgery", "compare", *words, "-o", str(Path(folder) / "out"), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return without_paths(json.loads(done.stdout))


def without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of `compare` with no more than names of files."""
    if "rows" not in document:
        raise SystemExit(f"compare failed: {document}")
    document.pop("out")
    document["model"] = Path(document["model"]).name
    document["data"] = {key: Path(value).name for key, value in document["data"].items()}
    for row in document["rows"]:
        if "resolved" in row:
            # Files that a recipe names.
            row["resolved"] = {key: _name(value) for key, value in row["resolved"].items()}
            row["settings"] = {key: _name(value) for key, value in row["settings"].items()}
    return document


def _name(value: object) -> object:
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def join_documents(paths: Sequence[Path], dropped: Sequence[str]) -> dict[str, Any]:
    """Return one document of several; a later row takes the place of an earlier one of the same label.

    Args:
        paths: Documents of `llmsurgery compare --json`.
        dropped: Settings that labels do not show.
    """
    from llmsurgery.run.compare import pareto_front

    documents = [without_paths(json.loads(path.read_text())) for path in paths]
    first = documents[0]
    for document in documents[1:]:
        if (document["model"], document["data"]) != (first["model"], first["data"]):
            raise SystemExit(f"{document['model']} {document['data']} is not what the first document compares")
    rows: dict[str, Any] = {}
    shared: dict[str, None] = {}
    for row in (row for document in documents for row in document["rows"]):
        method, *parts = row["label"].split(":")
        away = [part for part in parts if any(_matches(part.split("=")[0], name) for name in dropped)]
        shared |= dict.fromkeys(away)
        label = ":".join([method, *(part for part in parts if part not in away)])
        rows[label] = {**row, "label": label}
    kept = list(rows.values())
    return {**first, "rows": kept, "front": pareto_front(kept), "not_in_labels": list(shared)}


def _matches(name: str, wanted: str) -> bool:
    return name.startswith(wanted) if wanted.endswith(".") else name == wanted


def main() -> None:
    """Run or join, and write the result."""
    name, *words = sys.argv[1:]
    if words[:1] == ["--join"]:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--join", nargs="+", type=Path, required=True)
        parser.add_argument("--drop", nargs="*", default=[])
        parser.add_argument("--model-name", help="what readers call the model")
        parser.add_argument("--remark", help="what a reader must know of the runs")
        options = parser.parse_args(words)
        document = join_documents(options.join, options.drop)
        document["model"] = options.model_name or document["model"]
        if options.remark:
            document["remark"] = options.remark
    else:
        document = run_compare(words)
    write_result(f"compare_{name}", document)


if __name__ == "__main__":
    main()
