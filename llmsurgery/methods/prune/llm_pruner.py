"""LLM-Pruner: remove attention heads and MLP channels that the loss depends on least. Nothing is trained afterwards.

Paper: "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627. What must go together is a
group: a key-value head with its query heads (their rows of q, k and v, the matching columns of o), or a channel of the
MLP (its row of gate and up, its column of down). With g the gradient of the loss summed over some windows, F the mean
of its squares window by window, and j over the entries of a tensor that belong to the group:

    vectorize      | sum_j w_j g_j |
    param_first    sum_j | w_j g_j |
    param_second   sum_j | w_j^2 F_j |
    param_mix      sum_j | w_j g_j - 1/2 w_j^2 F_j |

A group's score is the sum over its tensors. In every block the groups of lowest score go, as many heads and as many
channels in each block, so that config.json can say it: num_attention_heads, num_key_value_heads, head_dim,
intermediate_size. The residual stream keeps its width. The result is smaller and faster.

--sparsity is the share of the heads and of the channels that goes; a quarter by default. Channels are kept in multiples
of 64 (of 8 in small models), and heads in numbers that divide the width, which stock transformers asks for; where no
fewer heads do, all stay, and that is said.

What differs from the released code (horseee/LLM-Pruner), and why:

- It prunes blocks 4 to 29 of 32 alone, whose heads then differ from the others', and pickles the model object. Here
  all blocks are pruned alike and the result is a plain checkpoint.
- It removes query heads by themselves. With grouped queries the query heads of a key-value head go with it.
- `param_mix` on attention crashes there, and one of its tests is always false; vectorize lets samples cancel, here too.
- It restores what was lost with LoRA on Alpaca. That is another operation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import NoEffectError, UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window
    from llmsurgery.edits.kinds import Config, Edit, Slice

SCORES = ("param_first", "vectorize", "param_second", "param_mix")
HEADS = {"attn.q": 0, "attn.k": 0, "attn.v": 0, "attn.o": 1, "norm.q": 0, "norm.k": 0}
CHANNELS = {"mlp.gate": 0, "mlp.up": 0, "mlp.down": 1}
"""Role -> axis of W [outputs, inputs] that the groups lie along."""


@dataclass(frozen=True)
class LlmPrunerConfig:
    """Hyperparameters of LLM-Pruner; `llmsurgery methods llm-pruner` prints them with their help."""

    sparsity: float | None = option(None, "share of heads and channels that goes, above 0 and below 1; none: 0.25")
    part: str = option("both", "what is removed", ("both", "heads", "channels"))
    score: str = option("param_first", "how entries of a group are scored", SCORES)
    samples: int = option(10, "windows of --calibration at most", minimum=1)
    window: int = option(64, "tokens of a window, at most the model's context", minimum=2)


@register
class LlmPruner:
    """LLM-Pruner as a method of the toolkit."""

    spec = MethodSpec(
        name="llm-pruner",
        task="prune",
        summary="remove the attention heads and MLP channels that the loss depends on least",
        paper="LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv 2305.11627",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=False,
        selects=True,
        structured=True,
        roles=("attn.q",),
        lacks=("attn.qkv", "attn.kv_a", "mlp.gate_up", "router"),
    )
    config_type = LlmPrunerConfig

    def plan(self, config: LlmPrunerConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that may become smaller.

        Raises:
            UsageError: The share is out of bounds.
            UnsupportedError: The model has other matrices.
        """
        from llmsurgery.errors import UnsupportedError

        share_of(config)
        present = set(structure.roles)
        if missing := {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"} - present:
            raise UnsupportedError(
                f"the model has no {sorted(missing)[0]}",
                "heads and channels are rows and columns of q, k, v, o, gate, up and down",
                "use shortgpt, or a method that zeroes weights",
            )
        if other := present & set(self.spec.lacks):
            raise UnsupportedError(
                f"the model has {sorted(other)[0]}",
                "experts have no channels in common with each other",
                "use shortgpt, or a method that zeroes weights",
            )
        heads = members(structure, HEADS) if config.part != "channels" else []
        return heads + (members(structure, CHANNELS) if config.part != "heads" else [])

    def prepare(self, config: LlmPrunerConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Window]:
        """Cut the calibration text into windows."""
        from llmsurgery.data.windows import pack_windows

        length = min(config.window, encoder.max_length)
        return pack_windows(encoder, data["calibration"], length, config.samples, "calibration")

    def edit(self, config: LlmPrunerConfig, operation: Operation, prepared: list[Window]) -> MethodResult:
        """Score the groups of every block and cut the lowest out."""
        structure, settings = operation.structure, operation.model.config.get_text_config()
        if len(prepared) < config.samples:
            operation.progress.notice(f"--calibration gives {len(prepared)} windows, {config.samples} were asked for")
        heads = int(settings.num_attention_heads)
        groups = int(getattr(settings, "num_key_value_heads", None) or heads)
        channels = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "mlp.gate")
        width = int(settings.hidden_size)
        kept_groups, kept_channels = groups, channels
        if config.part != "channels":
            kept_groups = groups_kept(groups, heads // groups, width, share_of(config))
            if kept_groups == groups:
                operation.progress.notice(f"no fewer than {heads} heads divide the width {width}: all heads stay")
        if config.part != "heads":
            kept_channels = channels_kept(channels, share_of(config))
        if (kept_groups, kept_channels) == (groups, channels):
            raise NoEffectError("no head and no channel can go", "no smaller number is allowed", "raise --sparsity")
        found = group_scores(config, operation, prepared, {"heads": groups, "channels": channels})
        cuts = {"heads": (kept_groups, HEADS), "channels": (kept_channels, CHANNELS)}
        edits: list[Edit] = []
        targets: list[RoleTensor] = []
        for name, (count, roles) in cuts.items():
            whole = groups if name == "heads" else channels
            if count == whole:
                continue
            for target in members(structure, roles):
                keep = highest(found[name][int(target.layer or 0)], count)
                edits.append(sliced(target, roles[target.role], keep, whole))
                targets.append(target)
        edits += config_edits(heads // groups * kept_groups, kept_groups, kept_channels, structure, heads)
        record = {
            "kept_heads": heads // groups * kept_groups,
            "kept_key_value_heads": kept_groups,
            "kept_channels": kept_channels,
            "heads": heads,
            "channels": channels,
            "windows": len(prepared),
            "window_tokens": len(prepared[0]),
        }
        return MethodResult(edits, record, targets)


def share_of(config: LlmPrunerConfig) -> float:
    """Return the share of heads and channels that goes.

    Raises:
        UsageError: It is out of bounds.
    """
    share = 0.25 if config.sparsity is None else config.sparsity
    if not 0 < share < 1:
        raise UsageError(
            f"a sparsity of {share:g} is out of bounds",
            "it is the share of heads and channels that is removed, above 0 and below 1",
            "--sparsity 0.25 removes a quarter of them",
        )
    return share


def members(structure: Structure, roles: Mapping[str, int]) -> list[RoleTensor]:
    """Return the tensors whose rows or columns are heads or channels, in order of layer."""
    rows = {t.role: t.shape[0] for t in structure.tensors if t.role in ("attn.q", "attn.k") and t.part == "weight"}
    found = []
    for tensor in structure.tensors:
        if tensor.role not in roles or tensor.layer is None:
            continue
        if tensor.role.startswith("norm.") and tensor.shape[0] != rows.get(f"attn.{tensor.role[-1]}"):
            # A norm of one head is shared by all of them.
            continue
        if tensor.part == "bias" and roles[tensor.role] == 1:
            # A bias of outputs that stay.
            continue
        found.append(tensor)
    return sorted(found, key=lambda tensor: tensor.layer or 0)


def groups_kept(groups: int, each: int, width: int, share: float) -> int:
    """Return how many key-value heads stay: of the numbers that are allowed, the nearest to what was asked for.

    Args:
        groups: Key-value heads.
        each: Query heads of one.
        width: Width of the residual stream, which the query heads have to divide.
        share: Share that is to go.
    """
    allowed = [count for count in range(1, groups) if width % (count * each) == 0]
    wanted = (1 - share) * groups
    return min(allowed, key=lambda count: (abs(count - wanted), -count), default=groups)


def channels_kept(channels: int, share: float) -> int:
    """Return how many channels stay: a multiple of 64, or of 8 in small models."""
    unit = 64 if channels >= 512 else 8
    kept = round((1 - share) * channels / unit) * unit
    return max(min(unit, channels), min(kept, channels - unit))


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the highest scores in ascending order; the last among equals."""
    from llmsurgery.compute.select import smallest

    gone = smallest(scores[None], len(scores) - count)[0]
    return (~gone).nonzero()[:, 0]


def sliced(target: RoleTensor, axis: int, keep: torch.Tensor, groups: int) -> Slice:
    """Return the slice of a tensor that leaves some groups along an axis of W [outputs, inputs]."""
    import torch

    from llmsurgery.edits.kinds import Slice

    stored = 1 - axis if target.transposed and len(target.shape) == 2 else axis
    each = target.shape[stored] // groups
    indices = (keep[:, None].cpu() * each + torch.arange(each)).reshape(-1)
    return Slice(target.stored, stored, indices.numpy())


def config_edits(heads: int, groups: int, channels: int, structure: Structure, before: int) -> list[Config]:
    """Return what changes in config.json."""
    from llmsurgery.edits.kinds import Config

    rows = next(t.shape[0] for t in structure.tensors if t.role == "attn.q" and t.part == "weight")
    values = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        # Else it would be taken to be width / heads.
        "head_dim": rows // before,
        "intermediate_size": channels,
    }
    return [Config(("config.json", name), value) for name, value in values.items()]


class Sums:
    """Sums of the gradients of one matrix and of their squares, fp32 [outputs, inputs]."""

    def __init__(self) -> None:
        self.first: Any = 0.0
        self.second: Any = 0.0


def group_scores(
    config: LlmPrunerConfig, operation: Operation, windows: Sequence[Window], counts: Mapping[str, int]
) -> dict[str, dict[int, torch.Tensor]]:
    """Return the scores of the groups, kind of group -> block -> [groups].

    Args:
        config: Hyperparameters.
        operation: What the method is given.
        windows: The samples; one is one backward pass.
        counts: Kind of group -> number of groups of a block.
    """
    import torch

    from llmsurgery.methods.pruning import stored_matrix
    from llmsurgery.train.weight_gradients import handed_gradients, text_backward

    kinds = {"heads": HEADS, "channels": CHANNELS}
    matrices = {
        name: [t for t in members(operation.structure, roles) if len(t.shape) == 2] for name, roles in kinds.items()
    }
    sums: dict[str, Sums] = defaultdict(Sums)
    squares = config.score in ("param_second", "param_mix")

    def receive(target: RoleTensor, gradient: torch.Tensor) -> None:
        own = sums[target.stored]
        own.first = own.first + gradient.float()
        if squares:
            own.second = own.second + gradient.float().square()

    every = [target for targets in matrices.values() for target in targets]
    with (
        handed_gradients(operation.model, every, receive),
        operation.progress.task("gradients", len(windows)) as tick,
    ):
        for window in windows:
            text_backward(operation.model, torch.tensor([window]))
            tick()
    result: dict[str, dict[int, torch.Tensor]] = {name: {} for name in matrices}
    for name, targets in matrices.items():
        for target in targets:
            own = sums.pop(target.stored)
            weight = stored_matrix(operation, target)
            terms = entry_terms(config.score, weight, own.first, own.second / len(windows) if squares else weight)
            score = tensor_score(config.score, terms, kinds[name][target.role], counts[name])
            layer = int(target.layer or 0)
            result[name][layer] = result[name].get(layer, 0) + score
    return result


def entry_terms(score: str, weight: torch.Tensor, gradient: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
    """Return what single entries count, before the absolute value.

    Args:
        score: One of `SCORES`.
        weight: W.
        gradient: Sum of the gradients over samples.
        squared: Mean of the squared gradients over samples.
    """
    if score in ("param_first", "vectorize"):
        return weight * gradient
    second = weight.square() * squared
    return second if score == "param_second" else weight * gradient - second / 2


def tensor_score(score: str, terms: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """Return what one tensor adds to the score of each group [groups].

    Args:
        score: One of `SCORES`.
        terms: Of `entry_terms` [outputs, inputs].
        axis: Axis along which the groups lie.
        groups: Number of groups.
    """
    parts = (terms if axis == 0 else terms.T).reshape(groups, -1)
    return parts.sum(1).abs() if score == "vectorize" else parts.abs().sum(1)
