"""What depends on the device, as far as it shows without one: settings of torch, sizes of chunks, readings."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmsurgery.compute.device import peak_memory, repeatable_kernels
from llmsurgery.compute.head import CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS, chunk_rows

CARD = torch.device("cuda")


def settings() -> tuple[bool, bool, bool]:
    deterministic: Any = torch.utils.deterministic
    ordered, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return ordered, warned, deterministic.fill_uninitialized_memory


def test_ordered_kernels_are_on_for_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = settings()
    with repeatable_kernels(torch.device("cpu")):
        assert settings() == before

    def fail() -> None:
        with repeatable_kernels(CARD):
            assert settings() == (True, True, False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == before
    # What is set already stays.
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_more_logits_at_once_on_a_card() -> None:
    rows = [chunk_rows(SimpleNamespace(device=torch.device(name), shape=(2**15, 4))) for name in ("cpu", "cuda:1")]  # type: ignore[arg-type]
    assert rows == [CHUNK_ELEMENTS // 2**15, CUDA_CHUNK_ELEMENTS // 2**15]
    assert chunk_rows(SimpleNamespace(device=CARD, shape=(2**30, 4))) == 1  # type: ignore[arg-type]


def test_the_peak_is_that_of_the_busiest_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda card=0: (0, 700, 5)[card])
    assert peak_memory()["device_bytes"] == 700
