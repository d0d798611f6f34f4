"""`llmsurgery inspect`."""

from __future__ import annotations

from typing import Any, cast

from llmsurgery.cli import options
from llmsurgery.cli.output import Output


def inspect(
    model: options.OneModel,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Describe a checkpoint from its headers: architecture, roles, shards, what each method could touch.

    Example: llmsurgery inspect MODEL
    """
    from llmsurgery import api
    from llmsurgery.report.table import rows_table

    output = Output(as_json, quiet, verbose)
    document = cast(dict[str, Any], api.inspect_checkpoint(model))
    output.document(document)
    tied = "".join(f", {role} shares the tensor of {other}" for role, other in document["tied"].items())
    experts = f"{document['experts']} experts, " if document["experts"] else ""
    roles = [
        (name, row["tensors"], row["parameters"], row["dtype"], " x ".join(map(str, row["shape"])))
        for name, row in document["roles"].items()
    ]
    shards = [(row["file"], row["tensors"], row["bytes"]) for row in document["shards"]]
    methods = [
        (name, row["tensors"], row.get("parameters", 0), ", ".join(row.get("roles", [row.get("reason", "")])))
        for name, row in document["methods"].items()
    ]
    output.show(
        f"{document['family']} model, {document['layers']} layers, {experts}{document['parameters']:,} parameters, "
        f"{document['bytes']:,} bytes in {document['stored_dtype']}{tied}",
        rows_table(("role", "tensors", "parameters", "dtype", "shape"), roles),
        rows_table(("file", "tensors", "bytes"), shards),
        rows_table(("method", "tensors", "parameters", "roles by default"), methods),
    )
    if document["other"]:
        output.show(f"{len(document['other'])} tensors have no role, first {document['other'][0]}")
    output.essential(f"{document['family']} {document['layers']} {document['parameters']}")
