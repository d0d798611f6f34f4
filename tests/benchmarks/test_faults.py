"""A tenth of `make faults`: every fault is survived."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.faults.__main__ import GROUPS
from benchmarks.faults.kills import Stage
from benchmarks.faults.places import unlearn
from benchmarks.table.faults import faults as section
from llmsurgery.cli.app import run
from llmsurgery.data import template_bounds

pytestmark = [
    pytest.mark.xdist_group("faults"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has trained on a GPU cannot be forked"),
]
SHARES = {"weights": 0.3, "indexes": 0.3, "data": 0.3, "interrupts": 0.05, "recipes": 0.05}
"""What takes no time is tried more often, what takes much less often."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Tiny models, and undisturbed runs to compare with; what runs import is imported here, before any fork."""
    place = Stage(tmp_path_factory.mktemp("faults"))
    assert run([*unlearn(place.model, place.data, place.out()), "-q"]) == 0
    gc.freeze()
    return place


@pytest.mark.parametrize("name", GROUPS)
def test_nothing_is_lost(name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS", 0.5)
    tally = GROUPS[name](stage, SHARES.get(name, 0.1))
    assert not tally.lost
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.tried == sum(tally.seen.values()) > 0
    assert f"| {tally.name} |" in section({"rows": [tally.record()]})
