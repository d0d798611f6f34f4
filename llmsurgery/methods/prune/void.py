"""Layer voids (LAC): remove the blocks that add least to the length of the residual stream.

Paper: "Void in Language Models", arXiv 2505.14467. With h_l a token's residual stream before block l:

    d_l = |h_l+1| - |h_l|
    threshold_l = alpha (max - min of d_0 .. d_l-1),   0 for l = 0 and 1
    block l is a void for the token if d_l < threshold_l

    activity_l = share of the tokens of the calibration text for which block l is no void

The blocks of lowest activity are removed at once, of equals the one of lower mean d; the others are renumbered, and
config.json follows. --layers N says how many are kept, --sparsity what share is removed; a quarter by default.

Growth of the length is not influence: a block that turns the stream and leaves its length is a void here; compare with
`shortgpt` at the same number. Lengths are ruled by one or two massive channels and by the first token of a text, so the
record holds the activity with and without the first token of each window; `first=true` counts it for the choice.

What differs from the released code (manishemirani/void_in_language_models), and why:

- It removes nothing: its blocks all run, and the head reads the stream as it stood behind the last active one, token by
  token. Its accuracies are of that early exit and say nothing of a smaller model. Removing the blocks that are voids
  most often is our use of the statistic.
- It loses the first generated token, and with skipping switched off compares with nothing. Here the tokens of plain
  text are counted, which are those of prompts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.depth import DepthConfig, block_tensors, depth_result, removed_count
from llmsurgery.methods.pruning import CalibrationConfig, calibration_windows, tell_of_windows, walk_of
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window


@dataclass(frozen=True)
class VoidConfig:
    """Hyperparameters of layer voids; `llmsurgery methods void` prints them with their help."""

    depth: DepthConfig = field(default_factory=DepthConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    alpha: float = option(0.8, "share of the range of earlier changes below which a block is a void", minimum=0)
    first: bool = option(False, "count the first token of each window too")


@register
class Void:
    """Layer voids as a method of the toolkit."""

    spec = MethodSpec(
        name="void",
        task="prune",
        summary="remove the blocks that add least to the length of the residual stream",
        paper="Void in Language Models, arXiv 2505.14467",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=False,
        walks=True,
        selects=True,
        structured=True,
    )
    config_type = VoidConfig

    def plan(self, config: VoidConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors of all blocks, any of which may go.

        Raises:
            UsageError: The number of blocks does not fit the model.
        """
        removed_count(config.depth, structure)
        return block_tensors(structure)

    def prepare(self, config: VoidConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Window]:
        """Cut the calibration text into windows."""
        return calibration_windows(config.calibration, encoder, data["calibration"])

    def edit(self, config: VoidConfig, operation: Operation, prepared: list[Window]) -> MethodResult:
        """Measure every block's activity and remove the lowest."""
        import torch

        tell_of_windows(operation, config.calibration, prepared, "calibration")
        layers = operation.structure.layers
        walk = walk_of(operation, prepared)
        lengths = [_lengths(walk.states)]
        with operation.progress.task("lengths behind blocks", layers) as tick:
            for _ in range(layers):
                with walk.held():
                    walk.advance()
                lengths.append(_lengths(walk.states))
                tick()
        norms = torch.stack(lengths)
        every = activity(norms.flatten(1), config.alpha)
        later = activity(norms[:, :, 1:].flatten(1), config.alpha)
        growth = norms.diff(dim=0).flatten(1).mean(1)
        chosen = every if config.first else later
        order = sorted(range(layers), key=lambda layer: (float(chosen[layer]), float(growth[layer]), layer))
        removed = sorted(order[: removed_count(config.depth, operation.structure)])
        record = {
            "activity": later.tolist(),
            "activity_with_first_token": every.tolist(),
            "mean_change_of_length": growth.tolist(),
            "windows": len(prepared),
            "window_tokens": len(prepared[0]),
        }
        return depth_result(operation, removed, record)


def _lengths(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the length of every token's stream [windows, tokens], fp32."""
    import torch

    return torch.cat([state.float().norm(dim=-1) for state in states])


def activity(norms: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the share of tokens for which each block is no void [blocks].

    Args:
        norms: Length of the stream before each block and behind the last one [blocks + 1, tokens].
        alpha: Share of the range of earlier changes.
    """
    return (~voids(norms, alpha)).double().mean(1)


def voids(norms: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return for which tokens each block is a void [blocks, tokens]; arguments as for `activity`."""
    import torch

    changes = norms.diff(dim=0)
    result = torch.zeros_like(changes, dtype=torch.bool)
    for layer in range(len(changes)):
        earlier = changes[:layer]
        # Of one change the range is 0.
        bound = alpha * (earlier.amax(0) - earlier.amin(0)) if layer > 1 else torch.zeros_like(changes[0])
        result[layer] = changes[layer] < bound
    return result
