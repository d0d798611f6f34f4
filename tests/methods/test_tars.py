"""TARS: the specification's numbers, a planted row, exact edits, several concepts, earlier runs, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmsurgery
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.angles import changed_row, cosines, refine_by_head, refine_by_noise
from llmsurgery.compute.load import load_tokenizer
from llmsurgery.data.chat import Encoder
from llmsurgery.data.concepts import make_concept, words_with
from llmsurgery.data.pairs import Pair
from llmsurgery.errors import InputError, UsageError
from llmsurgery.methods.redirect.tars import TarsConfig, places

from ..builders.tokenizer import byte_tokenizer

UP, GATE = (f"model.layers.1.mlp.{side}_proj.weight" for side in ("up", "gate"))
V = torch.tensor([0.6, 0.8, 0, 0])
ROWS = torch.tensor([[0.3, 0.4, 0, 0], [0, 0, -2, 0], [0, 0, 0, 0.01]])
FAST: dict[str, object] = {"eval.generate": False}


def test_worked_numbers() -> None:
    assert cosines(ROWS, V).tolist() == pytest.approx([1, 0, 0], abs=1e-7)
    reversed_row = changed_row(ROWS[0], V, "reverse")
    assert reversed_row.tolist() == pytest.approx([-0.3, -0.4, 0, 0], abs=1e-7)
    x, row = 2 * V.double(), ROWS[0].double()

    def hidden(gate: torch.Tensor, up: torch.Tensor) -> float:
        return float(torch.nn.functional.silu(gate @ x) * (up @ x))

    assert hidden(row, row) == pytest.approx(0.731059, abs=1e-6)
    assert hidden(row, reversed_row) == pytest.approx(-0.731059, abs=1e-6)
    assert hidden(reversed_row, reversed_row) == pytest.approx(0.268941, abs=1e-6)


def test_softer_modes() -> None:
    row = torch.tensor([1.0, 2, 3, 4])
    assert changed_row(row, V, "zero").tolist() == [0, 0, 0, 0]
    projected = changed_row(row, 5 * V, "project")
    assert float(projected @ V.double()) == pytest.approx(0, abs=1e-6)
    assert projected[2:].tolist() == [3, 4]
    assert cosines(torch.zeros(1, 4), V).item() == 0


def test_refining_reaches_the_probability_that_is_asked_for() -> None:
    draw = torch.Generator().manual_seed(0)
    head, v = torch.randn(50, 16, generator=draw), torch.randn(16, generator=draw)

    def chance(vector: torch.Tensor) -> float:
        return float((head @ vector).softmax(0)[7])

    refined, amount = refine_by_head(v, head, 7, 0.9)
    assert amount > 0
    assert chance(refined) == pytest.approx(0.9, abs=1e-4)
    assert refine_by_head(refined, head, 7, 0.5) == (refined, 0.0)
    noisy, taken = refine_by_noise(v, head, 7, 0.9, 0.3, 2000, 0)
    assert taken > 0
    assert chance(noisy) >= 0.9
    assert torch.equal(noisy, refine_by_noise(v, head, 7, 0.9, 0.3, 2000, 0)[0])
    # A token whose row is the mean of others can never be the surest.
    head[7] = head[:7].mean(0)
    stuck, _ = refine_by_head(v, head, 7, 0.999)
    assert chance(stuck) >= chance(v)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 Llama with a separate head, whose row up 1:5 is a multiple of the head's row for "q"."""
    root = tmp_path_factory.mktemp("planted") / "model"
    from transformers import LlamaForCausalLM

    from ..builders.llama import llama_config
    from ..builders.saving import save

    torch.manual_seed(5)
    save(LlamaForCausalLM(llama_config(tied=False)), root, torch.float32)
    tensors = load_file(root / "model.safetensors")
    tensors[UP][5] = 0.7 * tensors["lm_head.weight"][token_of("q")]
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def token_of(symbol: str) -> int:
    return int(byte_tokenizer()(symbol)["input_ids"][0])


