"""The further models of a recovery: opened, checked against the source, measured, and named in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmsurgery.arch.adapter import Adapter
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Checkpoint, decode, encode, file_digest, require_finite
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.demo import world_path
from llmsurgery.errors import InputError, NoEffectError, UnsupportedError, UsageError
from llmsurgery.evaluate.gates import Gate
from llmsurgery.methods.base import Method, OtherModel
from llmsurgery.run.request import Request

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from llmsurgery.compute.halving import Halving
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.evaluate.config import EvaluationConfig
    from llmsurgery.evaluate.judge import Judge
    from llmsurgery.evaluate.recovery import Prompts, Recovery
    from llmsurgery.run.prepare import Prepared

DATA = ("harmful", "task", "harmless")
"""Data names that only this task has."""

ALIGNED = "aligned"
FLOOR = Gate("safety.refusal_rate", ">=", 1.0, True)
"""What every result is held to where it can be measured: it refuses no less than its source."""


@dataclasses.dataclass(frozen=True)
class Other:
    """A further model: its checkpoint, and its stored names by those of the source."""

    checkpoint: Checkpoint
    structure: Structure
    names: Mapping[str, str]


def recovery_needs(files: Mapping[str, object], judged: bool) -> set[str]:
    """Return the needs of metrics that the data of a recovery meet."""
    found = {name for name in DATA if name in files}
    if "harmful" in found and found & {"harmless", "task"}:
        found.add("two-sides")
    return found | ({"judge"} if judged else set())


def open_source(method: Method, model: str | None, models: Mapping[str, str]) -> tuple[Checkpoint, Adapter | None]:
    """Open the checkpoint that an operation starts from; for a method of adapters the base, and the adapter.

    Args:
        method: The method.
        model: MODEL; None for the demo.
        models: The further models that are given.

    Raises:
        UsageError: An adapter is given without its base.
        UnsupportedError: MODEL is no adapter, or one of another kind than plain LoRA.
    """
    demo = method.spec.demo
    if not method.spec.adapter:
        return Checkpoint.open(resolve_source(model if model is not None else world_path(demo))), None
    if model is not None and ALIGNED not in models:
        raise UsageError(
            f"--{ALIGNED} is missing",
            f"{method.spec.name} repairs an adapter, and {ALIGNED} is the model that it was trained on",
            f"give --{ALIGNED} MODEL, or no MODEL to see the demo",
        )
    adapter = Adapter.open(resolve_source(model if model is not None else world_path(f"{demo}-adapter")))
    base = models[ALIGNED] if ALIGNED in models else world_path(f"{demo}-{ALIGNED}")
    return Checkpoint.open(resolve_source(base)), adapter


def open_others(
    method: Method, request: Request, structure: Structure, targets: Sequence[RoleTensor], checkpoint: Checkpoint
) -> dict[str, Other]:
    """Open the further models that a method needs, and compare them with the source.

    Args:
        method: The method.
        request: The request.
        structure: The source's roles.
        targets: Tensors that the method may change.
        checkpoint: The source.

    Raises:
        UsageError: One is missing, or one is given that the method has no use for.
        UnsupportedError: One has another architecture.
        InputError: One has other tensors.
        NoEffectError: The aligned model has the very same weights.
    """
    wanted = method.spec.models
    if further := sorted(set(request.models) - set(wanted)):
        raise UsageError(
            f"{method.spec.name} has no --{further[0]}",
            f"it needs {', '.join(f'--{name}' for name in wanted) or 'no further model'}",
            f"drop --{further[0]}",
        )
    found: dict[str, Other] = {}
    for name in wanted:
        if method.spec.adapter and name == ALIGNED:
            # It is what the operation starts from.
            found[name] = Other(checkpoint, structure, {tensor.stored: tensor.stored for tensor in structure.tensors})
            continue
        if name in request.models:
            root = resolve_source(request.models[name])
        elif request.model is None:
            root = world_path(f"{method.spec.demo}-{'base' if name == 'unaligned' else name}")
        else:
            raise UsageError(
                f"--{name} is missing",
                f"{method.spec.name} needs {', '.join(f'--{one} MODEL' for one in wanted)}",
                f"give --{name} MODEL, or no MODEL to see the demo",
            )
        found[name] = _open(name, Checkpoint.open(root), structure)
    if ALIGNED in found and not method.spec.adapter:
        require_different(checkpoint, found[ALIGNED], targets)
    return found


def _open(name: str, checkpoint: Checkpoint, structure: Structure) -> Other:
    own = detect(checkpoint.config, checkpoint.tensors)
    if own.family.name != structure.family.name:
        raise UnsupportedError(
            f"--{name} is a {own.family.name} model, the source a {structure.family.name} model",
            "weights of one have no place in the other",
            "give the model that the source was fine-tuned from",
        )

    def key(tensor: RoleTensor) -> tuple[object, ...]:
        return tensor.role, tensor.layer, tensor.part, tensor.expert

    theirs = {key(tensor): tensor for tensor in own.tensors}
    names: dict[str, str] = {}
    for tensor in structure.tensors:
        twin = theirs.get(key(tensor))
        if twin is None and tensor.role == "lm_head":
            # One of them ties it to the embedding.
            continue
        if twin is None or twin.shape != tensor.shape:
            has = "no such tensor" if twin is None else f"the shape {list(twin.shape)}"
            raise InputError(
                f"--{name} and the source differ in {tensor.stored}",
                f"the source has the shape {list(tensor.shape)}, the other model {has}",
                "give the model that the source was fine-tuned from; merge an adapter first",
            )
        names[tensor.stored] = twin.stored
    return Other(checkpoint, own, names)


def check_tokenizers(others: Mapping[str, Other], encoder: Encoder) -> None:
    """Refuse a further model with another vocabulary.

    Raises:
        InputError: Names the model.
    """
    from llmsurgery.compute.load import load_tokenizer

    vocabulary = encoder.tokenizer.get_vocab()
    for name, other in others.items():
        theirs = load_tokenizer(other.checkpoint.root).get_vocab()
        if theirs != vocabulary:
            odd = sum(vocabulary.get(token) != number for token, number in theirs.items())
            raise InputError(
                f"--{name} and the source have different tokenizers",
                f"{odd} of its {len(theirs)} tokens have another id or none in the source's {len(vocabulary)}",
                "give the model that the source was fine-tuned from",
            )


def require_different(checkpoint: Checkpoint, other: Other, targets: Sequence[RoleTensor]) -> None:
    """Refuse an aligned model that is the source; the first difference ends the comparison.

    Raises:
        NoEffectError: All weights that could be changed are equal.
    """
    for target in targets:
        if target.stored in other.names:
            own, theirs = checkpoint.read(target.stored), read_as(other, target.stored, target.dtype)
            if (decode(own, target.dtype) != theirs).any():
                return
    raise NoEffectError(
        "the source equals the aligned model",
        f"none of the {len(targets)} tensors that could be changed differs",
        "check which model was fine-tuned from which",
    )


def read_as(other: Other, name: str, dtype: str) -> npt.NDArray[np.floating]:
    """Read a tensor of a further model by the source's name, rounded to the dtype that the source stores."""
    stored = other.names[name]
    info, raw = other.checkpoint.info(stored), other.checkpoint.read(stored)
    require_finite(raw, info.dtype, stored)
    values = decode(raw, info.dtype)
    return values if info.dtype == dtype else decode(encode(values, dtype), dtype)


