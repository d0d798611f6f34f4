"""`report.html`: one page that says what was done, with which result; it needs neither network nor scripts.

Everything comes from the manifest and from examples that a user asked for. Prompts that are to be refused are in
neither: of `--harmful` rows the page has numbers and counts alone. Every value is escaped by the template's engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsurgery.report.change_map import CELL_HEIGHT, CELL_WIDTH, change_map, norm
from llmsurgery.report.controls import controls_of
from llmsurgery.report.numbers import format_number
from llmsurgery.report.strips import MARGIN, WIDTH, strips

if TYPE_CHECKING:
    from jinja2 import Template

    from llmsurgery.run.pages import Examples

_LARGEST = 12
_TILES = 4


def write_report(manifest: Mapping[str, Any], examples: Examples) -> str:
    """Return the report of a run.

    Args:
        manifest: The manifest, that of a failed gate included.
        examples: Name of a step -> forget questions with their answers before and after.

    Returns:
        A whole page of HTML.
    """
    metrics = strips(manifest["metrics"])
    tensors = manifest["tensors"]
    return page_template("page.html").render(
        manifest=manifest,
        title=title_of(manifest),
        model=model_of(manifest),
        verdict=verdict(manifest),
        metrics=metrics,
        tiles=_tiles(manifest, metrics),
        strip={"width": WIDTH, "margin": MARGIN},
        map=change_map(tensors),
        cell={"width": CELL_WIDTH, "height": CELL_HEIGHT},
        coverage=_coverage(manifest),
        largest=_largest(tensors),
        changed=sum(record["sha256_before"] != record["sha256_after"] for record in tensors.values()),
        examples=examples,
        harmful=_harmful(manifest),
        controls=controls_of(manifest) if manifest["operations"] else None,
        cost=cost_items(manifest["cost"]),
        operations=[_operation(operation) for operation in manifest["operations"]],
        data=_data(manifest["data"]),
        number=format_number,
    )


@cache
def page_template(name: str) -> Template:
    """Return a template of this folder; every value put into it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def title_of(manifest: Mapping[str, Any]) -> str:
    """Return what was done, in a few words."""
    if steps := manifest.get("steps"):
        return f"{len(steps)} steps: " + ", ".join(f"{step['task']} {step['method']}" for step in steps)
    operation = manifest["operations"][-1]
    return f"{operation['task']} --method {operation['method']}"


def model_of(manifest: Mapping[str, Any]) -> str:
    """Return the edited model as it was given."""
    return str(manifest["source"]["given"] or "the embedded demo")


def verdict(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """Return ("good", "bad" or "plain", sentence): whether the gates held."""
    gates = manifest["gates"]
    failed = [gate for gate in gates if not gate["passed"]]
    unrun = [step["name"] for step in manifest.get("steps", ()) if step["status"] != "passed"]
    if failed or unrun:
        what = f"{len(failed)} of {len(gates)} gates failed" if failed else f"Not passed: {', '.join(unrun)}"
        return "bad", f"{what}: nothing was published"
    if not gates:
        return "plain", "Published; no gate was set"
    return "good", "Published: the gate held" if len(gates) == 1 else f"Published: all {len(gates)} gates held"


def _tiles(manifest: Mapping[str, Any], metrics: Sequence[Any]) -> list[Any]:
    """Return the metrics shown large: those of the gates, then the first of each group."""
    by_name = {metric.name: metric for metric in metrics}
    gated = [
        name for name in by_name if any(gate["gate"].startswith((f"{name}<", f"{name}>")) for gate in manifest["gates"])
    ]
    first: dict[str, str] = {}
    for name in by_name:
        first.setdefault(name.split(".")[0], name)
    groups = {name.split(".")[0] for name in gated}
    others = [name for group, name in first.items() if group not in groups]
    return [by_name[name] for name in [*gated, *others][:_TILES]]


def _coverage(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in manifest["coverage"]:
        members = [record for record in manifest["tensors"].values() if record["role"] == row["role"]]
        rows.append({**row, "norm": max(map(norm, members), default=0.0)})
    return rows


def _largest(tensors: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(tensors.items(), key=lambda item: -norm(item[1]))[:_LARGEST]


def _harmful(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return ids and counts of the prompts that are to be refused, None if there were none."""
    rows = (manifest["data"].get("harmful") or {}).get("rows")
    if not rows:
        return None
    rate = manifest["metrics"].get("safety.refusal_rate")
    sides = ("aligned", "before", "after")
    counts = {
        side: f"{round(rate[side]['value'] * rate[side]['n'])} of {rate[side]['n']}"
        for side in sides
        if rate is not None and side in rate and rate[side]["value"] is not None
    }
    return {"rows": rows, "refused": counts}


def cost_items(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, amount) of everything that a run took."""
    sizes = (
        ("peak memory", "rss_bytes"),
        ("peak device memory", "device_bytes"),
        ("written", "bytes_written"),
        ("undo data", "undo_bytes"),
        ("patch", "patch_bytes"),
    )
    items = [("time", f"{cost['seconds']:,.1f} s"), ("threads", str(cost["threads"]))]
    return items + [(what, _size(cost[key])) for what, key in sizes if cost.get(key) is not None]


def _size(count: int) -> str:
    if count < 2**13:
        return f"{count:,} bytes"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def _operation(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an operation was told and what it found, as (name, value) texts."""
    plain = ("seed", "device", "dtype", "quantize", "batch_size", "until")
    tables = {"settings": operation.get("settings") or {}, "evaluation": operation.get("evaluation") or {}}
    tables |= {"guard": operation.get("guard") or {}, "record of the run": operation.get("record") or {}}
    return {
        "name": operation.get("name", ""),
        "task": operation["task"],
        "method": operation.get("method", ""),
        "paper": operation.get("paper", ""),
        "options": [(key, text(operation[key])) for key in plain if operation.get(key) is not None],
        "tables": {title: [(key, text(value)) for key, value in table.items()] for title, table in tables.items()},
    }


def text(value: object) -> str:
    """Return a JSON value as text; a long one is cut."""
    if isinstance(value, list | tuple):
        shown = ", ".join(map(text, value)) or "all"
    elif isinstance(value, Mapping):
        shown = ", ".join(f"{key} {text(item)}" for key, item in value.items())
    elif isinstance(value, bool) or value is None:
        shown = "none" if value is None else "yes" if value else "no"
    else:
        shown = format_number(value) if isinstance(value, float) else str(value)
    return shown if len(shown) <= 300 else shown[:299] + "…"


def _data(entries: Mapping[str, Any]) -> list[tuple[str, str, int, str]]:
    """Return (name, file, rows, digest); the folder of a file says nothing to a reader and may say too much."""
    return [(name, Path(entry["path"]).name, entry["rows"], entry["sha256"]) for name, entry in entries.items()]
