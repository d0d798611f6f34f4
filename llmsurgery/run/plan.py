"""`--dry-run`: what would be done, from headers and data alone."""

from __future__ import annotations

from collections.abc import Sequence

from llmsurgery.arch.spec import RoleTensor
from llmsurgery.checkpoint import ITEMSIZE
from llmsurgery.methods.settings import as_record
from llmsurgery.run.memory import predict
from llmsurgery.run.prepare import Prepared
from llmsurgery.run.source import stored_dtype


def plan(prepared: Prepared) -> dict[str, object]:
    """Return the plan of a run: tensors, bytes and memory.

    Args:
        prepared: The checked request.

    Returns:
        JSON values. `memory_bytes` is the predicted peak of the process's resident set, or of device memory. Where the
        data choose one expert out of many, the sizes are those of one, and `experts` says how many there are to choose
        from.
    """
    checkpoint = prepared.checkpoint
    settings = as_record(prepared.config)
    targets = one_expert(prepared.targets) if prepared.method.spec.one_expert else prepared.targets
    roles: dict[str, dict[str, int]] = {}
    for target in targets:
        row = roles.setdefault(target.label, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += target.parameters
        row["bytes"] += target.parameters * ITEMSIZE[target.dtype]
    prediction = predict(prepared, targets)
    pairs = {"pairs": len(prepared.pairs)} if prepared.pairs else {}
    pairs |= {name: len(members) for name, members in prepared.asked.members.items() if members}
    result: dict[str, object] = {
        "dry_run": True,
        "source": {"path": str(prepared.request.model or "demo"), "bytes": checkpoint.nbytes},
        "out": str(prepared.out),
        "operations": [{"task": prepared.method.spec.task, "method": prepared.method.spec.name, "settings": settings}],
        "data": {name: len(rows) for name, rows in prepared.rows.items()} | pairs,
        "targets": roles,
        "tensors": len(targets),
        "bytes_to_rewrite": sum(row["bytes"] for row in roles.values()),
        "trained_parameters": prediction.moving,
        "memory_bytes": prediction.peak,
        "memory": prediction.record(),
        "stored_dtype": stored_dtype(checkpoint),
    }
    if prepared.method.spec.one_expert:
        result["experts"] = len(_experts(prepared.targets))
    return result


def one_expert(targets: Sequence[RoleTensor]) -> list[RoleTensor]:
    """Return the tensors of the first expert and of its block's router; those of the others have the same sizes."""
    layer, expert = min(_experts(targets))
    return [target for target in targets if target.layer == layer and target.expert in (None, expert)]


def _experts(targets: Sequence[RoleTensor]) -> set[tuple[int, int]]:
    return {(t.layer, t.expert) for t in targets if t.layer is not None and t.expert is not None}