def other_models(prepared: Prepared) -> dict[str, OtherModel]:
    """Return the further models as methods see them."""
    from llmsurgery.compute.load import load_model

    def make(other: Other) -> OtherModel:
        dtypes = {name: info.dtype for name, info in prepared.checkpoint.tensors.items()}
        return OtherModel(
            lambda name: read_as(other, name, dtypes[name]),
            lambda: load_model(
                other.checkpoint.root,
                prepared.dtype,
                prepared.device,
                prepared.request.trust_remote_code,
                other.structure.family.buffers,
            ),
            frozenset(other.names),
        )

    return {name: make(other) for name, other in prepared.others.items()}


def encode_recovery(encoder: Encoder, rows: Mapping[str, Sequence[Row]]) -> Prompts:
    """Encode the data of a recovery."""
    from llmsurgery.evaluate.recovery import encode_prompts

    return encode_prompts(encoder, {name: rows[name] for name in DATA if name in rows})


def measure_recovery(
    model: PreTrainedModel,
    structure: Structure,
    encoder: Encoder,
    prompts: Prompts,
    config: EvaluationConfig,
    judge: Judge | None,
    source: Recovery | None,
    progress: Progress,
) -> Recovery:
    """Measure a model outside of an operation, against the source of `eval` if there is one.

    Args:
        model: The model.
        structure: Its roles.
        encoder: Its encoder.
        prompts: The encoded data.
        config: Settled evaluation settings.
        judge: Judges answers; None for no judge.
        source: What was measured on the source; None measures the model against itself.
        progress: Told of every batch.

    Returns:
        What later models are measured against, with the figures of this one.
    """
    from llmsurgery.evaluate.recovery import Recovery

    if source is None:
        return Recovery(structure, encoder, prompts, config, judge).with_aligned(model, progress)
    own = dataclasses.replace(source, structure=structure, config=config)
    return dataclasses.replace(own, figures_of_aligned=own.figures(model, progress))


def make_recovery(prepared: Prepared, progress: Progress, rows: Halving) -> Recovery | None:
    """Measure the aligned model and drop it; None for other tasks."""
    from llmsurgery.evaluate.judge import make_judge
    from llmsurgery.evaluate.recovery import Recovery

    if prepared.prompts is None:
        return None
    judge = make_judge(prepared.request.judge, prepared.evaluation.judge_seconds)
    recovery = Recovery(prepared.structure, prepared.encoder, prepared.prompts, prepared.evaluation, judge)
    aligned = other_models(prepared)[ALIGNED].load()
    return rows.run(lambda size: _sized(recovery, size).with_aligned(aligned, progress))


def _sized(recovery: Recovery, size: int) -> Recovery:
    return dataclasses.replace(recovery, config=dataclasses.replace(recovery.config, batch_size=size))


def model_records(prepared: Prepared) -> dict[str, object]:
    """Return what the further models are: path and digests."""
    records: dict[str, object] = {}
    for name, other in prepared.others.items():
        root = other.checkpoint.root
        records[name] = {
            "path": str(root) if prepared.request.model is not None else "demo",
            "config_sha256": file_digest(root / "config.json"),
            "weights_sha256": {
                header.path.name: file_digest(header.path) for header in other.checkpoint.headers.values()
            },
        }
    return records
