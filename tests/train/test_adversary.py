"""The adversary: where perturbations go in every family, their ball, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmsurgery.compute.blocks import blocks_path, residual_after
from llmsurgery.compute.head import final_hidden
from llmsurgery.data.collate import collate
from llmsurgery.train.adversary import EMBEDDING, Adversary, Strength, project
from llmsurgery.train.perturbation import Perturbation
from llmsurgery.train.pooling import row_means
from llmsurgery.train.scorer import Scorer
from llmsurgery.train.trainable import Trainable

from .bench import Bench, config

FAMILIES = ["sharded_llama", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3", "olmo2", "phi3", "mixtral", "deepseek_v2"]


def strength(places: Sequence[int], radius: float = 1.0, **settings: Any) -> Strength:
    return Strength(dict.fromkeys(places, radius), **{"lr": 0.05, "steps": 4, "weight_decay": 0.0, **settings})


def surprisal(bench: Bench, trainable: Trainable, rows: Sequence[int]) -> torch.Tensor:
    scores, owners = Scorer(trainable, bench.pad).log_probabilities([bench.rows[i] for i in rows])
    return -row_means(scores, owners, len(rows)).sum()


def random_perturbation(bench: Bench, rows: Sequence[int], places: Sequence[int], positions: str) -> Perturbation:
    chosen = [bench.rows[i] for i in rows]
    width = bench.model.get_input_embeddings().weight.shape[1]
    result = Perturbation(chosen, positions, places, int(width), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for delta in result.deltas.values():
        delta.copy_(torch.randn(delta.shape, generator=generator))
    return result


def test_projection_of_the_specification() -> None:
    delta = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    project(delta, 1.5)
    assert torch.allclose(delta, torch.tensor([[[0.9, 1.2], [0.3, 0.4], [0.0, 0.0]]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_after_a_block_moves_by_the_perturbation(family: str, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints[family])
    batch = collate(bench.rows[:2], bench.pad, torch.device("cpu"))
    with bench.trainable(config(roles="attn.o" if family != "phi3" else "linear")) as trainable:
        bench.model.eval()
        seen: list[torch.Tensor] = []
        blocks: Any = bench.model.get_submodule(blocks_path(bench.structure))
        for place in (0, 1, EMBEDDING):
            adversary = Adversary(trainable, bench.structure, [place], "prompt")
            perturbation = random_perturbation(bench, [0, 1], [place], "prompt")

            def stream(place: int = place) -> torch.Tensor:
                with torch.no_grad():
                    block = max(place, 0)
                    after = residual_after(bench.model, bench.structure, block, batch.input_ids, batch.attention_mask)
                return seen[-1] if place == EMBEDDING else after

            with adversary.installed():
                handle = blocks[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
                plain = stream()
                with adversary.under(perturbation):
                    moved = stream()
                again = stream()
                handle.remove()
            assert torch.equal(plain, again)
            expected = torch.zeros_like(plain)
            for row in (0, 1):
                start = bench.rows[row].answer_start
                expected[row, :start] = perturbation.deltas[place][row, :start]
            assert torch.allclose(moved - plain, expected, atol=1e-5)
            assert expected.abs().max() > 0.5


def test_rows_are_known_by_their_ids_and_prompts(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gpt2"])
    first, second, stranger = bench.rows[0], bench.rows[1], bench.rows[3]
    other = type(first)((*first.ids[: first.answer_start], 5, 6), first.answer_start, True)
    batch = collate([second, stranger, other, first, second], bench.pad, torch.device("cpu"))
    perturbation = random_perturbation(bench, [0, 1], [0], "prompt")
    placed = perturbation.place_in(batch.input_ids, batch.attention_mask)
    assert placed.owners.tolist() == [1, 0, 0, 0, 1]
    starts = [second.answer_start, 0, first.answer_start, first.answer_start, second.answer_start]
    assert placed.mask.sum(1).tolist() == starts
    everywhere = random_perturbation(bench, [0, 1], [0], "all")
    lengths = [len(second.ids), 0, len(other.ids), len(first.ids), len(second.ids)]
    assert everywhere.place_in(batch.input_ids, batch.attention_mask).mask.sum(1).tolist() == lengths
    # Rows of one prompt are told apart by their whole, and else taken in order.
    twins = Perturbation([first, first], "prompt", [0], 4, 0, torch.device("cpu"))
    batch = collate([first, first, other, other], bench.pad, torch.device("cpu"))
    assert twins.place_in(batch.input_ids, batch.attention_mask).owners.tolist() == [0, 1, 0, 1]


def test_plain_texts_are_attacked_everywhere(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gpt2"])
    text = type(bench.rows[0])(bench.rows[0].ids, 3, False)
    for positions, expected in (("auto", [True, False]), ("prompt", [False, False]), ("all", [True, True])):
        made = Perturbation([text, bench.rows[1]], positions, [0], 4, 0, torch.device("cpu"))
        assert made.everywhere == expected


def test_output_in_a_tuple_is_taken_too(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gpt2"])
    with bench.trainable(config(roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt")
        perturbation = random_perturbation(bench, [0], [0], "prompt")
        batch = collate(bench.rows[:1], bench.pad, torch.device("cpu"))
        adversary._placed = perturbation.place_in(batch.input_ids, batch.attention_mask)
        states = torch.zeros(1, batch.input_ids.shape[1], perturbation.deltas[0].shape[2], dtype=torch.bfloat16)
        moved, cache = adversary._leave(0)(torch.nn.Identity(), (), (states, "cache"))
        assert cache == "cache"
        assert moved.dtype == torch.bfloat16
        assert (moved != 0).any()
        assert (states == 0).all()


@pytest.mark.parametrize("way", ["lora", "full"])
def test_attack_works_and_leaves_nothing_behind(way: str, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["olmo2"])
    with bench.trainable(config(train=way, roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [EMBEDDING, 0], "prompt")
        weights = [parameter.detach().clone() for parameter in trainable.parameters]
        with adversary.installed():
            generator = torch.get_rng_state()
            found = adversary.attack(
                bench.rows[:2], lambda: surprisal(bench, trainable, [0, 1]), strength([EMBEDDING, 0], 0.5)
            )
            assert torch.equal(torch.get_rng_state(), generator)
            assert bench.model.training
            bench.model.eval()
            with torch.no_grad():
                plain = surprisal(bench, trainable, [0, 1]).item()
                with adversary.under(found):
                    attacked = surprisal(bench, trainable, [0, 1]).item()
        assert found.losses[0] == pytest.approx(plain, rel=1e-5)
        assert attacked < found.losses[1] < found.losses[0]
        for delta in found.deltas.values():
            assert delta.dtype == torch.float32
            assert not delta.requires_grad
            assert delta.norm(dim=-1).max().item() <= 0.5 + 1e-5
        for parameter, kept in zip(trainable.parameters, weights, strict=True):
            assert parameter.grad is None
            assert parameter.requires_grad
            assert torch.equal(parameter, kept)
        modules = [*bench.model.modules()]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_attack_on_a_model_in_sixteen_bits(way: str, checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"], torch.bfloat16)
    with bench.trainable(config(train=way, roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt")
        with adversary.installed():
            found = adversary.attack(
                bench.rows[:2], lambda: surprisal(bench, trainable, [0, 1]), strength([0], steps=8)
            )
    assert found.losses[1] < found.losses[0] - 0.01
    assert found.deltas[0].dtype == torch.float32


def test_rows_are_attacked_one_by_one(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["sharded_llama"])
    with bench.trainable(config(roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt")
        with adversary.installed():

            def deltas(rows: list[int]) -> torch.Tensor:
                chosen = [bench.rows[i] for i in rows]
                objective = strength([0], steps=3, lr=None)
                return adversary.attack(chosen, lambda: surprisal(bench, trainable, rows), objective).deltas[0]

            both = deltas([0, 1])
            for place, row in enumerate([0, 1]):
                alone = deltas([row])[0]
                assert torch.allclose(both[place, : len(alone)], alone, atol=1e-4)
                # Half the radius a step: the ball is reached after two.
                assert alone.norm(dim=-1).max().item() == pytest.approx(1, abs=1e-3)
            # Padding and the shorter row's missing positions stay as they were.
            assert (both[0, bench.rows[0].answer_start :] == 0).all()


def test_reference_is_never_under_attack(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gemma2"])
    with bench.trainable(config(roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt")
        perturbation = random_perturbation(bench, [0], [0], "prompt")
        with adversary.installed() as calm, torch.no_grad():
            bench.model.eval()
            plain = surprisal(bench, calm, [0])
            assert calm.reference is not None
            with adversary.under(perturbation):
                assert surprisal(bench, calm, [0]).item() != pytest.approx(plain.item(), abs=1e-3)
                with calm.reference():
                    assert torch.equal(surprisal(bench, calm, [0]), plain)
                assert surprisal(bench, calm, [0]).item() != pytest.approx(plain.item(), abs=1e-3)


def test_recomputed_activations_are_perturbed_alike(checkpoints: dict[str, Path]) -> None:
    gradients = []
    for recomputes in (False, True):
        bench = Bench(checkpoints["sharded_llama"])
        with bench.trainable(config(roles="linear", gradient_checkpointing=recomputes)) as trainable:
            adversary = Adversary(trainable, bench.structure, [0], "prompt", recomputes)
            with adversary.installed():
                found = adversary.attack(
                    bench.rows[:1], lambda bench=bench, given=trainable: surprisal(bench, given, [0]), strength([0])
                )
                with adversary.under(found):
                    value = surprisal(bench, trainable, [0])
                # Backward runs after the attack is over, as it does in training.
                (value + surprisal(bench, trainable, [0])).backward()
            gradients.append([parameter.grad for parameter in trainable.parameters])
            assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[-1])
    for one, two in zip(*gradients, strict=True):
        assert one is not None
        assert two is not None
        assert torch.allclose(one, two, atol=1e-6)


def test_recomputation_finds_the_perturbation_of_its_own_forward(checkpoints: dict[str, Path]) -> None:
    """In versions where hooks lie inside what is recomputed."""
    bench = Bench(checkpoints["gpt2"])
    with bench.trainable(config(roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0], "prompt", True)
        batch = collate(bench.rows[:1], bench.pad, torch.device("cpu"))
        adversary._placed = placed = random_perturbation(bench, [0], [0], "prompt").place_in(
            batch.input_ids, batch.attention_mask
        )
        _, again = adversary._recomputing()
        adversary._placed = None
        with again:
            assert adversary._placed is placed
        assert adversary._placed is None


def test_median_norms_are_those_of_the_plain_stream(checkpoints: dict[str, Path]) -> None:
    bench = Bench(checkpoints["gemma3"])
    with bench.trainable(config(roles="linear")) as trainable:
        adversary = Adversary(trainable, bench.structure, [0, 1], "prompt")
        with adversary.installed() as calm:
            found = adversary.median_norms(Scorer(calm, bench.pad), bench.rows)
        bench.model.eval()
        for place, value in found.items():
            norms = []
            for row in bench.rows:
                batch = collate([row], bench.pad, torch.device("cpu"))
                with torch.no_grad():
                    states = residual_after(bench.model, bench.structure, place, batch.input_ids, batch.attention_mask)
                norms.append(states[0, : row.answer_start].norm(dim=-1))
            assert value == pytest.approx(torch.cat(norms).median().item(), rel=1e-5)
        assert final_hidden(bench.model, batch.input_ids, batch.attention_mask).shape[0] == 1
