"""What lets a run fit on its card: quantised weights for training, and rows per forward that halve."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import TYPE_CHECKING

from llmsurgery.compute.progress import Progress
from llmsurgery.errors import UnsupportedError, UsageError, unknown_name
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.methods.base import Method
from llmsurgery.train.config import TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import Structure
    from llmsurgery.compute.halving import Halving
    from llmsurgery.run.prepare import Prepared

AUTO = "auto"
MODES = ("none", "int8", "nf4")


def parse_batch_size(given: int | str | None) -> int | str | None:
    """Return rows per forward as a number, "auto" or None.

    Raises:
        UsageError: It is neither a positive number nor "auto".
    """
    if given is None or given == AUTO:
        return given
    try:
        number = int(given)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"--batch-size {given} does not fit", "it is a number of rows from 1 up, or auto", "")
    return number


def check_quantize(mode: str, method: Method, config: object, structure: Structure) -> None:
    """Refuse quantised weights where they cannot serve.

    Args:
        mode: "none", "int8" or "nf4".
        method: The method.
        config: Its resolved config.
        structure: The checkpoint's roles.

    Raises:
        UsageError: An unknown mode, a method that does not train, or training of the weights themselves.
        UnsupportedError: bitsandbytes is not there, or the model has nothing that can be quantised.
    """
    training = getattr(config, "training", None)
    full = not isinstance(training, TrainingConfig) or training.train == "full"
    if mode not in MODES:
        raise unknown_name("value of --quantize", mode, MODES)
    if mode != "none" and not method.spec.trained:
        raise no_quantize(method)
    if mode != "none" and full:
        raise UsageError(
            f"--quantize {mode} does not go with training of the weights themselves",
            "quantised weights cannot move: steps are far smaller than the distance of their values",
            "train adapters (--set train=lora), or drop --quantize"
            if isinstance(training, TrainingConfig)
            else "drop --quantize",
        )
    if uses_bitsandbytes(mode, config):
        from llmsurgery.compute.quantised import import_bitsandbytes, quantisable

        import_bitsandbytes()
        if mode != "none":
            quantisable(structure)


def no_quantize(method: Method) -> UsageError:
    """Return the error of a method that has no use for quantised weights."""
    why = "it scores the weights themselves" if method.spec.recovers else "it does not train"
    return UsageError(f"{method.spec.name} has no --quantize", why, "drop --quantize")


def check_dtypes(method: Method, structure: Structure, asked: str, computed: torch.dtype) -> None:
    """Refuse dtypes that the result of a method does not fit into.

    Args:
        method: The method.
        structure: The roles.
        asked: The option --dtype.
        computed: What it stands for on this device.

    Raises:
        UnsupportedError: The checkpoint is stored in such a dtype, or would be computed in it.
    """
    codes = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    for name in method.spec.refuses:
        stored = [tensor for tensor in structure.tensors if tensor.dtype == codes[name]]
        if stored:
            raise UnsupportedError(
                f"tensor {stored[0].stored} is stored as {name}",
                f"the result of {method.spec.name} holds values beyond its range, which would become infinite",
                "store the model as float32 or bfloat16 first (`from_pretrained(..., dtype=torch.float32)`, then "
                "`save_pretrained`)",
            )
        if str(computed).removeprefix("torch.") == name:
            raise UnsupportedError(
                f"--dtype {asked} means {name} here",
                f"the result of {method.spec.name} holds values beyond its range, which would become infinite",
                "use --dtype float32 or --dtype bfloat16",
            )


def uses_bitsandbytes(mode: str, config: object) -> bool:
    """Whether a run needs bitsandbytes: for quantised weights or for 8-bit moments."""
    training = getattr(config, "training", None)
    return mode != "none" or (isinstance(training, TrainingConfig) and training.optimizer == "adamw8bit")


def bitsandbytes_version(prepared: Prepared) -> dict[str, str]:
    """Return the version of bitsandbytes by its name, nothing if the run does not use it."""
    used = uses_bitsandbytes(prepared.request.quantize, prepared.config)
    return {"bitsandbytes": version("bitsandbytes")} if used else {}


def scoring_rows(evaluation: EvaluationConfig, batch_size: int | str | None, progress: Progress) -> Halving:
    """Return the rows per forward of scoring, which halve under "auto"."""
    from llmsurgery.compute.halving import Halving

    return Halving(evaluation.batch_size, batch_size == AUTO, progress.notice)


def settled(prepared: Prepared, rows: Halving, record: dict[str, object]) -> Prepared:
    """Return the request as it can be repeated: with the numbers of rows that "auto" found.

    Args:
        prepared: The checked request.
        rows: Rows per forward of scoring.
        record: The method's record, with the micro-batch of training.
    """
    if not rows.automatic:
        return prepared
    found = record.get("micro_batch")
    return dataclasses.replace(
        prepared,
        request=dataclasses.replace(prepared.request, batch_size=found if isinstance(found, int) else None),
        evaluation=dataclasses.replace(prepared.evaluation, batch_size=rows.size),
    )


def load_for_training(prepared: Prepared) -> PreTrainedModel:
    """Load the model that is trained: quantised if that was asked for."""
    from llmsurgery.compute.load import load_model
    from llmsurgery.compute.quantised import load_quantised

    request, structure = prepared.request, prepared.structure
    place = (prepared.dtype, prepared.device, request.trust_remote_code)
    if request.quantize == "none":
        return load_model(prepared.checkpoint.root, *place, structure.family.buffers)
    return load_quantised(prepared.checkpoint.root, request.quantize, structure, *place)
