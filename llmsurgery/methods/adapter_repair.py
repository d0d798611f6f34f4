"""Removing directions from a LoRA adapter: what is removed, how much of it, and what that does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.recovering import other_values, set_live, task_floor

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.adapter import Adapter, Matrix
    from llmsurgery.arch.spec import RoleTensor
    from llmsurgery.data.chat import Encoded
    from llmsurgery.data.records import Row
    from llmsurgery.methods.base import Operation
    from llmsurgery.methods.recover_alignment.alignguard import AlignguardConfig
    from llmsurgery.train.sensitive import Sensitive

KAPPAS = (0.25, 0.5, 0.75, 1.0)
COUNTS = (1, 2, 4, 8, 16)
POINTS = 0.05
ROWS_PER_FORWARD = 4


@dataclass(frozen=True)
class Choice:
    """How much is removed.

    Attributes:
        kappa: Share of the part along the directions.
        directions: How many of them, of each matrix.
    """

    kappa: float
    directions: int


@dataclass(frozen=True, eq=False)
class Removal:
    """What can be removed from an adapter.

    Attributes:
        adapter: The adapter.
        targets: The matrices that it adapts.
        side: "out" or "in".
        bases: Module -> sensitive directions of that side.
    """

    adapter: Adapter
    targets: Sequence[RoleTensor]
    side: str
    bases: Mapping[str, Sensitive]

    def factors(self, target: RoleTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A [r, inputs] and B [outputs, r] as they are stored, float64, without the scale."""
        import torch

        first, second = self.adapter.read(target.module)
        return torch.from_numpy(first), torch.from_numpy(second)

    def part(self, target: RoleTensor, directions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the part of the update along the directions, as A and B of its own."""
        first, second = self.factors(target)
        basis = self.bases[target.module].basis[:, :directions]
        if self.side == "out":
            return first, basis @ (basis.T @ second)
        return (first @ basis) @ basis.T, second

    def repaired(self, target: RoleTensor, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B without kappa times that part."""
        first, second = self.factors(target)
        own, other = self.part(target, choice.directions)
        if self.side == "out":
            return first, second - choice.kappa * other
        return first - choice.kappa * own, second

    def low_rank(self, target: RoleTensor, choice: Choice) -> tuple[Matrix, Matrix]:
        """Return the repaired update as factors in the orientation of the stored matrix."""
        from llmsurgery.arch.adapter import low_rank

        first, second = self.repaired(target, choice)
        return low_rank(target, first.numpy(), second.numpy(), self.adapter.scale(target.module))

    def merged(self, operation: Operation, target: RoleTensor, choice: Choice) -> torch.Tensor:
        """Return the base's matrix with the repaired update, fp32, in the stored shape."""
        import torch

        left, right = (torch.from_numpy(factor) for factor in self.low_rank(target, choice))
        return (other_values(operation, "aligned", target).double() + left @ right).float()

    def files(self, choice: Choice) -> dict[str, bytes] | None:
        """Return the files of the repaired adapter; None if no byte of its weights changes."""
        from llmsurgery.arch.adapter import WEIGHTS

        side = 1 if self.side == "out" else 0
        values = {
            self.adapter.names[target.module][side]: self.repaired(target, choice)[side].numpy()
            for target in self.targets
        }
        content = self.adapter.weights_with(values)
        if content == (self.adapter.root / WEIGHTS).read_bytes():
            return None
        return {**self.adapter.side_files(), WEIGHTS: content}


def find_removal(
    config: AlignguardConfig, operation: Operation, answered: Sequence[Encoded], asked: Sequence[Row]
) -> tuple[Removal, list[Encoded], dict[str, object]]:
    """Find the directions in which the base's loss of safe answers is sensitive.

    Args:
        config: The hyperparameters.
        operation: What the method is given.
        answered: Rows with a safe answer.
        asked: Rows without; the base answers them, and what is no refusal is left out.

    Returns:
        What can be removed, the rows whose gradients were taken, and what is recorded of them.

    Raises:
        InputError: No row has a safe answer.
    """
    from llmsurgery.errors import InputError
    from llmsurgery.train.sensitive import layer_groups, sensitive_directions

    adapter = operation.adapter
    assert adapter is not None
    targets = adapter.targets(operation.structure, "the base")
    base = operation.models["aligned"].load()
    own = _own_answers(config, operation, base, asked)
    rows = [*answered, *own]
    if not rows:
        raise InputError(
            "no row of --harmful has a safe answer",
            f"{len(asked)} prompts have none of their own, and the base refuses none of them",
            "give rows with prompt and completion, the completion being the refusal",
        )
    _warn(operation, answered)
    side = 0 if config.side == "out" else 1
    widths = {t.module: (t.shape[::-1] if t.transposed else t.shape)[side] for t in targets}
    count = config.directions or max(COUNTS)
    passes = sum(1 for _ in layer_groups(widths, count))
    with operation.progress.task("gradients of safe answers", passes * len(rows)) as tick:
        bases = sensitive_directions(
            base, widths, rows, operation.encoder.pad_id, _micro_batch(operation), count, config.side, tick
        )
    answers = {"given": len(answered), "of_the_base": len(own), "left_out": len(asked) - len(own)}
    variant = f"rank-preserving removal, per matrix, side {config.side}"
    record: dict[str, object] = {"variant": variant, "answers": answers}
    return Removal(adapter, targets, config.side, bases), rows, record


def _micro_batch(operation: Operation) -> int:
    return operation.training.micro_batch or ROWS_PER_FORWARD


def _own_answers(
    config: AlignguardConfig, operation: Operation, base: torch.nn.Module, asked: Sequence[Row]
) -> list[Encoded]:
    """Return the prompts that the base refuses, with its refusals."""
    from llmsurgery.evaluate.generation import greedy_answers
    from llmsurgery.evaluate.refusal import is_refusal

    if not asked:
        return []
    encoder = operation.encoder
    room = config.answer_tokens
    prompts = [encoder.encode_plain_prompt(encoder.prompt_text(row), room, row.where)[0] for row in asked]
    answers = greedy_answers(
        base, encoder, prompts, room, 2 * ROWS_PER_FORWARD, operation.progress, "the base's own answers"
    )
    refused = [(row, answer) for row, answer in zip(asked, answers, strict=True) if is_refusal(answer)]
    operation.progress.notice(
        f"{len(asked)} rows of --harmful have no answer: the base's own refusals, {len(refused)}, stand for safe ones"
    )
    return [encoder.encode(row, answer) for row, answer in refused]


def _warn(operation: Operation, answered: Sequence[Encoded]) -> None:
    from llmsurgery.evaluate.refusal import is_refusal

    if answered and not any(is_refusal(operation.encoder.answer_text(row)) for row in answered):
        operation.progress.notice(
            "none of the completions of --harmful looks like a refusal: this method takes the SAFE answers"
        )


def choose(
    config: AlignguardConfig, operation: Operation, removal: Removal
) -> tuple[Choice, list[dict[str, object]]]:  # fmt: skip
    """Return how much is removed, and what was tried: the least that repairs enough, else what refuses most."""
    counts = (config.directions,) if config.directions else COUNTS
    kappas = KAPPAS if config.kappa is None else (config.kappa,)
    choices = [Choice(kappa, count) for count in counts for kappa in kappas]
    recovery = operation.recovery
    if len(choices) == 1 or recovery is None:
        return choices[-1], []
    choices.sort(key=lambda choice: choice.kappa**2 * _length(removal, choice.directions))
    wanted = recovery.figures_of_aligned["safety.refusal_rate"].number - POINTS
    _, floor = task_floor(operation, config.drop)
    tried: list[dict[str, object]] = []
    best, most = None, (False, -1.0)
    with operation.progress.task("trying kappa", len(choices)) as tick:
        for choice in choices:
            set_live(operation, ((t, removal.merged(operation, t, choice)) for t in removal.targets))
            found = recovery.quick(operation.model)
            tried.append({**dataclasses.asdict(choice), **found})
            tick()
            holds = floor is None or found["task.score"] >= floor
            if holds and found["safety.refusal_rate"] >= wanted:
                return choice, tried
            if (holds, found["safety.refusal_rate"]) > most:
                best, most = choice, (holds, found["safety.refusal_rate"])
    assert best is not None
    operation.progress.notice(
        "nothing that was tried brings the refusals back within the bounds: "
        f"kappa={best.kappa:g} with {best.directions} directions comes nearest"
    )
    return best, tried


def _length(removal: Removal, directions: int) -> float:
    """Return the squared length of all parts along the directions."""
    return sum(_square(*removal.part(t, directions), removal.adapter.scale(t.module)) for t in removal.targets)


def _square(first: torch.Tensor, second: torch.Tensor, scale: float) -> float:
    """Return |s B A|^2 without the product: the trace of (B^T B)(A A^T)."""
    return scale**2 * float(((second.T @ second) * (first @ first.T)).sum())


def removal_figures(
    operation: Operation, removal: Removal, choice: Choice, rows: Sequence[Encoded]
) -> dict[str, object]:  # fmt: skip
    """Return for every matrix which share was along the directions, and how sensitive the loss is to the update."""
    from llmsurgery.train.sensitive import quadratic_forms

    changes, shares = {}, {}
    for target in removal.targets:
        scale = removal.adapter.scale(target.module)
        pairs = [removal.factors(target), removal.repaired(target, choice), removal.part(target, choice.directions)]
        changes[target.module] = [(scale * second, first) for first, second in pairs]
        whole, part = (_square(*pair, scale) for pair in (pairs[0], pairs[2]))
        shares[target.module] = part / whole if whole else 0.0
    base = operation.models["aligned"].load()
    with operation.progress.task("sensitivity of the update", len(rows)) as tick:
        found = quadratic_forms(base, changes, rows, operation.encoder.pad_id, _micro_batch(operation), tick)
    matrices: dict[str, dict[str, float]] = {}
    for target in removal.targets:
        basis, values = removal.bases[target.module].basis, found[target.module]
        matrices[target.stored] = {
            "share": shares[target.module],
            "chance": min(choice.directions, basis.shape[1]) / basis.shape[0],
            "sensitivity_before": values[0],
            "sensitivity_after": values[1],
            "sensitivity_removed": values[2],
        }
    totals = {name: sum(row[name] for row in matrices.values()) for name in ("sensitivity_before", "sensitivity_after")}
    return {"matrices": matrices, **totals}
