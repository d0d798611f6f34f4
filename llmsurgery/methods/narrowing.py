"""Narrow the residual stream of a model for good: which tensors read and write it, and what becomes of each.

With `kept` the channels that stay, d and k the widths, D = I + L1 L0 and v the operator behind a module:

    embedding E [V, d]      (E D^T * v)[:, kept]
    writer W [d, inputs]    (v * D W)[kept, :]                     its bias alike; of experts each one
    reader W [outputs, d]   W[:, kept]
    norm g [d]              g[kept] sqrt(d / k), and rms_norm_eps times d / k in config.json

Dropped channels are exactly zero, so that the mean square over k channels is d / k times that over d: both factors
together leave what a norm puts out as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from llmsurgery.methods.widths import Widths

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Config, Edit, TensorEdit
    from llmsurgery.methods.base import Operation
    from llmsurgery.train.width_gate import Operator, Place

    Values = npt.NDArray[np.float64]

READERS = (
    "attn.q", "attn.k", "attn.v", "attn.qkv", "attn.q_a", "attn.kv_a", "mlp.gate", "mlp.up", "mlp.gate_up", "router",
    "router.shared", "expert.gate", "expert.up", "shared.gate", "shared.up", "lm_head",
)  # fmt: skip
WRITERS = {"attn.o": "attn", "mlp.down": "mlp", "expert.down": "mlp", "shared.down": "mlp"}
"""Role -> kind of the place whose operator stands behind it."""

NORMS = ("norm.attn", "norm.mlp", "norm.final")


def narrowed_tensors(structure: Structure) -> list[RoleTensor]:
    """Return every stored tensor with the width of the residual stream among its sides."""
    roles = {*READERS, *NORMS, "embed"}
    return [
        tensor
        for tensor in structure.tensors
        if (tensor.role in roles and tensor.part == "weight")
        or (tensor.role in WRITERS and tensor.part in ("weight", "bias"))
    ]


@dataclass(frozen=True)
class Narrowing:
    """What is left of the width, and what is mixed into it.

    Attributes:
        widths: The widths.
        indices: Channels that are stored, ascending [stored]; beyond `keep` of them some that are zero.
        alive: Which of these are not zero [stored], bool.
        operators: The operator behind each place; a place that is missing has the gate alone.
        untied: Whether a tied head becomes a tensor of its own.
    """

    widths: Widths
    indices: npt.NDArray[np.int64]
    alive: npt.NDArray[np.bool_]
    operators: Mapping[Place, Operator]
    untied: bool = False


def stored_channels(kept: npt.NDArray[np.bool_], stored: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the channels that are stored, ascending, and which of them are alive; the first of the others fill up.

    Args:
        kept: True for the channels that stay [d].
        stored: How many are stored.
    """
    import numpy as np

    spare = np.flatnonzero(~kept)[: stored - int(kept.sum())]
    indices = np.sort(np.concatenate([np.flatnonzero(kept), spare])).astype(np.int64)
    return indices, kept[indices]


def is_tied(structure: Structure) -> bool:
    """Whether the head is the embedding."""
    return bool(structure.tied or structure.copies)


def narrowed_edits(
    operation: Operation, narrowing: Narrowing, trained: Mapping[str, TensorEdit]
) -> list[Edit]:  # fmt: skip
    """Return the edits that narrow a model.

    Args:
        operation: What the method is given.
        narrowing: What is left.
        trained: Stored name -> what training made of a tensor of the source's shape.
    """
    from llmsurgery.edits.kinds import Slice

    structure, edits = operation.structure, list[Any]()
    narrowed = narrowed_tensors(structure)
    for target in narrowed:
        matrix = len(target.shape) == 2
        written = target.role in WRITERS
        axis = (0 if written else 1) if matrix else 0
        axis = 1 - axis if target.transposed and matrix else axis
        edits.append(Slice(target.stored, axis, narrowing.indices))
        if written or target.role in NORMS:
            edits.append(_replaced(operation, narrowing, target, trained.get(target.stored)))
        elif target.role == "embed" or (target.role == "lm_head" and structure.copies and not narrowing.untied):
            # A stored copy of the embedding has to stay one.
            edits += _embedding(operation, narrowing, target, trained.get(target.stored))
        else:
            edits += _read(narrowing, target, trained.get(target.stored), axis)
    names = {target.stored for target in narrowed}
    edits += [edit for name, edit in trained.items() if name not in names]
    return [*edits, *config_edits(operation, narrowing)]


def current(operation: Operation, target: RoleTensor, trained: TensorEdit | None) -> Values:
    """Return the values of a tensor after training, float64, in the stored shape."""
    import numpy as np

    from llmsurgery.edits.evaluate import edit_values

    values = operation.read(target.stored).astype(np.float64)
    return values if trained is None else edit_values([trained], values, target.shape, 0, len(values))


def written_values(values: Values, operator: Operator | None) -> Values:
    """Return v * D W of a writer [d, inputs], or of its bias [d], float64."""
    if operator is None:
        return values
    inner, outer, scale = (
        part.detach().cpu().double().numpy() for part in (operator.inner, operator.outer, operator.scale)
    )
    mixed = values + outer @ (inner @ values)
    return (scale * mixed.T).T


