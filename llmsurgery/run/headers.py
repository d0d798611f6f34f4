"""`--dry-run` of methods that train nothing: the plan from headers, config and data files, without torch.

    memory = base + max over phases

base stands for the imported libraries. The phases, with W the weights, B the largest block, E the embeddings and m the
width of a key, n the tokens of the statistics and L the layers that may be written:

    everything is measured        W + statistics
    eval.figures=edit             E + B + the written matrices + statistics + a matrix in float32 twice

E and B are in the compute dtype, which `auto` takes to be float32 here: whether the processor has another is not looked
at. Statistics are n m entries of the compute dtype a layer, or m^2 in float32 where there are more tokens than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import ITEMSIZE, Checkpoint
from llmsurgery.compute.source import resolve_source
from llmsurgery.demo import world_path
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.gates import ROW_NEEDS, parse_gate
from llmsurgery.methods.registry import find_method
from llmsurgery.methods.settings import as_record
from llmsurgery.run.choices import NAMES as ASKED
from llmsurgery.run.choices import read_asked
from llmsurgery.run.files import data_files, read_sets
from llmsurgery.run.fitting import parse_batch_size
from llmsurgery.run.needs import available_needs
from llmsurgery.run.pairs import NEED as PAIRS
from llmsurgery.run.pairs import requested_pairs, require_figures
from llmsurgery.run.places import generated_name
from llmsurgery.run.request import Request
from llmsurgery.run.settings import check_untrained, split_settings
from llmsurgery.run.source import check_editable, check_pictures, stored_dtype

IMPORTED = 480 << 20
"""Resident bytes once torch, transformers and peft are imported: an estimate, not from a benchmark."""


def plan_from_headers(request: Request) -> dict[str, object] | None:
    """Return the plan of a run, None for a method whose plan needs more than headers.

    What is not looked at: names as tokens, and whether rows fit into the model.

    Args:
        request: The request.

    Raises:
        SurgeryError: Whatever is wrong with it.
    """
    method = find_method(request.method, request.task)
    if not method.spec.streams:
        return None
    from pathlib import Path

    parse_batch_size(request.batch_size)
    config, evaluation, _ = split_settings(method, request)
    check_untrained(method, request)
    require_figures(method, evaluation)
    files = data_files(method, request)
    pairs = requested_pairs(method, config, request, files)
    available = available_needs(method, files, evaluation, request, pairs)
    for text in request.require:
        parse_gate(text, available | ROW_NEEDS)
    source = resolve_source(request.model if request.model is not None else world_path(method.spec.demo))
    checkpoint = Checkpoint.open(source)
    structure = detect(checkpoint.config, checkpoint.tensors)
    check_pictures(method, structure)
    targets = method.plan(config, structure)
    check_editable(targets)
    rows = read_sets({name: path for name, path in files.items() if name not in (PAIRS, *ASKED)})
    members = {**rows, **{name: found for name, found in read_asked(files).members.items() if name in files}}
    counts = {name: len(found) for name, found in members.items()}
    counts |= {PAIRS: len(pairs)} if pairs else {}
    table: dict[str, dict[str, int]] = {}
    for target in targets:
        row = table.setdefault(target.label, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += target.parameters
        row["bytes"] += target.parameters * ITEMSIZE[target.dtype]
    narrow = request.dtype in ("bfloat16", "float16")
    memory = _memory(checkpoint, structure, targets, config, evaluation, 2 if narrow else 4)
    return {
        "dry_run": True,
        "source": {"path": str(request.model or "demo"), "bytes": checkpoint.nbytes},
        "out": str(Path(request.out) if request.out is not None else generated_name(request)),
        "operations": [{"task": method.spec.task, "method": method.spec.name, "settings": as_record(config)}],
        "data": counts,
        "targets": table,
        "tensors": len(targets),
        "bytes_to_rewrite": sum(row["bytes"] for row in table.values()),
        "trained_parameters": 0,
        "memory_bytes": IMPORTED + max(memory.values()),
        "memory": {
            "of": "resident set",
            "base": IMPORTED,
            "phases": {name: IMPORTED + size for name, size in memory.items()},
            "step": None,
        },
        "stored_dtype": stored_dtype(checkpoint),
    }


def _memory(
    checkpoint: Checkpoint,
    structure: Structure,
    targets: Sequence[RoleTensor],
    config: object,
    evaluation: EvaluationConfig,
    item: int,
) -> Mapping[str, int]:
    """Return the predicted bytes of each phase, on top of the base; `item` is the size of the compute dtype."""
    outside, blocks = 0, Counter[int]()
    for tensor in structure.tensors:
        size = tensor.parameters * item
        if tensor.layer is not None:
            blocks[tensor.layer] += size
        elif tensor.role.startswith("embed"):
            outside += size
    wide = max(target.parameters for target in targets)
    width = max(max(target.shape) for target in targets)
    tokens = int(getattr(config, "stats_tokens", 0))
    statistics = min(tokens * item, 4 * width) * width
    layers = len({target.layer for target in targets})
    if evaluation.figures == "all":
        return {"loaded": checkpoint.nbytes + layers * statistics + 8 * wide}
    span = min(int(getattr(config, "span", layers)), layers)
    written = span * max(target.parameters * ITEMSIZE[target.dtype] for target in targets)
    return {"streamed": outside + max(blocks.values()) + written + span * statistics + 8 * wide}
