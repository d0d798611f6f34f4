"""ShortGPT: remove the blocks that change the residual stream least.

Paper: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853. With X_l what
enters block l, over the tokens t of the calibration text:

    BI_l = 1 - mean_t cos(X_l,t, X_l+1,t)          block influence; angular=true takes arccos(cos) / pi

The blocks of lowest BI are removed at once (BI is not measured again after each), the others are renumbered, and
config.json follows. The result is smaller and faster. --layers N says how many are kept, --sparsity what share of the
blocks is removed; a quarter by default. Perplexity suffers long before multiple choice does: measure both.

A block whose output is a multiple of its input has a BI of 0, however large the factor.

What differs from the released code (icip-cas/ShortGPT), and why:

- It takes the states from `output_hidden_states`, whose last entry lies behind the final norm: the last block's BI
  compares a raw vector with one that gains have scaled. Here every block's own output is read.
- It forms the products of all pairs of tokens and keeps the diagonal. Here each token is compared with itself, in fp32:
  in bf16 a BI of 1e-2 is noise.
- Windows hold no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.depth import DepthConfig, block_tensors, depth_result, lowest, removed_count
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
class ShortGptConfig:
    """Hyperparameters of ShortGPT; `llmsurgery methods shortgpt` prints them with their help."""

    depth: DepthConfig = field(default_factory=DepthConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    angular: bool = option(False, "measure influence by the angle in place of the cosine")


@register
class ShortGpt:
    """ShortGPT as a method of the toolkit."""

    spec = MethodSpec(
        name="shortgpt",
        task="prune",
        summary="remove the blocks that turn the residual stream least",
        paper="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, arXiv 2403.03853",
        needs=(),
        uses=("calibration",),
        export="plain",
        trained=False,
        walks=True,
        selects=True,
        structured=True,
    )
    config_type = ShortGptConfig

    def plan(self, config: ShortGptConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors of all blocks, any of which may go.

        Raises:
            UsageError: The number of blocks does not fit the model.
        """
        removed_count(config.depth, structure)
        return block_tensors(structure)

    def prepare(self, config: ShortGptConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> list[Window]:
        """Cut the calibration text into windows."""
        return calibration_windows(config.calibration, encoder, data["calibration"])

    def edit(self, config: ShortGptConfig, operation: Operation, prepared: list[Window]) -> MethodResult:
        """Measure every block's influence and remove the lowest."""
        tell_of_windows(operation, config.calibration, prepared, "calibration")
        walk = walk_of(operation, prepared)
        scores: list[float] = []
        with operation.progress.task("influence of blocks", operation.structure.layers) as tick:
            for _ in range(operation.structure.layers):
                before = list(walk.states)
                with walk.held():
                    walk.advance()
                pairs = [influence(one, two, config.angular) for one, two in zip(before, walk.states, strict=True)]
                values = [value for pair in pairs for value in pair.tolist()]
                scores.append(sum(values) / len(values))
                tick()
        removed = lowest(scores, removed_count(config.depth, operation.structure))
        record = {"block_influence": scores, "windows": len(prepared), "window_tokens": len(prepared[0])}
        return depth_result(operation, removed, record)


def influence(before: torch.Tensor, after: torch.Tensor, angular: bool = False) -> torch.Tensor:
    """Return 1 - cos of every token [tokens], fp64, or its angle over pi.

    Args:
        before: What enters a block [..., width].
        after: What leaves it [..., width].
        angular: Return the angle.
    """
    import torch

    # In fp32 1 - cos of two equal vectors is 1e-7 and not 0.
    one, two = (values.reshape(-1, values.shape[-1]).double() for values in (before, after))
    cosine = torch.nn.functional.cosine_similarity(one, two, dim=-1).clamp(-1, 1)
    return torch.arccos(cosine) / torch.pi if angular else 1 - cosine
