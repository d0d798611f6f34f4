"""An audit of data as a directory (scores, what is kept, manifest), as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from llmsurgery.checkpoint import file_digest
from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.target import Claim, check_free, move_into_place, remove
from llmsurgery.compute.progress import Progress
from llmsurgery.report.heat import check_picture, plain, save_figure
from llmsurgery.report.numbers import format_number
from llmsurgery.report.table import rows_table
from llmsurgery.run.audit import Audit, AuditRequest, audit_data
from llmsurgery.run.manifest import encode_manifest

SCORES, KEPT, MANIFEST = "scores.jsonl", "kept.jsonl", "audit.json"
LABELS = {"ln_ches": "ln-CHES (higher: more displacement)", "ches": "CHES (higher: more displacement)"}
BINS = 40


def publish_audit(
    request: AuditRequest, out: str | None, force: bool, picture: str | None, progress: Progress
) -> dict[str, object]:
    """Run an audit and write its scores, the rows that are kept and its manifest.

    Args:
        request: The request.
        out: Output directory; None for a new one below `llmsurgery-out`.
        force: Replace an existing output.
        picture: File for the distribution of the scores.
        progress: Told of long work and notices.

    Returns:
        The manifest.
    """
    if picture is not None:
        check_picture(picture)
    place = Path(out) if out is not None else _free_name(request.kind)
    check_free(place, force)
    claim = Claim(place, force)
    try:
        audit = audit_data(request, progress)
        names = (SCORES, KEPT)
        with writing(claim.path):
            _write_lines(claim.path / SCORES, audit.scores)
            _write_lines(claim.path / KEPT, (audit.records[i] for i in audit.kept))
            document = {**audit.document, "out": str(place)}
            document["files"] = {name: file_digest(claim.path / name) for name in names}
            (claim.path / MANIFEST).write_bytes(encode_manifest(document))
        if picture is not None:
            save_distribution(audit, picture)
        aside = move_into_place(claim.path, place, force)
    except BaseException:
        claim.discard()
        raise
    claim.release()
    if aside is not None:
        remove(aside)
    return document


def _free_name(kind: str) -> Path:
    number = 1
    while True:
        place = Path("llmsurgery-out") / (f"audit-{kind}" if number == 1 else f"audit-{kind}-{number:03d}")
        if not place.exists() and not place.with_name(f"{place.name}.partial").exists():
            return place
        number += 1


def _write_lines(path: Path, records: Iterable[object]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for record in records:
            # Tables hold dates and the like, which JSON has no form for.
            stream.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def audit_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the quantiles of the scores and, for pairs that were compared, what all and the kept ones are like."""
    record = document["operations"][0]["record"]
    found = {name: row for name, row in record["quantiles"].items() if row is not None}
    tables = []
    if found:
        levels = list(next(iter(found.values())))
        rows = [(name, *(format_number(row[level]) for level in levels)) for name, row in found.items()]
        tables.append(rows_table(("quantile", *levels), rows, "scores"))
    if "kept_rows" in record:
        names = list(record["all"])
        mixes = [(title, *(_cell(record[key][name]) for name in names)) for title, key in _MIXES]
        tables.append(rows_table(("", *(name.replace("_", " ") for name in names)), mixes, "what they are like"))
    return tables


_MIXES = (("all", "all"), ("kept", "kept_rows"))


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else format_number(value)


def save_distribution(audit: Audit, path: str) -> None:
    """Draw how the scores are distributed, with the limit of the filter.

    Raises:
        ResourceError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    known = {name: [value for value in values if value is not None] for name, values in audit.series.items()}
    everything = [value for values in known.values() for value in values]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in known.items():
        axes.hist(values, bins=_edges(everything), alpha=0.6, label=plain(f"{name} ({len(values)})"))
    if audit.limit is not None:
        axes.axvline(audit.limit, color="black", linewidth=1, label=f"limit of the filter: {audit.limit:.4g}")
    only = next(iter(known))
    axes.set_xlabel(plain(LABELS.get(only, "highest BCI of a candidate span, nats")))
    axes.set_ylabel("rows")
    axes.set_title(f"{len(audit.kept)} of {len(audit.scores)} rows are kept")
    axes.legend()
    save_figure(figure, path)


def _edges(values: Sequence[float]) -> list[float]:
    """Return common edges of the bars, so that series can be compared."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    width = (high - low) / BINS or 1.0
    return [low + width * i for i in range(BINS + 1)]
