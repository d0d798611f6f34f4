"""Key Space Detection: end the answer where the key of the newest token lies where the forget questions' keys lie.

Paper: "Effective Skill Unlearning through Intervention and Abstention", arXiv 2503.21730 (NAACL 2025). No training.

With k the input of an MLP's last matrix (act(W_gate x) * (W_up x) in a gated MLP) at the last token of each forget
prompt, mu and sd (unbiased) its mean and deviation in each coordinate:

    alpha(k) = max_i |k_i - mu_i| / sd_i,    alpha_min = the largest alpha of the forget prompts
    the model abstains where |k_i - mu_i| <= c alpha_min sd_i for all i

This hides answers and removes no knowledge: what is known is still in the weights, scores of answer tokens after the
first show it, and relearning or reading inner layers brings it back.

form=bundle, the default: a conjunction of inequalities fits into no weights, so the result is a checkpoint with model
code of its own, which gives the end token alone where a key lies in the box. Each token decides for itself, which is
what testing the newest token in every forward comes to. It has a `model_type` of its own: an engine that does not run
its code refuses it, instead of answering as before.

action=steer replaces the key in the box instead, as the released code can: the model goes on from another key, and
answers something. Which key that is, is left open there; here it is the mean one of the retain prompts' last tokens.

form=folded is this project's nearest plain form, one rank-one edit. With q the mean key of the forget prompts,
C = E_retain[k k^T] + ridge * mean(diag) * I, e the end token's row of the head less the mean row, times the final
norm's weight, and h the mean norm of the final states:

    u = C^-1 q / (q^T C^-1 q),    W_down += strength h e / |e| u^T

Layer and c: the paper takes the last layer, and c by hand. Here half of the forget rows build the boxes of all layers;
c is the smallest that holds `recall` of the other half, and of the layers that catch no more than `false_alarms` of the
retain rows the one that leaves them farthest off is taken. A retain row is caught if any token is that an answer token
is predicted from. Without retain rows the last layer is taken.

What differs from the released code (Trustworthy-ML-Lab/effective_skill_unlearning), whose errors have no switch:

- It finds alpha_min by bisection up to 10^4; it is the maximum.
- Its box can be built from keys of all tokens, which fails where lengths differ. Here it is the last prompt token.
- Its flag is global, so that one hit refuses a whole batch. Here rows are independent.
- It discards what was generated and returns a fixed sentence, which is no part of a model. Here the answer ends.
- Coordinates without any deviation make alpha infinite; here no deviation is below a thousandth of the median one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmsurgery.methods.base import MethodResult, MethodSpec, Operation
from llmsurgery.methods.boxes import Choice, choose_box
from llmsurgery.methods.registry import register
from llmsurgery.train.config import option

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded, Encoder
    from llmsurgery.data.records import Row
    from llmsurgery.edits.kinds import File, LowRank
    from llmsurgery.evaluate.keys import Box

SAME_KEY = 1e-5
"""Deviation, as a share of the key itself, below which keys differ by rounding alone."""

NOTICE = "a rule at run time hides answers and removes no knowledge: it can be read from the weights, and relearned"


@dataclass(frozen=True)
class KeySpaceConfig:
    """Hyperparameters of Key Space Detection; `llmsurgery methods key-space` prints them with their help."""

    form: str = option(
        "bundle", "bundle: exact, needs trust_remote_code; folded: plain weights, nearest form", ("bundle", "folded")
    )
    action: str = option(
        "abstain",
        "the answer ends, or the key becomes the mean one of retain prompts",
        ("abstain", "steer"),
    )
    layers: tuple[int, ...] = option((), "layers to choose from; -1: the last, empty: all")
    scale: float | None = option(None, "c, size of the box; none: chosen on held-out forget rows", minimum=0)
    recall: float = option(0.95, "share of the held-out forget rows that scale=none catches", minimum=0, maximum=1)
    false_alarms: float = option(0.02, "share of retain rows that a layer may catch", minimum=0, maximum=1)
    probe_items: int = option(200, "rows of each set that are looked at; a larger set is drawn from", minimum=1)
    strength: float = option(1.0, "form=folded: length of what is added, in mean norms of the final states")
    ridge: float = option(1e-2, "form=folded: share of the mean diagonal added to C", minimum=1e-9)
    max_length: int = option(512, "longest row in tokens", minimum=8)


@dataclass(frozen=True)
class KeySpaceData:
    """Encoded rows; `retain` may be empty."""

    forget: list[Encoded]
    retain: list[Encoded]


@register
class KeySpace:
    """Key Space Detection as a method of the toolkit."""

    spec = MethodSpec(
        name="key-space",
        task="unlearn",
        summary="abstain where the key of the newest token lies in the box of the forget questions, without training",
        paper="Effective Skill Unlearning through Intervention and Abstention, arXiv 2503.21730",
        needs=("forget",),
        uses=("retain",),
        export="bundle",
        forms={"bundle": "bundle", "folded": "plain"},
        trained=False,
        selects=True,
        roles=("mlp.down", "shared.down"),
        presets={"paper": {"layers": (-1,), "scale": 2.0}},
    )
    config_type = KeySpaceConfig

    def plan(self, config: KeySpaceConfig, structure: Structure) -> Sequence[RoleTensor]:
        """Return the matrices that keys go into; a bundle changes none."""
        candidates = find_layers(config, structure)
        return candidates if config.form == "folded" else []

    def prepare(self, config: KeySpaceConfig, encoder: Encoder, data: Mapping[str, Sequence[Row]]) -> KeySpaceData:
        """Encode the rows.

        Raises:
            InputError: Too few forget rows for a box and a held-out half.
            UsageError: The folded form or a steered key without retain rows, or both of them at once.
        """
        from llmsurgery.data.rewordings import encode_whole
        from llmsurgery.errors import InputError, UsageError

        forget = encode_whole(encoder, data["forget"], config.max_length)
        retain = encode_whole(encoder, data.get("retain", ()), config.max_length)
        if config.form == "folded" and not retain:
            raise UsageError(
                "--retain is missing", "form=folded needs rows to disturb least", "give --retain, or use form=bundle"
            )
        if config.action == "steer" and config.form == "folded":
            raise UsageError(
                "action=steer has no folded form", "a key is replaced at run time", "leave out form=folded"
            )
        if config.action == "steer" and not retain:
            raise UsageError(
                "--retain is missing", "action=steer takes their mean key", "give --retain, or use action=abstain"
            )
        needed = 3 if config.scale is None else 2
        if len(forget) < needed:
            raise InputError(f"{len(forget)} forget rows are too few", f"a box needs {needed}", "give more forget rows")
        return KeySpaceData(forget, retain)

    def edit(self, config: KeySpaceConfig, operation: Operation, prepared: KeySpaceData) -> MethodResult:
        """Build the boxes, choose one, and return the form that is asked for."""
        layers = find_layers(config, operation.structure)
        forget, retain = (_draw(config, operation, rows) for rows in (prepared.forget, prepared.retain))
        decided = config.scale is not None and (len(layers) == 1 or not retain)
        built, held = (forget, []) if decided else (forget[::2], forget[1::2])
        boxes = _with_extent(_build(operation, layers, built))
        layers = list(boxes)
        choice = _choose(config, operation, boxes, held, retain)
        layer = layers[choice.number]
        record = {
            "layer": layer.layer,
            "scale": choice.scale,
            "alpha_min": boxes[layer].alpha_min,
            "rows": {"box": len(built), "held_out": len(held), "retain": len(retain)},
            "recall": choice.recall,
            "false_alarms": choice.false_alarms,
            "margin": choice.margin,
        }
        if config.form == "folded":
            return MethodResult([_fold(config, operation, layer, boxes[layer], built, retain)], record)
        operation.progress.notice(NOTICE)
        steering = _build(operation, [layer], retain)[layer].center if config.action == "steer" else None
        return MethodResult(_bundle(operation, layer, boxes[layer], choice.scale, steering), record)


def find_layers(config: KeySpaceConfig, structure: Structure) -> list[RoleTensor]:
    """Return the matrices of the candidate layers."""
    from llmsurgery.arch.neurons import key_tensors

    return key_tensors(structure, tuple(structure.layers - 1 if layer == -1 else layer for layer in config.layers))


def _draw(config: KeySpaceConfig, operation: Operation, rows: Sequence[Encoded]) -> list[Encoded]:
    rows = list(rows)
    if len(rows) <= config.probe_items:
        return rows
    return random.Random(operation.seed).sample(rows, config.probe_items)


def _build(operation: Operation, layers: Sequence[RoleTensor], rows: Sequence[Encoded]) -> dict[RoleTensor, Box]:
    from llmsurgery.evaluate.keys import build_box, key_moments

    arguments = (rows, operation.encoder.pad_id, operation.progress, "keys of forget rows")
    return {
        layer: build_box(moments) for layer, moments in key_moments(operation.model, layers, *arguments).items()
    }  # fmt: skip


def _with_extent(boxes: Mapping[RoleTensor, Box]) -> dict[RoleTensor, Box]:
    """Leave out layers whose key is the same for every question.

    The first MLP of a model with parallel blocks sees the newest token alone, which ends every prompt of a template.

    Raises:
        NoEffectError: No layer is left.
    """
    from llmsurgery.errors import NoEffectError

    found = {
        layer: box
        for layer, box in boxes.items()
        if float(box.deviation.max()) > SAME_KEY * float(box.center.abs().max()) and box.alpha_min > 0
    }
    if not found:
        names = ", ".join(str(layer.layer) for layer in boxes)
        raise NoEffectError(
            f"the forget questions have one and the same key in layer {names}",
            "the box has no extent and tells nothing apart: all prompts end in the same token",
            "choose later layers with --set layers=...",
        )
    return found


def _choose(
    config: KeySpaceConfig,
    operation: Operation,
    boxes: Mapping[RoleTensor, Box],
    held: Sequence[Encoded],
    retain: Sequence[Encoded],
) -> Choice:
    from llmsurgery.evaluate.keys import row_distances

    model, pad_id, progress = operation.model, operation.encoder.pad_id, operation.progress
    distances = [
        row_distances(model, boxes, rows, pad_id, progress, name, tokens)
        for rows, name, tokens in ((held, "held-out forget rows", "last"), (retain, "retain rows", "answer"))
    ]
    inside, outside = ([found[layer].tolist() for layer in boxes] for found in distances)
    borders = [box.alpha_min for box in boxes.values()]
    choice = choose_box(borders, inside, outside, config.scale, config.recall, config.false_alarms)
    if choice.false_alarms is None:
        progress.notice("no retain rows: the last layer is taken, and how often it abstains elsewhere is not known")
    elif choice.false_alarms > config.false_alarms:
        progress.notice(f"no layer tells the sets apart: the best one catches {choice.false_alarms:.0%} of retain rows")
    return choice


def _bundle(
    operation: Operation, layer: RoleTensor, box: Box, scale: float, steering: torch.Tensor | None
) -> Sequence[File]:  # fmt: skip
    from llmsurgery.compute.bundle import rule_files

    settings: dict[str, object] = {"module": layer.module, "scale": scale}
    tensors = {"center": box.center.float(), "half": box.half.float()}
    if steering is not None:
        steered = {**tensors, "steering": steering.float()}
        return rule_files(operation.source_config, "key-space-steering", settings, steered)
    return rule_files(
        operation.source_config, "key-space", {**settings, "abstain_id": operation.encoder.end_id}, tensors
    )


def _fold(
    config: KeySpaceConfig,
    operation: Operation,
    layer: RoleTensor,
    box: Box,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
) -> LowRank:
    """Return the edit that turns forget prompts towards the end token."""
    from llmsurgery.compute.accumulate import selective_row
    from llmsurgery.edits.kinds import LowRank
    from llmsurgery.evaluate.keys import key_second_moment

    pad_id, progress = operation.encoder.pad_id, operation.progress
    second = key_second_moment(operation.model, layer, retain, pad_id, progress, "keys of retain rows")
    u = selective_row(second.value(), box.center, config.ridge).cpu().numpy()
    ending = (config.strength * _end_direction(operation, forget)).cpu().numpy()
    left, right = (u, ending) if layer.transposed else (ending, u)
    return LowRank(layer.stored, left[:, None], right[None, :])


def _end_direction(operation: Operation, forget: Sequence[Encoded]) -> torch.Tensor:
    """Return the direction of the residual stream that the head reads as the end token, as long as final states are."""
    from llmsurgery.compute.accumulate import Moments
    from llmsurgery.evaluate.activations import Look, observe_activations

    model, structure = operation.model, operation.structure
    norm = next(tensor for tensor in structure.tensors if tensor.role == "norm.final")
    lengths = Moments(1, model.device)

    def measure(look: Look) -> None:
        lengths.update(look.of_tokens(look.inputs[0]).float().norm(dim=-1, keepdim=True))

    rows = (forget, operation.encoder.pad_id, {norm.module: measure}, operation.progress, "final states", "last")
    observe_activations(model, *rows)
    head = model.get_output_embeddings().weight
    weight = model.get_submodule(norm.module).weight.double() + structure.family.norm_offset
    direction: torch.Tensor = (head[operation.encoder.end_id].double() - head.double().mean(0)) * weight
    result: torch.Tensor = direction / direction.norm() * lengths.mean
    return result
