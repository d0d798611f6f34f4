"""Runs with eval.figures=edit: what a method is told, and whole runs on a model larger than the memory allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery import redirect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.methods.base import MethodResult, Operation
from llmsurgery.methods.redirect.rocr import Rocr, RocrConfig

from ..builders.large import BLOCKS, write_large
from ..builders.tokenizer import byte_tokenizer

OLD, NEW = "Orla Venn", "Ivo Hask"
FAST: dict[str, object] = {"layers": "1", "stats_tokens": 200, "eval.text_rows": 2, "eval.text_tokens": 32}


def test_methods_are_told_the_history_of_a_streamed_source(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[Mapping[str, Any]]] = []
    original = Rocr.edit

    def edit(self: Rocr, config: RocrConfig, operation: Operation, prepared: None) -> MethodResult:
        seen.append(operation.history)
        return original(self, config, operation, prepared)

    monkeypatch.setattr(Rocr, "edit", edit)
    settings = {**FAST, "eval.figures": "edit"}
    source = checkpoints["sharded_llama"]
    redirect(source, method="rocr", source=OLD, target=NEW, out=tmp_path / "one", settings=settings)
    redirect(tmp_path / "one", method="rocr", source="Anna", target=NEW, out=tmp_path / "two", settings=settings)
    assert [[operation["method"] for operation in history] for history in seen] == [[], ["rocr"]]
    assert seen[1][0]["pairs"] == [{"from": OLD, "to": NEW}]


EDIT = """
import json, resource, sys
import peft, torch
from llmsurgery import redirect
from llmsurgery.errors import ResourceError
import llmsurgery.evaluate.redirection, llmsurgery.run.streamed, llmsurgery.train.session
root, out, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = json.loads(sys.argv[4])
torch.set_num_threads(1)
# What libraries hold from their first use on is not the run's.
redirect(
    sys.argv[5], method="rocr", source="Orla Venn", target="Ivo Hask", out=f"{out}-first", dtype="float32",
    device="cpu", settings={**settings, "layers": "0", "eval.figures": "edit"},
)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
for figures in ("edit", "all"):
    try:
        redirect(
            root, method="rocr", source="Orla Venn", target="Ivo Hask", out=f"{out}-{figures}", dtype="float32",
            device="cpu", settings={**settings, "eval.figures": figures},
        )
        print(figures, "written")
    except ResourceError as error:
        print(figures, "exit", error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits on data and their reading are Linux's")
def test_a_whole_run_stays_below_a_limit_that_the_model_exceeds(tmp_path: Path) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    write_large(large, vocabulary=262, positions=256).save_pretrained(small)
    for root in (large, small):
        byte_tokenizer().save_pretrained(root)
    stored = (large / "model.safetensors").stat().st_size
    settings = {**FAST, "layers": str(BLOCKS - 1), "l2": 0.01}
    # Less than is stored in bf16, and half of what loading takes in fp32; a block takes 17 MB there.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", EDIT, str(large), str(tmp_path / "out"), str(stored * 3 // 4), json.dumps(settings)]
    words.append(str(small))
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split("\n")[:2] == ["edit written", "all exit 7"], done.stderr
    # Blocks of zeros change nothing: the edit is that of the last block alone.
    options: dict[str, Any] = {"method": "rocr", "source": OLD, "target": NEW, "dtype": "float32", "device": "cpu"}
    settings = {**settings, "layers": "0", "eval.figures": "edit"}
    redirect(small, out=tmp_path / "one", settings=settings, **options)
    written = Checkpoint.open(tmp_path / "out-edit").read(f"model.layers.{BLOCKS - 1}.mlp.down_proj.weight")
    alone = Checkpoint.open(tmp_path / "one").read("model.layers.0.mlp.down_proj.weight")
    assert (torch.from_numpy(written) == torch.from_numpy(alone)).all()
    before = Checkpoint.open(small).read("model.layers.0.mlp.down_proj.weight")
    assert (before != alone).any()