def _replaced(
    operation: Operation, narrowing: Narrowing, target: RoleTensor, trained: TensorEdit | None
) -> Edit:  # fmt: skip
    """Return the new values of a writer, its bias, or a norm."""
    from llmsurgery.edits.kinds import Replace
    from llmsurgery.edits.rows import StoredRows

    values = current(operation, target, trained)
    values = values.T if target.transposed and len(target.shape) == 2 else values
    if target.role in NORMS:
        values = _norm(operation.structure, narrowing, values, target.role == "norm.final")
    else:
        values = written_values(values, narrowing.operators.get((WRITERS[target.role], target.layer)))
        values = values[narrowing.indices]
        values[~narrowing.alive] = 0
    if values.ndim == 1:
        return Replace(target.stored, values)
    values = values.T if target.transposed else values
    # In the stored dtype: the new matrices of all blocks are held until they are written.
    return Replace(target.stored, cast(Any, StoredRows.of(values, target.dtype)))


def _norm(structure: Structure, narrowing: Narrowing, gain: Values, final: bool) -> Values:
    added = structure.family.norm_offset
    factor = math.sqrt(narrowing.widths.before / narrowing.widths.stored)
    if final and _rescaled_head(structure, narrowing):
        # The head is the embedding, which has taken the same factor.
        factor = 1.0
    values = (gain[narrowing.indices] + added) * factor - added
    values[~narrowing.alive] = -added
    return values


def _rescaled_head(structure: Structure, narrowing: Narrowing) -> bool:
    return structure.family.scaled_embedding and is_tied(structure) and not narrowing.untied


def _embedding(
    operation: Operation, narrowing: Narrowing, target: RoleTensor, trained: TensorEdit | None
) -> list[Any]:  # fmt: skip
    """Return what becomes of the embedding behind its slice, and of a head that it was tied to."""
    from llmsurgery.edits.kinds import Add, Mask, Replace
    from llmsurgery.edits.rows import StoredRows

    operator = narrowing.operators.get(("embed", None))
    scaled = operation.structure.family.scaled_embedding
    if operator is None and not scaled and trained is None:
        if narrowing.alive.all():
            return []
        import numpy as np

        return [Mask(target.stored, np.broadcast_to(narrowing.alive, (target.shape[0], len(narrowing.alive))))]
    source = current(operation, target, trained)
    edits: list[Any] = []
    if narrowing.untied and operation.structure.tied:
        head = source[:, narrowing.indices] * narrowing.alive
        edits.append(Add(_head_name(operation.structure), head, target.dtype))
    values = written_values(source.T, operator).T[:, narrowing.indices] * narrowing.alive
    if scaled:
        # Stock code multiplies by the root of the width, which is another one now.
        values = values * math.sqrt(narrowing.widths.before / narrowing.widths.stored)
    return [*edits, Replace(target.stored, cast(Any, StoredRows.of(values, target.dtype)))]


def _head_name(structure: Structure) -> str:
    family = structure.family
    return f"{family.stored.get('lm_head', family.roles['lm_head'])}.weight"


def _read(narrowing: Narrowing, target: RoleTensor, trained: TensorEdit | None, axis: int) -> list[Edit]:
    """Return what training did to a reader, behind its slice."""
    import numpy as np

    from llmsurgery.edits.kinds import LowRank, Replace

    if isinstance(trained, LowRank):
        u = trained.u[narrowing.indices] if axis == 0 else trained.u
        v = trained.v[:, narrowing.indices] if axis == 1 else trained.v
        return [LowRank(target.stored, u, v)]
    if isinstance(trained, Replace):
        return [Replace(target.stored, np.take(np.asarray(trained.values), narrowing.indices, axis))]
    return []


def config_edits(operation: Operation, narrowing: Narrowing) -> list[Config]:
    """Return what changes in config.json: the width, the epsilon of the norms, and what stock code takes from it."""
    from llmsurgery.edits.kinds import Config

    structure = operation.structure
    settings: Any = operation.model.config.get_text_config()
    epsilon = float(settings.rms_norm_eps) * narrowing.widths.before / narrowing.widths.stored
    values: dict[str, Any] = {"hidden_size": narrowing.widths.stored, "rms_norm_eps": epsilon}
    if "attn.kv_a" not in structure.roles:
        # Else it would be taken to be width / heads.
        inner = next(
            tensor.shape[0 if tensor.transposed else 1]
            for tensor in structure.tensors
            if tensor.role == "attn.o" and tensor.part == "weight"
        )
        values["head_dim"] = inner // structure.heads
    if narrowing.untied and is_tied(structure):
        values["tie_word_embeddings"] = False
    return [Config(("config.json", name), value) for name, value in values.items()]


def narrowed_parameters(targets: Sequence[RoleTensor], widths: Widths) -> int:
    """Return how many entries of some narrowed tensors go."""
    return sum(target.parameters - target.parameters // widths.before * widths.stored for target in targets)
