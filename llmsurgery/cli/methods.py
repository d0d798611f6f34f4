"""`llmsurgery methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmsurgery.cli import options
from llmsurgery.cli.output import Output
from llmsurgery.methods.base import Described


def methods(
    name: Annotated[
        str | None, typer.Argument(help="show one method with its hyperparameters", show_default=False)
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """List the methods, or show one with its hyperparameters and defaults.

    Example: llmsurgery methods flat
    """
    from llmsurgery.methods.registry import INFERENCE, all_methods, find_described
    from llmsurgery.report.table import rows_table

    output = Output(as_json, quiet, verbose)
    chosen = [find_described(name)] if name is not None else [*all_methods(), *INFERENCE.values()]
    output.document([describe(method, details=name is not None) for method in chosen])
    for method in chosen:
        output.essential(method.spec.name)
    if name is None:
        rows = [(m.spec.task, m.spec.name, m.spec.summary, _needs(m), m.spec.export) for m in chosen]
        output.show(rows_table(("task", "method", "what it does", "needs", "export"), rows))
    else:
        _show_one(output, chosen[0])


def describe(method: Described, details: bool) -> dict[str, object]:
    """Return a method as JSON values.

    Args:
        method: The method.
        details: Add hyperparameters, presets and the documentation.
    """
    from llmsurgery.methods.settings import settings_of

    spec = method.spec
    record: dict[str, object] = {
        "name": spec.name,
        "task": spec.task,
        "summary": spec.summary,
        "paper": spec.paper,
        "needs": list(spec.needs),
        "models": list(spec.models),
        "uses": list(spec.uses),
        "export": spec.export,
        "trained": spec.trained,
        "until": spec.until,
    }
    if details:
        record["hyperparameters"] = [
            {
                "name": setting.name,
                "default": list(setting.default) if isinstance(setting.default, tuple) else setting.default,
                "choices": list(setting.choices),
                "minimum": setting.minimum,
                "maximum": setting.maximum,
                "help": setting.help,
            }
            for setting in settings_of(method.config_type).values()
        ]
        record["presets"] = {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in preset.items()}
            for name, preset in spec.presets.items()
        }
    return record


def _show_one(output: Output, method: Described) -> None:
    import sys

    from llmsurgery.methods.settings import settings_of
    from llmsurgery.report.table import rows_table

    spec = method.spec
    settings = settings_of(method.config_type).values()
    rows = [(s.name, _plain(s.default), ", ".join(s.choices), s.help) for s in settings]
    output.show(
        f"{spec.name} ({spec.task}): {spec.summary}",
        f"paper: {spec.paper}",
        f"needs: {_needs(method) or 'nothing'}; result: {spec.export}; stops at: {spec.until or 'no rule'}",
        rows_table(("--set name", "default", "choices", "help"), rows) if rows else "no hyperparameters",
    )
    for name, preset in spec.presets.items():
        output.show(f"preset={name}: " + ", ".join(f"{key}={_plain(value)}" for key, value in preset.items()))
    if documentation := sys.modules[type(method).__module__].__doc__:
        output.show("", documentation.strip())


def _needs(method: Described) -> str:
    return ", ".join(f"--{need}" for need in (*method.spec.models, *method.spec.needs))


def _plain(value: object) -> str:
    return (",".join(map(str, value)) or "all") if isinstance(value, tuple) else str(value)
