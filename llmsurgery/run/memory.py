"""How much memory a run will need at its peak, for `--dry-run`.

    peak = base + max over phases

base is what the process holds once everything that a run imports is imported, measured here; on a GPU it is 0, and
the context of the driver comes on top of the peak. The phases, with W the weights in the compute dtype:

    loading   W + on the CPU, the pages of the weight files that are converted to another dtype or layout
    before    W + forwards of the longest rows and texts, or the keys and values of the longest answers
    training  W (quantised if asked for) + kept + values, gradients and moments of what moves + a step
    pruning   W + kept + the windows between two blocks + a forward of some of them + statistics: the second moments of
              a block and one being factorised (sparsegpt), or sums over gradients, and a backward in which no two
              gradients are alive (d-pruner, whose walk and whose masks are phases of their own)
    result    edits + W + kept + as before, and the divergence from the source

where "kept" is what later figures and the guard compare with: final hidden states and a copy of the head, each. Scoring
and a step are traced on tensors without data (`llmsurgery.compute.memory`): activations of one micro-batch of the
longest rows, chunks of the head, gradients; the guard's step counts where it is larger. Quantised matrices are counted
by their size, and one of them at a time in the compute dtype.

Not counted: scratch space inside kernels, blocks that the allocator cannot use again, the drawing of the guard's
questions, and what a method computes beside such a step (statistics, activations of an assistant, importances of rows).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from llmsurgery.arch.spec import LINEAR_ROLES, RoleTensor
from llmsurgery.methods.working_memory import Working
from llmsurgery.run.fitting import uses_bitsandbytes
from llmsurgery.run.phases import Step, trace_scoring, trace_step, trace_windows
from llmsurgery.run.prepare import Prepared
from llmsurgery.train.config import TrainingConfig

MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes of both moments per trained entry; in 8 bits one fp32 scale goes with 256 of them."""

