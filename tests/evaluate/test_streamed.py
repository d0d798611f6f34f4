"""Figures of a model that is read block by block are those of the loaded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.load import load_model
from llmsurgery.compute.progress import Silent
from llmsurgery.compute.stream import StreamedModel
from llmsurgery.data.records import read_rows
from llmsurgery.evaluate.config import EvaluationConfig
from llmsurgery.evaluate.encode import encode_data
from llmsurgery.evaluate.figures import measure
from llmsurgery.evaluate.likelihood import score_rows
from llmsurgery.run.encoding import make_encoder

CPU = torch.device("cpu")


def both(root: Path) -> tuple[Any, StreamedModel]:
    checkpoint = Checkpoint.open(root)
    structure = detect(checkpoint.config, checkpoint.tensors)
    return load_model(root, torch.float32, CPU), StreamedModel.open(root, structure, torch.float32, CPU)


@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2", "gemma2", "deepseek_v3"])
def test_all_figures_are_the_same(architecture: str, checkpoints: dict[str, Path], data_files: dict[str, Path]) -> None:
    root = checkpoints[architecture]
    encoder = make_encoder(Checkpoint.open(root))
    rows = {name: read_rows(path) for name, path in data_files.items()}
    config = EvaluationConfig(batch_size=2, generation_tokens=5)
    data = encode_data(encoder, {"forget": rows["forget"], "retain": rows["retain"]}, rows["text"], config)
    loaded, streamed = both(root)
    found, wanted = (
        measure(model, encoder, data, config, Silent(), keep_reference=True) for model in (streamed, loaded)
    )
    assert found.answers == wanted.answers
    assert found.figures.keys() == wanted.figures.keys()
    for name, figure in wanted.figures.items():
        other = found.figures[name]
        assert other.n == figure.n
        assert other.value == pytest.approx(figure.value, rel=1e-5), name
        assert (other.interval is None) == (figure.interval is None)
        assert (other.interval or ()) == pytest.approx(figure.interval or (), rel=1e-5), name
    generation = streamed.model.generation_config
    assert generation is not None
    assert generation.max_new_tokens is None
    # The source's distributions, loaded, against the streamed model: no divergence.
    after = measure(streamed, encoder, data, config, Silent(), reference=wanted.reference)
    assert after.figures["utility.kl"].number == pytest.approx(0, abs=1e-6)


def test_windows_read_the_blocks_again_and_change_nothing(
    checkpoints: dict[str, Path], data_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkpoints["tied_llama"]
    encoder = make_encoder(Checkpoint.open(root))
    rows = [encoder.encode(row) for row in read_rows(data_files["forget"])]
    loaded, streamed = both(root)
    wanted = score_rows(loaded, rows, encoder.pad_id, 1, Silent(), "scoring")
    assert streamed.blocks_read == 0
    for calls, reads in ((3, 2), (2, 4), (1, 6)):
        monkeypatch.setattr("llmsurgery.compute.stream.WINDOW_CALLS", calls)
        before = streamed.blocks_read
        found = score_rows(streamed, rows, encoder.pad_id, 1, Silent(), "scoring")
        assert streamed.blocks_read - before == reads
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
