"""`inspect`: a checkpoint described from its headers, without loading a weight."""

from __future__ import annotations

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import ITEMSIZE, Checkpoint
from llmsurgery.compute.source import resolve_source
from llmsurgery.errors import NoEffectError, UnsupportedError, UsageError
from llmsurgery.methods.registry import all_methods
from llmsurgery.methods.settings import resolve_config
from llmsurgery.run.source import stored_dtype


def inspect_model(model: str) -> dict[str, object]:
    """Describe a checkpoint.

    Args:
        model: Checkpoint directory, `.gguf` file or hub id.

    Returns:
        JSON values: family, layers, experts, parameters, roles, shards, tied roles, tensors without a role, and for
        each method how many tensors it would touch with its defaults.
    """
    checkpoint = Checkpoint.open(resolve_source(model))
    structure = detect(checkpoint.config, checkpoint.tensors)
    roles: dict[str, dict[str, object]] = {}
    for tensor in structure.tensors:
        row = roles.setdefault(
            tensor.label,
            {"tensors": 0, "parameters": 0, "bytes": 0, "dtype": tensor.dtype, "shape": list(tensor.shape)},
        )
        for key, amount in (
            ("tensors", 1),
            ("parameters", tensor.parameters),
            ("bytes", tensor.parameters * ITEMSIZE[tensor.dtype]),
        ):
            row[key] = int(str(row[key])) + amount
    methods: dict[str, object] = {}
    for method in all_methods():
        try:
            targets = method.plan(resolve_config(method.config_type, {}), structure)
        except (UsageError, NoEffectError, UnsupportedError) as error:
            methods[method.spec.name] = {"tensors": 0, "reason": error.what}
            continue
        methods[method.spec.name] = {
            "task": method.spec.task,
            "tensors": len(targets),
            "parameters": sum(target.parameters for target in targets),
            "roles": sorted({target.role for target in targets}),
        }
    return {
        "path": str(checkpoint.root),
        "model_type": checkpoint.config.get("model_type"),
        "family": structure.family.name,
        "layers": structure.layers,
        "experts": structure.experts,
        "parameters": sum(info.size for info in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "stored_dtype": stored_dtype(checkpoint),
        "tied": dict(structure.tied),
        "shards": [
            {"file": name, "bytes": header.file_size, "tensors": len(header.tensors)}
            for name, header in checkpoint.headers.items()
        ],
        "roles": roles,
        "other": list(structure.other),
        "methods": methods,
    }
