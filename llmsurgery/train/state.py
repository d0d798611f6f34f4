"""The state of a training run on disk: enough to go on after a kill with the same bytes as without it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llmsurgery.checkpoint.oserrors import writing
from llmsurgery.checkpoint.target import sync_directory
from llmsurgery.errors import DamagedError

FORMAT = "1"


@dataclass(frozen=True)
class State:
    """One point of a training run.

    Attributes:
        facts: JSON values: step, losses, orders of rows, whether it is the end.
        tensors: Parameters, moments of the optimizer, states of the generators.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class StateStore:
    """A directory of states, one file per call of `train`, each replaced as a whole.

    Args:
        folder: The directory; it is made when the first state is saved.
        settings: What of the run may differ when it goes on (the step size), for the record.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object] | None = None) -> None:
        self.folder = folder
        self.settings = dict(settings or {})

    def _path(self, stage: int) -> Path:
        return self.folder / f"training-{stage}.safetensors"

    def load(self, stage: int) -> State | None:
        """Return the last state of a stage, None if it has none.

        Raises:
            DamagedError: The file is there but cannot be read.
        """
        path = self._path(stage)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["state"])
                return State(facts, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            # A state is renamed into place when it is complete, so this is the disk's doing or someone else's.
            raise DamagedError(
                f"the kept state {path} cannot be read", str(error), "start anew with --force in place of --resume"
            ) from error

    def save(self, stage: int, state: State) -> None:
        """Replace the state of a stage; a kill at any moment leaves the old or the new one.

        Raises:
            ResourceError: The disk is full or fails.
        """
        path = self._path(stage)
        temporary = path.with_suffix(".tmp")
        with writing(path):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            save_file(tensors, temporary, {"state": json.dumps(state.facts), "format": FORMAT})
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        sync_directory(self.folder)

    def steps(self) -> int:
        """Return the number of steps that the kept states hold, all stages together; 0 without a state."""
        return sum(int(state.facts["step"]) for stage in range(64) if (state := self.load(stage)) is not None)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of an optimizer as named tensors and plain values.

    Args:
        optimizer: Any torch optimizer whose state per parameter holds tensors and plain values.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` returned; step sizes stay as they are."""
    state: dict[int, dict[str, Any]] = {}
    named = {name.removeprefix("optimizer."): value for name, value in tensors.items() if name.startswith("optimizer.")}
    for name, value in {**named, **plain}.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def generator_states() -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Return the states of torch's, numpy's and Python's global generators."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = np.asarray(keys, dtype=np.int64)
    tensors = {"generator.torch": torch.get_rng_state(), "generator.numpy": torch.from_numpy(words)}
    for index in range(torch.cuda.device_count()):
        tensors[f"generator.cuda.{index}"] = torch.cuda.get_rng_state(index)
    return tensors, [pack_random(random), [str(name), int(position), int(has_gauss), float(cached)]]


def restore_generators(tensors: Mapping[str, torch.Tensor], plain: list[Any]) -> None:
    """Put back what `generator_states` returned."""
    torch.set_rng_state(tensors["generator.torch"])
    for name, tensor in tensors.items():
        if name.startswith("generator.cuda."):
            torch.cuda.set_rng_state(tensor, int(name.rpartition(".")[2]))
    python, (name, position, has_gauss, cached) = plain
    keys = tensors["generator.numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    unpack_random(random, python)


def pack_random(source: Any) -> list[Any]:
    """Return the state of a `random.Random`, or of the module, as JSON values."""
    version, numbers, gauss = source.getstate()
    return [version, list(numbers), gauss]


def unpack_random(target: Any, packed: list[Any]) -> None:
    """Put back what `pack_random` returned."""
    version, numbers, gauss = packed
    target.setstate((version, tuple(numbers), gauss))
