"""Data files of a run: which are in use, and the rows that are read from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmsurgery.checkpoint import file_digest
from llmsurgery.data import GENERAL_TEXT
from llmsurgery.data.prompts import read_prompts
from llmsurgery.data.records import Row, chosen_rows, read_rows, rows_digest
from llmsurgery.demo import demo_file
from llmsurgery.errors import UsageError
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.methods.tasks import TASKS
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.request import Request

SETS = ("forget", "retain", "holdout", "authors", "facts")
DATA_NAMES = (*SETS, "text", "calibration", "domain", "corpus")
DEMO_DATA = {"calibration": "retain", "domain": "facts"}
"""Data that the demo has under another name: people for the open text, towns for the domain."""
CONTROL = "control"
"""Rows that attacks alone score; no figure is measured on them."""


def data_files(method: Method, request: Request) -> dict[str, Path]:
    """Return the data files in use: those given, then the demo's or the shipped text.

    Raises:
        UsageError: Data that the method needs is not given.
    """
    files = {name: Path(path) for name, path in request.data.items()}
    if request.model is None:
        for name in (*method.spec.needs, *method.spec.uses, *TASKS[method.spec.task].demo_data, "text"):
            files.setdefault(name, demo_file(method.spec.demo, f"{DEMO_DATA.get(name, name)}.jsonl"))
    for name in method.spec.needs:
        if name == PAIRS and request.concepts is not None:
            # Two texts in place of the file, also in place of the demo's.
            if PAIRS not in request.data:
                files.pop(PAIRS, None)
        elif name not in files:
            if name == PAIRS:
                raise UsageError(
                    "--from is missing" if method.spec.targetless else "--from and --to are missing",
                    f"{method.spec.name} has to know the concept",
                    f"give --from TEXT{'' if method.spec.targetless else ' --to TEXT'}, or --pairs FILE; "
                    "or no MODEL to see the demo",
                )
            raise UsageError(
                f"--{name} is missing",
                f"{method.spec.name} needs {', '.join(f'--{need}' for need in method.spec.needs)}",
                f"give --{name} FILE, or no MODEL to see the demo",
            )
    files.setdefault("text", GENERAL_TEXT)
    if "calibration" in method.spec.uses:
        files.setdefault("calibration", GENERAL_TEXT)
    return files


def read_sets(files: Mapping[str, Path]) -> dict[str, list[Row]]:
    """Read the data files; of a preference pair the rejected answer is to be forgotten, the chosen one to be kept."""
    rows = {
        name: read_prompts(path) if name in ("harmful", "harmless") else read_rows(path) for name, path in files.items()
    }
    return {name: members if name == "forget" else chosen_rows(members) for name, members in rows.items()}


def hold_back(rows: dict[str, list[Row]], files: Mapping[str, Path], evaluation: EvaluationConfig) -> list[Row]:
    """Take out of the rows that a method reads what figures are measured on; return those of the domain.

    The last fifth of --domain is measured, `text_rows` rows at most. The shipped text serves as --calibration behind
    the passages of it that are measured.
    """
    if files.get("calibration") == files["text"] == GENERAL_TEXT:
        rows["calibration"] = rows["calibration"][evaluation.text_rows :] or rows["calibration"]
    domain = rows.get("domain", [])
    count = min(evaluation.text_rows, len(domain) // 5)
    if count:
        rows["domain"] = domain[:-count]
    return domain[-count:] if count else list(domain)


def data_digest(path: Path, rows: Sequence[object]) -> str:
    """Return the SHA-256 of a data file, or of the rows of a data set that is no file."""
    return file_digest(path) if path.is_file() else rows_digest(rows)