def pairs_file(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_tars(model: Path, out: Path, data: Path | None = None, **settings: object) -> dict[str, Any]:
    options: Any = {"pairs": data} if data else {"source": "q"}
    outcome = llmsurgery.redirect(model, method="tars", out=out, settings={**FAST, **settings}, **options)
    return dict(outcome.manifest)


def record_of(manifest: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = manifest["operations"][0]["record"]
    return record


def test_a_planted_row_is_the_first_and_only_one_that_changes(planted: Path, tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}"]})
    manifest = run_tars(planted, tmp_path / "out", data, n_edits=1)
    record = record_of(manifest)
    (row,) = record["rows"]
    assert (row["tensor"], row["row"], row["side"], row["layer"], row["neuron"]) == (UP, 5, "up", 1, 5)
    assert row["tokens"][0] == "q"
    assert row["cos"] > 0.3
    assert record["concepts"][0]["p"]["refined"] >= 0.989
    old, new = (load_file(root / "model.safetensors") for root in (planted, tmp_path / "out"))
    before, after = old[UP][5].double(), new[UP][5].double()
    assert float(after.norm() / before.norm()) == pytest.approx(1, abs=1e-6)
    assert float(cosines(before[None], after)) == pytest.approx(-row["cos"], abs=1e-6)
    changed = {name: (old[name] != new[name]).nonzero() for name in old if not torch.equal(old[name], new[name])}
    assert list(changed) == [UP]
    assert set(changed[UP][:, 0].tolist()) == {5}
    assert manifest["export"] == "plain"
    assert set(manifest["metrics"]) >= {"concept.prob", "utility.kl"}
    llmsurgery.verify(tmp_path / "out", base=planted)


def test_the_direction_is_the_opposite_of_the_new_row(planted: Path, tmp_path: Path) -> None:
    # v = W[t] itself: with refine=head and p_stop next to 1 the head's row is nearly all of it.
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}"]})
    manifest = run_tars(planted, tmp_path / "out", data, n_edits=1, p_stop=1.0)
    (row,) = record_of(manifest)["rows"]
    assert row["neuron"] == 5
    head = load_file(planted / "model.safetensors")["lm_head.weight"]
    new = load_file(tmp_path / "out" / "model.safetensors")[UP][5]
    assert float(cosines(new[None], head[token_of("q")] - head.mean(0))) < -0.9


def test_what_all_final_states_share_is_no_part_of_the_direction(planted: Path, tmp_path: Path) -> None:
    # Every embedding gets the same large part, and another row reads that.
    root = shutil.copytree(planted, tmp_path / "model")
    tensors = load_file(root / "model.safetensors")
    shared = torch.randn(tensors[UP].shape[1], generator=torch.Generator().manual_seed(1))
    tensors["model.embed_tokens.weight"] += 5 * shared
    tensors[UP][7] = shared * tensors["model.norm.weight"]
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}"]})
    records = {}
    for centre in (True, False):
        manifest = run_tars(root, tmp_path / str(centre), data, n_edits=1, p_stop=0.2, centre=centre)
        records[centre] = record_of(manifest)
    assert [records[centre]["rows"][0]["neuron"] for centre in (True, False)] == [5, 7]
    assert records[True]["concepts"][0]["shared"] > 0.5
    assert "shared" not in records[False]["concepts"][0]


def test_rows_are_doubled_until_the_concept_is_gone(planted: Path, tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}", "say {}", "one {} two"]})
    manifest = run_tars(planted, tmp_path / "out", data, goal=0.0, max_edits=5)
    concept = record_of(manifest)["concepts"][0]
    assert [test["rows"] for test in concept["tests"]] == [1, 2, 4, 5]
    assert concept["prompts"] == {"direction": 2, "test": 1, "given": True}
    assert len(record_of(manifest)["rows"]) == 5
    assert any("the goal was 0" in notice for notice in manifest["notices"])
    again = run_tars(planted, tmp_path / "again", data, goal=1.0)
    assert [test["rows"] for test in record_of(again)["concepts"][0]["tests"]] == [1]


