"""A LoRA adapter of peft on disk: its factors, found by the modules of the model that it was made for.

For every matrix that it adapts, W + s B A with A [r, inputs] and B [outputs, r], whatever the orientation in which W is
stored, and s = alpha / r, or alpha / sqrt(r) under rsLoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.checkpoint import Header, decode, encode, read_header, require_finite, storage_dtype
from llmsurgery.checkpoint.reader import opened, read_into
from llmsurgery.checkpoint.refuse import PICKLE_SUFFIXES
from llmsurgery.checkpoint.strict_json import read_object
from llmsurgery.errors import DamagedError, InputError, UnsupportedError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_CARRIED = (".json", ".jinja", ".txt", ".model")
# What only changes training, or says nothing of the weights, may have any value.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "alora_invocation_tokens": (None, []),
}

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter directory.

    Attributes:
        root: The directory.
        config: The parsed adapter_config.json.
        header: The header of its weights.
        names: Module -> names of A and B in that file.
    """

    root: Path
    config: Mapping[str, Any]
    header: Header
    names: Mapping[str, tuple[str, str]]

    @classmethod
    def open(cls, root: Path) -> Adapter:
        """Open an adapter; of its weights the header is read alone.

        Raises:
            UnsupportedError: It is a whole model, or an adapter of another kind than plain LoRA.
            InputError: It has no weights.
            DamagedError: One of its files is damaged.
        """
        if not (root / CONFIG).is_file():
            raise UnsupportedError(
                f"{str(root)!r} is no adapter",
                f"it has no {CONFIG}, and only an adapter can be taken apart from the model it was made for",
                "give the adapter's directory, or another method for a model with merged weights",
            )
        config = read_object(root / CONFIG, "adapter config")
        for key, plain in _PLAIN.items():
            if key in config and config[key] not in plain:
                raise UnsupportedError(
                    f"the adapter {str(root)!r} has {key}={config[key]!r}"[:200],
                    "only plain LoRA adapters are known: nothing but A and B of whole matrices",
                    "merge it into its base with peft, and give another method the merged model",
                )
        if not (root / WEIGHTS).is_file():
            _refuse_missing(root)
        header = read_header(root / WEIGHTS)
        return cls(root, config, header, _pairs(root, header))

    def read(self, module: str) -> tuple[Matrix, Matrix]:
        """Return A [r, inputs] and B [outputs, r] of a module, float64, without the scale."""
        first, second = (self._read(name) for name in self.names[module])
        return first, second

    def _read(self, name: str) -> Matrix:
        info = self.header.tensors[name]
        content = bytearray(info.nbytes)
        with opened(info.path) as (descriptor, _):
            read_into(descriptor, memoryview(content), info.start, info.path)
        raw = np.frombuffer(content, dtype=storage_dtype(info.dtype)).reshape(info.shape)
        require_finite(raw, info.dtype, name)
        return np.asarray(decode(raw, info.dtype), dtype=np.float64)

    def scale(self, module: str) -> float:
        """Return s of a module."""
        rank = self.header.tensors[self.names[module][0]].shape[0]
        alpha = float(self._setting("alpha_pattern", "lora_alpha", module))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _setting(self, patterns: str, default: str, module: str) -> Any:
        """Return a setting that patterns of module names may override, as peft reads them."""
        known: Mapping[str, Any] = self.config.get(patterns) or {}
        try:
            found = next((key for key in known if re.match(rf"(.*\.)?({key})$", module)), None)
            return self.config[default] if found is None else known[found]
        except (KeyError, re.error) as error:
            raise DamagedError(
                f"{str(self.root / CONFIG)!r} does not give the scale of {module}", f"{error!r}", "restore the file"
            ) from error

    def targets(self, structure: Structure, base: str) -> list[RoleTensor]:
        """Return the matrices of a base that it adapts, in the base's order.

        Args:
            structure: The base's roles.
            base: What the base is called in messages.

        Raises:
            InputError: The base has no such module, or one of another shape.
        """
        matrices = {
            tensor.module: tensor
            for tensor in structure.tensors
            if tensor.part == "weight" and len(tensor.shape) == 2 and tensor.fused is None and tensor.layer is not None
        }
        for module, (first, second) in self.names.items():
            target = matrices.get(module)
            if target is None:
                raise self._foreign(base, f"it has no matrix {module} in a block", structure)
            outputs, inputs = target.shape[::-1] if target.transposed else target.shape
            own = self.header.tensors[second].shape[0], self.header.tensors[first].shape[1]
            if own != (outputs, inputs):
                raise self._foreign(
                    base, f"{module} is {outputs} x {inputs} there and {own[0]} x {own[1]} in the adapter", structure
                )
        return [target for module, target in matrices.items() if module in self.names]

    def _foreign(self, base: str, why: str, structure: Structure) -> InputError:
        named = self.config.get("base_model_name_or_path")
        return InputError(
            f"the adapter {str(self.root)!r} is not for {base}",
            f"{why}, a {structure.family.name} model; the adapter names {named!r} as its base",
            "give the model that the adapter was trained on",
        )

    def weights_with(self, values: Mapping[str, Matrix]) -> bytes:
        """Return the file of its weights with some tensors replaced, every other byte as it was.

        Args:
            values: Name in the file -> values in the tensor's shape, rounded to the dtype that it is stored in.
        """
        content = bytearray((self.root / WEIGHTS).read_bytes())
        for name, array in values.items():
            info = self.header.tensors[name]
            content[info.start : info.end] = encode(np.ascontiguousarray(array), info.dtype).tobytes()
        return bytes(content)

    def side_files(self) -> dict[str, bytes]:
        """Return the files beside its weights that a copy needs: its config, a tokenizer."""
        own = (path for path in sorted(self.root.iterdir()) if path.is_file() and path.name.endswith(_CARRIED))
        return {path.name: path.read_bytes() for path in own if path.name != "surgery.json"}


