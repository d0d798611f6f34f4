"""`prune` on bad and odd input: amounts, silent activations, singular moments, capped logits, tied heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.compute.load import load_model
from llmsurgery.errors import NoEffectError, UsageError
from llmsurgery.train.weight_gradients import handed_gradients, text_backward

from .test_prune import broken, data, roles, run, stored, windows_of

__all__ = ["data"]


@pytest.mark.parametrize("method", ["magnitude", "d-pruner"])
@pytest.mark.parametrize("sparsity", [float("nan"), 1.5])
def test_a_share_is_between_0_and_1(
    method: str, sparsity: float, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"out of bounds|not a finite number") as caught:
        run(method, checkpoints["sharded_llama"], data, tmp_path / "out", sparsity=sparsity)
    assert caught.value.exit_code == 2
    assert "above 0 and below 1" in caught.value.why


def test_a_share_below_one_weight_has_no_effect(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(NoEffectError) as caught:
        run("wanda", checkpoints["sharded_llama"], data, tmp_path / "out", sparsity=0.001)
    assert (caught.value.exit_code, bool(caught.value.why), bool(caught.value.fix)) == (5, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("general", ["score", "none"])
def test_what_no_gradient_reaches_is_pruned_by_magnitude(
    general: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = broken(checkpoints["sharded_llama"], tmp_path / "model", "up_proj")
    settings = {"roles": "mlp.down,attn.o", "blocking": "none", "general": general}
    manifest = run("d-pruner", root, data, tmp_path / "out", settings=settings)
    run("magnitude", root, data, tmp_path / "plain", settings={"roles": "mlp.down,attn.o"})
    one, two = stored(tmp_path / "out"), stored(tmp_path / "plain")
    silent = manifest["operations"][0]["record"]["by_magnitude"]
    assert sorted(silent) == sorted(target.stored for target in roles(root).select(["mlp.down"]))
    assert all(torch.equal(one[name], two[name]) for name in silent)
    assert any("have no score" in notice for notice in manifest["notices"])


def test_a_singular_moment_is_damped_more_and_recorded(
    checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    # Eight tokens span eight directions of sixty-four.
    settings = {"samples": 1, "window": 8, "damping": 0, "roles": "mlp.down"}
    manifest = run("sparsegpt", checkpoints["sharded_llama"], data, tmp_path / "out", settings=settings)
    raised = manifest["operations"][0]["record"]["raised_damping"]
    assert set(raised) == {target.stored for target in roles(checkpoints["sharded_llama"]).select(["mlp.down"])}
    assert min(raised.values()) >= 1e-4
    assert any("damping was raised" in notice for notice in manifest["notices"])


def test_gradients_go_through_capped_logits_and_tied_heads(checkpoints: dict[str, Path], data: dict[str, Path]) -> None:
    root = checkpoints["gemma2"]
    model, plain = (load_model(root, torch.float32, torch.device("cpu")) for _ in range(2))
    assert model.config.final_logit_softcapping
    assert model.config.tie_word_embeddings
    ids = windows_of(root, data["domain"])[:2]
    found: dict[str, torch.Tensor] = {}

    def receive(target: Any, gradient: torch.Tensor) -> None:
        found[f"{target.module}.{target.part}"] = gradient.clone()

    with handed_gradients(model, roles(root).select(["linear"]), receive):
        loss = text_backward(model, ids)
    plain.requires_grad_(True)
    whole = plain(input_ids=ids, labels=ids).loss
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "d-pruner"])
def test_a_tied_head_is_never_pruned(
    method: str, checkpoints: dict[str, Path], data: dict[str, Path], tmp_path: Path
) -> None:
    root = checkpoints["tied_llama"]
    for role in ("lm_head", "embed"):
        with pytest.raises(NoEffectError, match="is a matrix of a block") as caught:
            run(method, root, data, tmp_path / "no", settings={"roles": role}, dry_run=True)
        assert "head are not pruned" in caught.value.why
    if method == "d-pruner":
        # The embedding gets a gradient by both of its uses, and stays all the same.
        run(method, root, data, tmp_path / "out")
        name = "model.embed_tokens.weight"
        assert torch.equal(stored(tmp_path / "out")[name], stored(root)[name])
