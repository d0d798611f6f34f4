"""LLM-Pruner: remove attention heads and MLP channels that the loss depends on least; train what is left, if asked to.

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

Recovery: with max_steps or epochs above 0 the smaller model is trained on --calibration with LoRA, rank 8, and the
adapters are merged: W[kept] + alpha / rank B A is rounded once to the stored dtype. What is scored is the beginning of
--calibration, `samples` windows of `window` tokens; what is trained on is all of it, plain text in pieces of
`max_length` tokens, of questions and chats the answers. Instructions as in the paper are rows of that file like any
other. The step size is 1e-3, ten times the paper's, for runs of far fewer steps than its own, and larger in narrow
models. `loss_pruned` and `loss_recovered` of the record are the loss on the first 16 rows before and after; whether
other text got better says utility.ppl.

What differs from the released code (horseee/LLM-Pruner), and why:

- It prunes blocks 4 to 29 of 32 alone, whose heads then differ from the others', and pickles the model object. Here
  all blocks are pruned alike and the result is a plain checkpoint.
- It removes query heads by themselves. With grouped queries the query heads of a key-value head go with it.
- `param_mix` on attention crashes there, and one of its tests is always false; vectorize lets samples cancel, here too.
- It recovers on the 50,000 rows of Alpaca-clean. Here it is --calibration; the shipped text is little, so give more.
  preset=paper has the paper's numbers: two passes, 64 rows a step, step size 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmsurgery.errors import NoEffectError, UsageError
from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.group_scores import SCORES, SQUARED, group_scores, highest
from llmsurgery.methods.heads_and_channels import (
    CHANNELS,
    HEADS,
    KINDS,
    Counts,
    channels_kept,
    groups_kept,
    members,
    slices,
)
from llmsurgery.methods.registry import register
from llmsurgery.methods.settings import as_record
from llmsurgery.methods.working_memory import Working
from llmsurgery.train.config import TrainingConfig, option, trained_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.data.windows import Window
    from llmsurgery.edits.kinds import Edit


def _training() -> TrainingConfig:
    """Return how recovery trains; no step of it is taken unless that is asked for."""
    return TrainingConfig(weight_decay=0.0, max_steps=0, schedule="cosine", max_length=256)


@dataclass(frozen=True)
class LlmPrunerConfig:
    """Hyperparameters of LLM-Pruner; `llmsurgery methods llm-pruner` prints them with their help."""

    sparsity: float | None = option(None, "share of heads and channels that goes, above 0 and below 1; none: 0.25")
    part: str = option("both", "what is removed", ("both", "heads", "channels"))
    score: str = option("param_first", "how entries of a group are scored", SCORES)
    samples: int = option(10, "windows of --calibration at most", minimum=1)
    window: int = option(64, "tokens of a window, at most the model's context", minimum=2)
    training: TrainingConfig = field(default_factory=_training)


@dataclass(frozen=True)
class Prepared:
    """What is scored, and what is trained on if anything is."""

    windows: Sequence[Window]
    rows: Sequence[Encoded]


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
        recovers=True,
        lr_scale=10.0,
        presets={"paper": {"epochs": 2, "lr": 1e-4, "batch_size": 64, "rank": 8}},
    )
    config_type = LlmPrunerConfig

    def plan(self, config: LlmPrunerConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the tensors that may become smaller, and those that recovery moves.

        Raises:
            UsageError: The share is out of bounds, or training is described and no step of it asked for.
            UnsupportedError: The model has other matrices.
        """
        from llmsurgery.errors import UnsupportedError

        share_of(config)
        if not self.spec.trains(config):
            require_untouched(config.training)
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
        channels = members(structure, CHANNELS) if config.part != "heads" else []
        return together(heads, channels, self.moved(config, structure))

    def moved(self, config: LlmPrunerConfig, structure: Structure) -> list[RoleTensor]:
        """Return the tensors that recovery moves; none without it."""
        return trained_tensors(config.training, structure) if self.spec.trains(config) else []

    def trained_rows(self, prepared: Prepared) -> Sequence[Encoded]:
        """Return what recovery trains on."""
        return prepared.rows

    def trained_model(
        self, config: LlmPrunerConfig, structure: Structure, model: PreTrainedModel
    ) -> PreTrainedModel:  # fmt: skip
        """Return the model that recovery trains, made of one on the meta device: which groups go is all one."""
        import torch

        from llmsurgery.methods.pruned_recovery import shrink

        counts = counts_of(config, structure, model.config.get_text_config())
        keep = {
            kind: dict.fromkeys(range(structure.layers), torch.arange(count)) for kind, count in counts.kept.items()
        }
        return shrink(model, slices(structure, counts, keep), counts.settings(structure))

    def working(
        self, config: LlmPrunerConfig, structure: Structure, prepared: Prepared, rows: int | None
    ) -> list[Working]:
        """Return what is held beside the model while gradients are summed up: the sums, and what one matrix takes."""
        sizes = [t.parameters for roles in KINDS.values() for t in members(structure, roles) if len(t.shape) == 2]
        sums = (8 if config.score in SQUARED else 4) * sum(sizes)
        return [Working("gradients", 0, 1, len(prepared.windows[0]), sums + 4 * 4 * max(sizes), backward=True)]

    def prepare(self, config: LlmPrunerConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> Prepared:
        """Cut the calibration text into windows, and encode what recovery trains on.

        Raises:
            InputError: The text has less than one window, or a row is too long to be trained on.
        """
        from llmsurgery.data.windows import pack_windows
        from llmsurgery.methods.pruned_recovery import recovery_rows

        length = min(config.window, encoder.max_length)
        windows = pack_windows(encoder, data["calibration"], length, config.samples, "calibration")
        trains = self.spec.trains(config)
        return Prepared(windows, recovery_rows(config.training, encoder, data["calibration"]) if trains else [])

    def edit(self, config: LlmPrunerConfig, operation: Operation, prepared: Prepared) -> MethodResult:
        """Score the groups of every block, cut the lowest out, and train what is left if that is asked for."""
        from llmsurgery.edits.kinds import Config

        structure, windows = operation.structure, prepared.windows
        if len(windows) < config.samples:
            operation.progress.notice(f"--calibration gives {len(windows)} windows, {config.samples} were asked for")
        source = operation.model.config.get_text_config()
        counts = counts_of(config, structure, source)
        if config.part != "channels" and counts.kept_groups == counts.groups:
            operation.progress.notice(
                f"no fewer than {counts.heads} heads divide the width {source.hidden_size}: all heads stay"
            )
        found = group_scores(config.score, operation, windows, counts.whole)
        keep = {
            kind: {layer: highest(scores, counts.kept[kind]) for layer, scores in blocks.items()}
            for kind, blocks in found.items()
            if counts.kept[kind] < counts.whole[kind]
        }
        cut, settings = slices(structure, counts, keep), counts.settings(structure)
        edits: list[Edit] = [edit for _, edit in cut]
        targets = [target for target, _ in cut]
        record: dict[str, object] = {
            "kept_heads": counts.kept_heads,
            "kept_key_value_heads": counts.kept_groups,
            "kept_channels": counts.kept_channels,
            "heads": counts.heads,
            "channels": counts.channels,
            "windows": len(windows),
            "window_tokens": len(windows[0]),
        }
        check = None
        if self.spec.trains(config):
            from llmsurgery.methods.pruned_recovery import recover

            moved = self.moved(config, structure)
            recovered = recover(operation, config.training, moved, cut, settings, prepared.rows)
            edits += recovered.edits
            targets, check = together(targets, moved), recovered.check
            record |= recovered.record
        edits += [Config(("config.json", name), value) for name, value in settings.items()]
        return MethodResult(edits, record, targets, check=check)


def together(*parts: Sequence[RoleTensor]) -> list[RoleTensor]:
    """Return several lists of tensors as one that has each tensor once."""
    return list({target.stored: target for part in parts for target in part}.values())


def counts_of(config: LlmPrunerConfig, structure: Structure, settings: Any) -> Counts:
    """Return how many heads and channels stay.

    Args:
        config: Hyperparameters.
        structure: The checkpoint's roles.
        settings: The config of the model's text part.

    Raises:
        NoEffectError: All of them.
    """
    heads = int(settings.num_attention_heads)
    groups = int(getattr(settings, "num_key_value_heads", None) or heads)
    channels = next(tensor.shape[0] for tensor in structure.tensors if tensor.role == "mlp.gate")
    share, kept_groups, kept_channels = share_of(config), groups, channels
    if config.part != "channels":
        kept_groups = groups_kept(groups, heads // groups, int(settings.hidden_size), share)
    if config.part != "heads":
        kept_channels = channels_kept(channels, share)
    if (kept_groups, kept_channels) == (groups, channels):
        raise NoEffectError("no head and no channel can go", "no smaller number is allowed", "raise --sparsity")
    return Counts(heads, groups, channels, kept_groups, kept_channels)


def require_untouched(training: TrainingConfig) -> None:
    """Refuse hyperparameters of a training that does not take place.

    Raises:
        UsageError: Names them.
    """
    usual = as_record(_training())
    if given := [name for name, value in as_record(training).items() if value != usual[name]]:
        raise UsageError(
            f"{', '.join(given)} would do nothing",
            "it says how the pruned model is trained, and max_steps and epochs are 0",
            f"add --set max_steps=200 to recover what pruning cost, or drop {', '.join(given)}",
        )


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
