"""`--dry-run`: what would be done, from headers and data alone."""

from __future__ import annotations

from llmsurgery.checkpoint import ITEMSIZE
from llmsurgery.methods.settings import as_record
from llmsurgery.run.prepare import Prepared, stored_dtype


def plan(prepared: Prepared) -> dict[str, object]:
    """Return the plan of a run: tensors, bytes and memory.

    Args:
        prepared: The checked request.

    Returns:
        JSON values. `memory_bytes` counts weights, and for trained methods the trained parameters with gradient and
        two optimizer states in fp32; activations come on top.
    """
    checkpoint = prepared.checkpoint
    settings = as_record(prepared.config)
    roles: dict[str, dict[str, int]] = {}
    for target in prepared.targets:
        row = roles.setdefault(target.label, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += target.parameters
        row["bytes"] += target.parameters * ITEMSIZE[target.dtype]
    moving = 0
    if prepared.method.spec.trained:
        lora = settings.get("train") == "lora"
        rank = settings.get("rank")
        for target in prepared.targets:
            factors = sum(target.shape) * rank if lora and isinstance(rank, int) else target.parameters
            moving += factors
    return {
        "dry_run": True,
        "source": {"path": str(prepared.request.model or "demo"), "bytes": checkpoint.nbytes},
        "out": str(prepared.out),
        "operations": [{"task": prepared.method.spec.task, "method": prepared.method.spec.name, "settings": settings}],
        "data": {name: len(rows) for name, rows in prepared.rows.items()},
        "targets": roles,
        "tensors": len(prepared.targets),
        "bytes_to_rewrite": sum(row["bytes"] for row in roles.values()),
        "trained_parameters": moving,
        # fp32 value, gradient and the two moments of AdamW.
        "memory_bytes": checkpoint.nbytes + 16 * moving,
        "stored_dtype": stored_dtype(checkpoint),
    }
