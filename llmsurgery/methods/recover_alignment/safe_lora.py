"""safe-lora: keep of the fine-tuning of each matrix what lies in the subspace that alignment moved it in.

Paper: "Safe LoRA", arXiv 2405.16833. With W_base the pretrained, W_a the aligned and W_b the fine-tuned matrix, out x
in, V = W_a - W_base and D = W_b - W_a:

    C = V V^T / |V|,    rho = cos(vec(C D), vec(D))
    rho <= tau:  W_b <- W_a + C D

mode=threshold takes tau as given, mode=number the n-th smallest rho.

C is no projector: it is not idempotent, and its eigenvalues sigma^2 / |V| shrink with V, so that a small V deletes
nearly all of the update and rho says little. projection=exact takes C = U U^T instead, with U the left singular vectors
of V that hold `energy` of its squared norm.

What differs from the released code (IBM/SafeLoRA): it takes the adapters' factors, tells A from B by shape[0] == r,
which breaks where out = r, and pairs modules by the order in which it meets them. Here the update is that of merged
weights, which is the same C D, and matrices are paired by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.recovering import controls, other_values, own_values, removed_share
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row


@dataclass(frozen=True)
class SafeLoraConfig:
    """Hyperparameters of safe-lora; `llmsurgery methods safe-lora` prints them with their help."""

    mode: str = option("threshold", "which matrices are projected", ("threshold", "number"))
    tau: float = option(0.5, "mode=threshold: largest cosine of a matrix that is projected", minimum=-1, maximum=1)
    number: int = option(10, "mode=number: how many matrices are projected", minimum=1)
    projection: str = option("released", "C as released, or a true projector", ("released", "exact"))
    energy: float = option(0.9, "projection=exact: share of the squared norm of V that it keeps", minimum=0, maximum=1)
    roles: tuple[str, ...] = option(("linear",), "roles that are looked at; as for training")
    layers: tuple[int, ...] = option((), "layers that are looked at; empty: all")
    controls: bool = option(True, "measure a random restoration and an interpolation of the same size")


@register
class SafeLora:
    """safe-lora as a method of the toolkit."""

    spec = MethodSpec(
        name="safe-lora",
        task="recover-alignment",
        summary="project the fine-tuning of each matrix onto the subspace that alignment moved it in",
        paper="Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models, "
        "arXiv 2405.16833",
        needs=(),
        uses=("harmful", "task"),
        export="plain",
        trained=False,
        selects=True,
        models=("aligned", "base"),
        demo="refuse",
    )
    config_type = SafeLoraConfig

    def plan(self, config: SafeLoraConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that may be projected."""
        return structure.select(config.roles, config.layers or None)

    def prepare(self, config: SafeLoraConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> None:
        """No data is needed."""

    def edit(self, config: SafeLoraConfig, operation: Operation, prepared: None) -> MethodResult:
        """Score every matrix, and project those that are chosen."""
        import torch

        from llmsurgery.edits.kinds import Replace
        from llmsurgery.edits.rows import StoredRows
        from llmsurgery.errors import NoEffectError

        targets = [target for target in self.plan(config, operation.structure) if len(target.shape) == 2]
        cosines = {target.stored: _projected(config, operation, target)[1] for target in targets}
        tau = config.tau
        if config.mode == "number":
            tau = sorted(cosines.values())[min(config.number, len(targets)) - 1]
        chosen = [target for target in targets if cosines[target.stored] <= tau]
        if not chosen:
            raise NoEffectError(
                f"no matrix has a cosine of {tau:.4g} or less", f"the least is {min(cosines.values()):.4g}", "raise tau"
            )
        # Held as they will be stored: computing them again would take another decomposition.
        values = {t: StoredRows.of(_projected(config, operation, t)[0].numpy(), t.dtype) for t in chosen}
        removed, entries = removed_share(operation, lambda t: torch.from_numpy(values[t][:]), chosen)
        record: dict[str, object] = {"tau": tau, "cosines": cosines, "projected": len(chosen)}
        record["controls"] = controls(operation, chosen, removed, entries, config.controls, dense=True)
        edits = [Replace(target.stored, cast(Any, rows)) for target, rows in values.items()]
        return MethodResult(edits, record, chosen)


def _projected(config: SafeLoraConfig, operation: Operation, target: RoleTensor) -> tuple[torch.Tensor, float]:
    """Return W_a + C D in the stored shape, and rho."""
    aligned = other_values(operation, "aligned", target).double()
    moved = own_values(operation, target).double() - aligned
    apart = aligned - other_values(operation, "base", target).double()
    if target.transposed:
        moved, apart = moved.T, apart.T
    kept = project(apart, moved, config.projection == "exact", config.energy)
    cosine = cosine_of(kept, moved)
    if target.transposed:
        kept = kept.T
    return (aligned + kept).float().contiguous(), cosine


def project(apart: torch.Tensor, moved: torch.Tensor, exact: bool, energy: float = 0.9) -> torch.Tensor:
    """Return C D; where V is zero, C is.

    Args:
        apart: V [out, in], float64.
        moved: D [out, in], float64.
        exact: Whether C is the projector on the leading left singular vectors of V.
        energy: Share of the squared norm of V that these hold.
    """
    import torch

    if exact:
        left, values, _ = torch.linalg.svd(apart, full_matrices=False)
        shares = values.square().cumsum(0)
        if not float(shares[-1]):
            return torch.zeros_like(moved)
        rank = int((shares < energy * shares[-1]).sum()) + 1
        basis = left[:, :rank]
        kept: torch.Tensor = basis @ (basis.T @ moved)
        return kept
    norm = float(apart.norm())
    return apart @ (apart.T @ moved) / norm if norm else torch.zeros_like(moved)


def cosine_of(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the cosine of two matrices as vectors; 0 where one is zero."""
    norms = float(first.norm()) * float(second.norm())
    return float((first * second).sum()) / norms if norms else 0.0
