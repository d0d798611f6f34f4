"""The manifest of a recipe: all operations, what changed from the first source to the end, figures and gates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmsurgery.checkpoint import Checkpoint, file_digest
from llmsurgery.edits.coverage import coverage
from llmsurgery.evaluate.gates import METRICS, Gate, GateOutcome, check_gates
from llmsurgery.run.chain_steps import Planned, against_source
from llmsurgery.run.manifest import FORMAT, change_record, earlier_operations, gate_record
from llmsurgery.run.pages import Example
from llmsurgery.run.record import Recorded

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
PERPLEXITY, RATIO = "utility.ppl", "utility.ppl_ratio"


@dataclass
class Ran:
    """A step after its turn.

    Attributes:
        step: The step.
        status: "passed", "failed" (a gate) or "not run" (what it needs did not pass).
        manifest: Its own manifest; empty if it was not run.
        examples: Answers before and after, if it was run by this process.
    """

    step: Planned
    status: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[Example] = ()


def build(
    given: str | None,
    source: Checkpoint,
    out: str,
    ran: Sequence[Ran],
    line: Sequence[str],
    gates: Sequence[GateOutcome],
    recorded: Recorded | None,
    cost: Mapping[str, object],
) -> dict[str, object]:
    """Return the manifest of a recipe as JSON values.

    Args:
        given: The model as given; None for the demo.
        source: The model that the first step edited.
        out: Output directory.
        ran: Every step.
        line: Names of the steps that lead to the result; only those that passed of a recipe that failed.
        gates: Outcomes of the gates at the end.
        recorded: What was written; None for the report of a failure before that.
        cost: What the run took.
    """
    by_name = {one.step.name: one for one in ran}
    lead = [by_name[name] for name in line]
    changes = recorded.changes if recorded is not None else []
    named = sorted({name for one in lead for name in one.manifest["tensors"]})
    roles = {change.name: change.role for change in changes}
    steps = [_step_record(one, one.step.name in line) for one in ran]
    done = [one for one in ran if one.manifest]
    return {
        "format": FORMAT,
        "versions": dict(done[-1].manifest["versions"]) if done else {},
        "source": {
            "path": str(source.root) if given is not None else "demo",
            "given": given,
            "config_sha256": file_digest(source.root / "config.json"),
        },
        "out": out,
        "steps": steps,
        "operations": [_operation(one) for one in lead],
        "data": _data(lead),
        "history": earlier_operations(source.root),
        "export": lead[-1].manifest["export"] if lead else "plain",
        "save": "full",
        "coverage": [
            dataclasses.asdict(row) for row in coverage([(n, roles[n]) for n in named if n in roles], changes)
        ],
        "tensors": {change.name: change_record(change) for change in changes},
        "files": recorded.files if recorded is not None else {},
        "metrics": chain_metrics(lead),
        "gates": [{**gate, "step": one.step.name} for one in done for gate in one.manifest["gates"]]
        + [{**gate_record(outcome), "step": None} for outcome in gates],
        "notices": [f"{one.step.name}: {text}" for one in done for text in one.manifest["notices"]],
        "cost": {**cost, "steps": {one.step.name: one.manifest["cost"] for one in done}},
    }


def _operation(one: Ran) -> dict[str, object]:
    (operation,) = one.manifest["operations"]
    beside = {key: one.manifest[key] for key in ("data", "retain_model", "models") if one.manifest.get(key) is not None}
    return {"name": one.step.name, **operation, **beside}


def _step_record(one: Ran, leads: bool) -> dict[str, object]:
    record: dict[str, object] = {
        "name": one.step.name,
        "task": one.step.method.spec.task,
        "method": one.step.method.spec.name,
        "needs": list(one.step.needs),
        "takes": one.step.takes,
        "status": one.status,
    }
    if one.manifest:
        record |= {key: one.manifest[key] for key in ("export", "coverage", "metrics", "gates", "notices")}
        if not leads:
            record["operation"] = _operation(one)
    return record


def _data(lead: Sequence[Ran]) -> dict[str, object]:
    """Return the data of all steps: one entry per name, and `STEP.NAME` where a later step reads another file."""
    result: dict[str, Any] = {}
    for one in lead:
        for name, entry in one.manifest["data"].items():
            if result.setdefault(name, entry)["sha256"] != entry["sha256"]:
                result[f"{one.step.name}.{name}"] = entry
    return result


def chain_metrics(lead: Sequence[Ran]) -> dict[str, Any]:
    """Return `{name: {before, after, direction}}` from the first source to the end.

    After is what the last step measured. Before is what the first step to measure it on the same data measured; where
    that is a later step, or the figure compares with the step's own source, `since` names the step.
    """
    if not lead:
        return {}
    last = lead[-1]
    result: dict[str, Any] = {}
    for name, figure in last.manifest["metrics"].items():
        first = last
        if not against_source(name):
            first = next(one for one in lead if _measured_alike(name, one, last))
        found = {**figure, "before": first.manifest["metrics"][name]["before"]}
        result[name] = found if first is lead[0] else {**found, "since": first.step.name}
    if len(lead) > 1 and RATIO in result and PERPLEXITY in result:
        result[RATIO] = _ratio(result[RATIO], result[PERPLEXITY])
    return result


def _measured_alike(name: str, one: Ran, last: Ran) -> bool:
    """Whether two steps measured a metric on as many of the same rows, in the same manner."""
    if one is last:
        return True
    metric = METRICS.get(name)

    def asked(ran: Ran) -> object:
        data = ran.manifest["data"]
        needed = [need for need in metric.needs if need in data] if metric is not None else []
        digests = {need: data[need]["sha256"] for need in needed or sorted(data) if need != "pairs"}
        return ran.manifest["operations"][0]["evaluation"], digests, ran.manifest["metrics"][name]["before"]["n"]

    return name in one.manifest["metrics"] and asked(one) == asked(last)


def _ratio(ratio: dict[str, Any], perplexity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the perplexity at the end over that before, in place of the last step's ratio."""
    before, after = perplexity["before"]["value"], perplexity["after"]["value"]
    if not before or after is None:
        return ratio
    since = {"since": perplexity["since"]} if "since" in perplexity else {}
    kept = {key: value for key, value in ratio.items() if key != "since"}
    # The interval was one of the last step's ratio; that of the whole is not known.
    return {**kept, "after": {**ratio["after"], "value": after / before, "interval": None}, **since}


def outcomes(gates: list[Gate], metrics: Mapping[str, Any]) -> list[GateOutcome]:
    """Check the gates at the end."""

    def values(side: str) -> dict[str, float]:
        found = {name: figure[side]["value"] for name, figure in metrics.items()}
        return {name: math.nan if value is None else float(value) for name, value in found.items()}

    return check_gates(gates, values("after"), values("before"))


def total_cost(ran: Sequence[Ran], seconds: float, bytes_written: int, undo_bytes: int | None) -> dict[str, object]:
    """Return what all steps took together, those of an earlier run that was gone on from included."""
    costs = [one.manifest["cost"] for one in ran if one.manifest]
    peaks = {
        name: max(cost[name] for cost in costs if name in cost)
        for name in ("rss_bytes", "device_bytes")
        if any(name in cost for cost in costs)
    }
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs) + seconds, 3),
        "threads": costs[-1]["threads"] if costs else 0,
        "bytes_written": sum(cost["bytes_written"] for cost in costs) + bytes_written,
        "undo_bytes": undo_bytes,
        "patch_bytes": None,
        **peaks,
    }
