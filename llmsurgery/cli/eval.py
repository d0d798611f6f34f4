"""`llmsurgery eval`."""

from __future__ import annotations

from typing import Any, cast

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def evaluate(
    models: options.Models,
    forget: options.Forget = None,
    retain: options.Retain = None,
    text: options.Text = None,
    source: options.Source = None,
    assignments: options.Assignments = None,
    require: options.Require = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = None,
    trust_remote_code: options.RemoteCode = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure checkpoints on the same data.

    Example: llmsurgery eval OUT --source MODEL --forget forget.jsonl --retain retain.jsonl
    """
    from llmsurgery import api
    from llmsurgery.methods.settings import parse_assignments
    from llmsurgery.report.table import figures_table

    output = Output(as_json, quiet, verbose)
    document = cast(
        dict[str, Any],
        api.evaluate_checkpoints(
            models,
            forget=forget,
            retain=retain,
            text=text,
            source=source,
            settings=parse_assignments(assignments or []),
            require=require or [],
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
            progress=output,
        ),
    )
    output.document(document)
    columns = {row["path"]: row["metrics"] for row in document["models"]}
    if document["source"]:
        columns = {f"{document['source']['path']} (source)": document["source"]["metrics"], **columns}
    output.show(figures_table(columns))
    for row in document["models"]:
        values = " ".join(f"{name}={figure['value']}" for name, figure in row["metrics"].items())
        output.essential(f"{row['path']} {values}")