MATRIX_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes per entry of a quantised matrix; nf4 has an 8-bit scale per 64 entries, and an fp32 one per 256 of these."""

CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Prediction:
    """A predicted peak.

    Attributes:
        of: "resident set" of the process, or "device" memory.
        base: Bytes before a model is loaded.
        phases: Phase -> bytes on top of them.
        moving: Number of entries that training moves.
        step: Sequences and tokens of the step that was traced; None if nothing trains.
    """

    of: str
    base: int
    phases: dict[str, int]
    moving: int
    step: tuple[int, int] | None

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.base + max(self.phases.values())

    def record(self) -> dict[str, object]:
        """Return the prediction as JSON values; phases with the base."""
        phases = {name: self.base + size for name, size in self.phases.items()}
        step = None if self.step is None else {"sequences": self.step[0], "tokens": self.step[1]}
        return {"of": self.of, "base": self.base, "phases": phases, "step": step}


def predict(prepared: Prepared, targets: Sequence[RoleTensor]) -> Prediction:
    """Predict the peak of memory of a run from headers, config and data.

    Args:
        prepared: The checked request.
        targets: The stored tensors that move.
    """
    from llmsurgery.compute.load import empty_model

    checkpoint, buffers = prepared.checkpoint, prepared.structure.family.buffers
    model = empty_model(checkpoint.root, prepared.dtype, prepared.request.trust_remote_code, buffers)
    on_cpu = prepared.device.type == "cpu"
    base = _base(prepared) if on_cpu else 0
    scored = trace_scoring(prepared, copy.deepcopy(model))
    copied = _copied(prepared)
    load = scored.weights + _pages(prepared, copied, loading=True)
    held = scored.weights + _pages(prepared, copied)
    phases = {"loading": load, "before": held + scored.before}
    edits, step = 0, None
    training = getattr(prepared.config, "training", None)
    beside = 0
    # What is only cut or folded does not train.
    chosen = getattr(prepared.method, "moved", None)
    moved = targets if chosen is None else chosen(prepared.config, prepared.structure)
    if isinstance(training, TrainingConfig) and moved:
        # Of a method that trains when it has made the model smaller, that model.
        if (small := getattr(prepared.method, "trained_model", None)) is not None:
            model = small(prepared.config, prepared.structure, model)
            copied = copied | ({target.stored for target in targets} if on_cpu else set())
        step = trace_step(prepared, model, training, moved)
        counted = getattr(prepared.method, "moved_beside", None)
        beside = 0 if counted is None else int(counted(prepared.config, prepared.structure))
        # fp32 value, gradient and the two moments of AdamW.
        phases["training"] = _training(prepared, training, step, copied, moved) + scored.kept + 16 * beside
        if on_cpu:
            # Factors in fp64, or the values in fp32.
            edits = step.moving * (8 if training.train == "lora" else 4)
    # What a method trains besides, one after the other with the rest, such as an assistant.
    count = getattr(prepared.method, "further_parameters", None)
    further = 0 if count is None else int(count(prepared.config, prepared.structure))
    if further:
        # fp32 value, gradient and the two moments of AdamW.
        phases["training besides"] = held + scored.kept + 16 * further
    if (extra := getattr(prepared.method, "further_bytes", None)) is not None:
        phases["searching"] = held + scored.kept + scored.before + int(extra(prepared.config, prepared.structure))
    if (working := getattr(prepared.method, "working", None)) is not None:
        given = prepared.request.batch_size
        for one in working(
            prepared.config, prepared.structure, prepared.data, given if isinstance(given, int) else None
        ):
            phases[one.phase] = held + scored.kept + _working(prepared, one, targets)
    phases["result"] = edits + max(load + scored.kept, held + scored.after)
    shape = None if step is None else (step.sequences, step.tokens)
    moving = further + beside + (0 if step is None else step.moving)
    return Prediction("resident set" if on_cpu else "device", base, phases, moving, shape)


def _working(prepared: Prepared, one: Working, targets: Sequence[RoleTensor]) -> int:
    """Return what a phase of pruning takes beside the model: what it holds, and the windows that run."""
    from llmsurgery.compute.load import empty_model

    if not one.rows:
        return one.held
    checkpoint, structure = prepared.checkpoint, prepared.structure
    model = empty_model(
        checkpoint.root, prepared.dtype, prepared.request.trust_remote_code, structure.family.buffers
    )  # fmt: skip
    width = next(tensor.shape[1] for tensor in structure.tensors if tensor.role == "embed" and len(tensor.shape) == 2)
    stream = one.windows * one.tokens * width * prepared.dtype.itemsize
    moving = targets if one.backward else ()
    return one.held + stream + trace_windows(prepared, model, one.rows, one.tokens, moving)


def _base(prepared: Prepared) -> int:
    """Import what a run imports, and return what the process then holds."""
    import importlib

    from llmsurgery.compute.device import resident_bytes

    for name in ("peft", "accelerate", "llmsurgery.train.loop", "llmsurgery.evaluate.figures", "scipy.stats"):
        importlib.import_module(name)
    if prepared.evaluation.generate:
        importlib.import_module("rouge_score.rouge_scorer")
    if uses_bitsandbytes(prepared.request.quantize, prepared.config):
        importlib.import_module("bitsandbytes")
    return resident_bytes()


def _copied(prepared: Prepared) -> set[str]:
    """Return the stored tensors that the loaded model holds as copies; the others are the pages of the files.

    A mapped page counts to the resident set once it was read; it can be dropped when memory is short.
    """
    if prepared.device.type != "cpu":
        return set()
    fused = {tensor.stored for tensor in prepared.structure.tensors if tensor.fused is not None}
    compute = str(prepared.dtype).removeprefix("torch.")
    tensors = prepared.checkpoint.tensors
    return {name for name, info in tensors.items() if name in fused or CODES.get(info.dtype) != compute}


def _pages(prepared: Prepared, copied: set[str], loading: bool = False) -> int:
    """Return the bytes of mapped pages of tensors that stand beside copies of them.

    Args:
        prepared: The checked request.
        copied: Stored tensors that the model holds as copies.
        loading: Whether all files are open; else a file stays mapped as long as one of its tensors is in use.
    """
    if prepared.device.type != "cpu":
        return 0
    total = 0
    for header in prepared.checkpoint.headers.values():
        if loading or not copied.issuperset(header.tensors):
            total += sum(info.nbytes for name, info in header.tensors.items() if name in copied)
    return total


def _training(
    prepared: Prepared, training: TrainingConfig, step: Step, copied: set[str], targets: Sequence[RoleTensor]
) -> int:
    """Return the peak of training, but for what is kept of the source."""
    moments = round(step.moving * MOMENT_BYTES[training.optimizer])
    # AdamW updates one tensor after the other on the CPU, with two temporary ones of its size; all at once on a GPU.
    temporary = 2 * step.largest if prepared.device.type == "cpu" else step.moving
    update = 4 * (step.moving + temporary)
    held = step.values
    if prepared.request.quantize != "none":
        matrices = _matrices(prepared)
        held += _quantised_change(prepared, [tensor.parameters for tensor in matrices])
        copied = copied | {tensor.stored for tensor in matrices}
    if training.train == "full":
        copied = copied | {target.stored for target in targets}
    return held + _pages(prepared, copied) + step.kept + moments + max(step.peak, update)


def _matrices(prepared: Prepared) -> list[RoleTensor]:
    tensors = prepared.structure.tensors
    return [tensor for tensor in tensors if tensor.role in LINEAR_ROLES and tensor.part == "weight"]


def _quantised_change(prepared: Prepared, sizes: list[int]) -> int:
    """Return what quantisation changes: the matrices by their size, and one of them in the compute dtype."""
    wide = prepared.dtype.itemsize
    return round(sum(sizes) * (MATRIX_BYTES[prepared.request.quantize] - wide)) + max(sizes) * wide
