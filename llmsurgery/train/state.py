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
from llmsurgery.errors import DamagedError, ResourceError

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
        return self._read(path) if path.is_file() else None

    def _read(self, path: Path, whole: bool = True) -> State:
        """Read a state, or its facts alone."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["state"])
                names = file.keys() if whole else ()
                return State(facts, {name: file.get_tensor(name) for name in names})
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
            try:
                save_file(_unshared(state.tensors), temporary, {"state": json.dumps(state.facts), "format": FORMAT})
                with temporary.open("rb") as stream:
                    os.fsync(stream.fileno())
                temporary.replace(path)
            except SafetensorError as error:
                fix = "free some space, or choose a target on another disk with -o"
                raise ResourceError(f"cannot write {str(path)!r}", str(error), fix) from error
            finally:
                temporary.unlink(missing_ok=True)
        sync_directory(self.folder)

    def rows(self, stage: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Return some rows of a tensor in the state of a stage, without reading the others."""
        with safe_open(self._path(stage), "pt") as file:
            values: torch.Tensor = file.get_slice(name)[start:stop]
        return values

    def clear(self) -> None:
        """Remove the states of all stages."""
        for path in self.folder.glob("training-*"):
            path.unlink()

    def steps(self) -> int:
        """Return the number of steps that the kept states hold, all stages together; 0 without a state."""
        states = [self._read(path, whole=False) for path in self.folder.glob("training-*.safetensors")]
        return sum(int(state.facts["step"]) for state in states)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors on the CPU, each with memory of its own: 8-bit moments share one table of values."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


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
