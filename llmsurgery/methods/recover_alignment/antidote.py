"""antidote: undo the fine-tuning of the entries that harmful text runs through.

Paper: "Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning", arXiv
2408.09600. With X the inputs of a matrix over the harmful rows, per output row of the matrix:

    h = |D| |X_column|,    the `share` of the row with the largest h goes back to the aligned model's value

D = b - a is the fine-tuning, a the aligned and b the fine-tuned model. Rows of --harmful may have the unsafe answer as
`completion`, as in the paper; without it X is taken over the prompts.

What differs from the released code (git-disl/Antidote): for a model without adapters it takes h = |W| |X_column| and
sets the entries to zero, so that a tenth of every row of q, k and v dies with the harm. Here the entries of the
difference go, as they do there for adapters; score=weight ranks by |W| of the fine-tuned model as released.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import controls, other_values, own_values, removed_share, restored_edits
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row

INPUTS = ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_a", "attn.kv_a")
"""The matrices that read the input of attention, as the paper's queries, keys and values do."""


@dataclass(frozen=True)
class AntidoteConfig:
    """Hyperparameters of antidote; `llmsurgery methods antidote` prints them with their help."""

    share: float = option(0.1, "share of the entries of each output row that goes back", minimum=0, maximum=1)
    score: str = option("delta", "what is weighed by the inputs: the fine-tuning, or the weights", ("delta", "weight"))
    roles: tuple[str, ...] = option((), "roles that are edited; empty: queries, keys and values")
    layers: tuple[int, ...] = option((), "layers that are edited; empty: all")
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class Antidote:
    """antidote as a method of the toolkit."""

    spec = MethodSpec(
        name="antidote",
        task="recover-alignment",
        summary="undo the fine-tuning of the entries that harmful text runs through most",
        paper="Antidote: Post-fine-tuning Safety Alignment for Large Language Models against Harmful Fine-tuning, "
        "arXiv 2408.09600",
        needs=("harmful",),
        uses=("task",),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned",),
        demo="refuse",
    )
    config_type = AntidoteConfig

    def plan(self, config: AntidoteConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be edited."""
        roles = config.roles or [role for role in INPUTS if role in structure.roles]
        chosen = structure.select(roles, config.layers or None)
        # Of routed experts each sees its own tokens, in one module for all.
        return [t for t in chosen if len(t.shape) == 2 and t.fused is None and t.layer is not None]

    def prepare(
        self, config: AntidoteConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]
    ) -> list[Encoded]:  # fmt: skip
        """Encode the harmful rows, with their answers where they have them.

        Raises:
            InputError: A row does not fit into the model.
        """
        found = []
        for row in data["harmful"]:
            if row.answer:
                found.append(encoder.encode(row))
            else:
                found.append(encoder.encode_plain_prompt(encoder.prompt_text(row), 0, row.where)[0])
        return found

    def edit(self, config: AntidoteConfig, operation: Operation, prepared: Sequence[Encoded]) -> MethodResult:
        """Measure the inputs, and return the entries that go back."""
        targets = self.plan(config, operation.structure)
        norms = _input_norms(operation, targets, prepared)
        masks = [_mask(config, operation, target, norms[target.module]) for target in targets]
        edits, changed, counts = restored_edits(operation, targets, masks)
        chosen = {target.stored: mask for target, mask in zip(targets, masks, strict=True)}

        def result(target: RoleTensor) -> torch.Tensor:
            own = own_values(operation, target)
            return own.where(~chosen[target.stored].view(own.shape), other_values(operation, "aligned", target))

        removed, entries = removed_share(operation, result, changed)
        answers = sum(row.ends for row in prepared)
        record: dict[str, object] = {"restored": counts, "rows": len(prepared), "rows_with_answers": answers}
        record["controls"] = controls(operation, targets, removed, entries, config.controls)
        return MethodResult(edits, record, changed)


def _input_norms(
    operation: Operation, targets: Sequence[RoleTensor], rows: Sequence[Encoded]
) -> dict[str, torch.Tensor]:
    """Return, by module, the norm of each input over all tokens [in], float64."""

    from llmsurgery.evaluate.activations import Look, Observer, observe_activations

    sums: dict[str, torch.Tensor] = {}

    def observer(module: str) -> Observer:
        def see(look: Look) -> None:
            values = look.of_all_tokens(look.inputs[0]).double().square().sum(0).cpu()
            sums[module] = sums[module] + values if module in sums else values

        return see

    observers = {target.module: observer(target.module) for target in targets}
    observe_activations(
        operation.model, rows, operation.encoder.pad_id, observers, operation.progress, "reading harmful"
    )
    return {module: values.sqrt() for module, values in sums.items()}


def _mask(config: AntidoteConfig, operation: Operation, target: RoleTensor, norms: torch.Tensor) -> torch.Tensor:
    """Return which entries of a matrix go back, flat in the stored order."""
    own, aligned = own_values(operation, target), other_values(operation, "aligned", target)
    weighed = own if config.score == "weight" else own - aligned
    weighed = weighed.T if target.transposed else weighed
    mask = top_of_rows(weighed.double().abs() * norms, config.share)
    mask = (mask.T if target.transposed else mask) & (own != aligned)
    return mask.reshape(-1)


def top_of_rows(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Return the largest share of every row as a mask, rounded up; of equal scores the first count."""
    import torch

    count = math.ceil(share * scores.shape[1])
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
