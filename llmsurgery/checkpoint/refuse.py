"""Refuse checkpoints that are whole but of a kind whose bytes cannot be edited, and say the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmsurgery.checkpoint.dtypes import NARROW
from llmsurgery.checkpoint.header import TensorInfo
from llmsurgery.errors import InputError, UnsupportedError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_SUFFIXES = (".gguf", ".msgpack", ".h5", ".onnx")

# Last parts of tensor names that only GPTQ, AWQ, bitsandbytes, FP8 and compressed-tensors checkpoints hold.
_QUANTISED_PARTS = frozenset({
    "qweight", "qzeros", "scales", "absmax", "nested_absmax", "quant_map", "nested_quant_map", "SCB",
    "weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "weight_scale_2",
})  # fmt: skip

_DEQUANTISE = (
    "use the unquantised checkpoint it was made from, or load it once with transformers, call dequantize() and save it "
    "with save_pretrained(DIR, safe_serialization=True)"
)


def refuse_adapter(root: Path) -> None:
    """Refuse an adapter directory, which holds no model of its own.

    Raises:
        UnsupportedError: Always.
    """
    raise UnsupportedError(
        f"{str(root)!r} is an adapter, not a model",
        "it holds adapter_config.json but no weights and config of a whole model",
        "merge it into its base once with peft (merge_and_unload(), then save_pretrained) and give that directory",
    )


def refuse_missing_weights(root: Path, names: Iterable[str]) -> None:
    """Refuse a directory without safetensors files, with the reason that fits what else lies there.

    Args:
        root: The directory.
        names: The file names in it.

    Raises:
        UnsupportedError: The weights are pickles or in another program's format.
        InputError: There are no weights at all.
    """
    names = sorted(names)
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES) and name != "training_args.bin"]
    if pickles:
        raise UnsupportedError(
            f"{str(root)!r} holds its weights as pickle files only ({', '.join(map(repr, pickles[:3]))})",
            "a pickle runs code of its author when it is opened, and its bytes cannot be edited in place",
            "load it once with transformers inside a sandbox and call save_pretrained(DIR, safe_serialization=True)",
        )
    others = [name for name in names if name.lower().endswith(OTHER_SUFFIXES)]
    if others:
        raise UnsupportedError(
            f"{str(root)!r} holds no safetensors files, only {', '.join(map(repr, others[:3]))}",
            "this format cannot be edited in place",
            "convert it to safetensors, or give a .gguf file itself as the model",
        )
    raise InputError(
        f"{str(root)!r} holds no weights",
        "there is neither model.safetensors nor model.safetensors.index.json",
        "fetch the weights, or give the directory that holds them",
    )


def refuse_quantised(root: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a quantised checkpoint, by its configuration or by what its tensors are.

    Args:
        root: The directory.
        config: The parsed config.json.
        tensors: The tensors by name.

    Raises:
        UnsupportedError: The checkpoint is quantised.
    """
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    why = ""
    for section in sections:
        settings = section.get("quantization_config") or section.get("compression_config")
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            why = f"config.json has a quantization_config{f' ({method})' if isinstance(method, str) else ''}"
            break
    else:
        info = next((info for info in tensors.values() if _is_quantised(info)), None)
        if info is not None:
            why = f"tensor {info.name!r} of dtype {info.dtype} belongs to a quantised weight"
    if why:
        raise UnsupportedError(f"{str(root)!r} is a quantised checkpoint", why, _DEQUANTISE)


def _is_quantised(info: TensorInfo) -> bool:
    last = info.name.rpartition(".")[2]
    # MXFP4 experts: blocks of two 4-bit numbers per byte beside one exponent byte each.
    packed_experts = info.dtype == "U8" and last.endswith(("_blocks", "_scales"))
    return info.dtype in NARROW or last in _QUANTISED_PARTS or ".quant_state." in info.name or packed_experts