def test_a_turned_row_is_refused_skipped_or_turned_again(planted: Path, tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}"]})
    # All 64 rows of one matrix, so that the turned one, now the last of them, is among them.
    run_tars(planted, tmp_path / "one", data, n_edits=1)
    first = {"n_edits": 64, "sides": "up", "layers": "1"}
    with pytest.raises(UsageError, match="was turned before, for 'q'"):
        run_tars(tmp_path / "one", tmp_path / "two", data, **first)
    assert not (tmp_path / "two").exists()
    skipped = record_of(run_tars(tmp_path / "one", tmp_path / "two", data, edited="skip", **first))
    assert len(skipped["rows"]) == 63
    assert 5 not in [row["neuron"] for row in skipped["rows"]]
    again = record_of(run_tars(tmp_path / "one", tmp_path / "three", data, edited="again", **first))
    assert len(again["rows"]) == 64


def test_several_concepts_each_see_the_model_before_them(planted: Path, tmp_path: Path) -> None:
    records = [{"from": name, "prompts": ["the letter {}"]} for name in ("q", "z")]
    both = record_of(run_tars(planted, tmp_path / "both", pairs_file(tmp_path / "both.jsonl", *records), n_edits=2))
    assert [row["concept"] for row in both["rows"]] == ["q", "q", "z", "z"]
    one = run_tars(planted, tmp_path / "one", pairs_file(tmp_path / "one.jsonl", records[0]), n_edits=2)
    two = run_tars(tmp_path / "one", tmp_path / "two", pairs_file(tmp_path / "two.jsonl", records[1]), n_edits=2)
    assert [row["row"] for row in both["rows"]] == [row["row"] for r in (one, two) for row in record_of(r)["rows"]]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "two"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "deepseek_v2"])
def test_every_layout_is_edited_where_it_is_stored(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q", "prompts": ["the letter {}"]})
    manifest = run_tars(checkpoints[name], tmp_path / "out", data, n_edits=6, mode="zero")
    rows = record_of(manifest)["rows"]
    checkpoint = Checkpoint.open(tmp_path / "out")
    structure = detect(checkpoint.config, checkpoint.tensors)
    from llmsurgery.compute.decode import read_vectors

    everything = {
        (place.tensor.stored, place.side): (place, torch.cat(list(read_vectors(checkpoint, place))))
        for place in places(TarsConfig(), structure)
    }
    for row in rows:
        place, vectors = everything[row["tensor"], "in" if row["side"] == "up" else "gate"]
        assert not vectors[row["neuron"]].any()
        assert row["row"] == place.first + row["neuron"]
        assert row["expert"] == place.tensor.expert
    assert sum(int((vectors == 0).all(1).sum()) for _, vectors in everything.values()) == len(rows)


def test_concepts_of_several_tokens_name_what_suffers_too(planted: Path, tmp_path: Path) -> None:
    manifest = llmsurgery.redirect(
        planted, method="tars", source="rivers", out=tmp_path / "out", settings={**FAST, "n_edits": 1}
    ).manifest
    notices: Any = manifest["notices"]
    assert any("has 6 tokens and is found by the first, 'r'" in notice for notice in notices)
    assert any("has no prompts" in notice for notice in notices)


def test_concepts_and_words_that_share_their_first_token(planted: Path) -> None:
    encoder = Encoder(load_tokenizer(planted), 256)
    given = make_concept(encoder, Pair("bees", "", prompts=("Orla keeps {} here", "{} are", "she likes {}")))
    assert (given.text, given.tokens, len(given.makers), len(given.tests)) == ("b", 4, 1, 1)
    assert bytes(given.makers[0]).decode("latin1") != ""
    words = words_with(encoder, given)
    assert words
    assert all(word.startswith("b") and word != "bees" for word in words)
    bare = make_concept(encoder, Pair("bees", ""))
    assert (bare.given, bare.tests) == (False, ())


def test_errors_have_their_reasons(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown side"):
        run_tars(planted, tmp_path / "out", sides="down")
    with pytest.raises(UsageError, match="--from is missing"):
        llmsurgery.redirect(planted, method="tars", out=tmp_path / "out")
    with pytest.raises(UsageError, match="--to is missing"):
        llmsurgery.redirect(planted, method="rocr", source="q", out=tmp_path / "out")
    data = pairs_file(tmp_path / "pairs.jsonl", {"from": "q"})
    with pytest.raises(InputError, match="has no `to`"):
        llmsurgery.redirect(planted, method="rocr", pairs=data, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