def _pairs(root: Path, header: Header) -> dict[str, tuple[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, info in header.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or len(info.shape) != 2:
            raise UnsupportedError(
                f"tensor {name!r} of the adapter {str(root)!r} is no factor of a matrix",
                f"plain LoRA adapters hold {_PREFIX}MODULE.lora_A.weight and lora_B.weight alone",
                "merge it into its base with peft, and give another method the merged model",
            )
        found.setdefault(match["module"], {})[match["side"]] = name
    for module, sides in found.items():
        ranks = {header.tensors[name].shape[0 if side == "A" else 1] for side, name in sides.items()}
        if len(sides) != 2 or len(ranks) != 1:
            raise DamagedError(
                f"the factors of {module} in {str(root)!r} do not fit each other",
                "A is [r, inputs] and B [outputs, r]",
                "fetch the adapter again",
            )
    if not found:
        raise InputError(f"the adapter {str(root)!r} is empty", "its file holds no tensor", "fetch the adapter again")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _refuse_missing(root: Path) -> None:
    pickles = sorted(path.name for path in root.iterdir() if path.name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise UnsupportedError(
            f"{str(root)!r} holds its weights as a pickle file ({pickles[0]!r})",
            "a pickle runs code of its author when it is opened",
            "load it with peft inside a sandbox and save it with safe_serialization=True",
        )
    raise InputError(f"{str(root)!r} holds no weights", f"there is no {WEIGHTS}", "fetch the adapter again")


def low_rank(target: RoleTensor, first: Matrix, second: Matrix, scale: float) -> tuple[Matrix, Matrix]:
    """Return s B A as factors [rows, r] and [r, columns] in the orientation of the stored matrix.

    Args:
        target: The matrix.
        first: A.
        second: B.
        scale: s.
    """
    return (first.T, scale * second.T) if target.transposed else (scale * second, first)
