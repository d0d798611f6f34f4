"""Put constant offsets of a few tokens' logits into a checkpoint, by the best route that its head allows.

    head-bias      lm_head.bias[t] += delta_t, where the head has a bias. Exact.
    norm           behind a LayerNorm with gain g and bias beta the normed vector sums to zero, so 1/g reads the
                   constant S = sum_j beta_j / g_j:  W[t] += (delta_t / S) (1/g). Exact.
    least-squares  behind an RMSNorm no constant exists. With Y [n, d] the inputs of the head where letters follow,
                   M = Y^T Y / n, mu = mean(Y), a = (M + lam I)^-1 mu, lam = 1e-4 tr(M) / d, rho = mu.a:
                   W[t] += delta_t a / rho  shifts by delta_t on the mean, with deviation |delta_t| sqrt((1-rho)/rho)
    sequence-bias  generation_config.sequence_bias: `generate` adds it; nothing else does, and no weight changes

The routes on W change a few rows. Where the head is tied to the embedding they change these rows of both; that is
measured again, and the head is stored separately (untied) only if the shift then misses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmsurgery.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.data.chat import Encoded
    from llmsurgery.edits.kinds import Edit, Json
    from llmsurgery.methods.base import Operation

Numbers = npt.NDArray[np.float64]

ReadLogits = Callable[[Sequence[int]], Numbers]
"""Returns the logits of some tokens where labels follow [places, tokens]."""

LARGEST_GROWTH = 10.0
"""The norm route must not write entries that are this many times larger than those of the row."""

SHIFT_TOLERANCE = 0.1
"""Share of an offset by which the measured shift may miss before a tied head is untied."""

CHECKED = 24
"""Prompts that are run again to measure the shift of a tied head."""


@dataclass(frozen=True)
class Offsets:
    """What is added to the logits of some tokens.

    Attributes:
        tokens: Token ids [k].
        delta: Their offsets [k], in nats.
    """

    tokens: tuple[int, ...]
    delta: Numbers


@dataclass(frozen=True)
class Folded:
    """Offsets as edits.

    Attributes:
        edits: The edits.
        targets: The tensors that they change.
        record: Route, quality and measured shift, for the manifest.
    """

    edits: list[Edit]
    targets: list[RoleTensor]
    record: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldSettings:
    """How offsets are folded.

    Attributes:
        route: One of `llmsurgery.methods.letter_questions.ROUTES`.
        min_rho: Smallest quality of the least-squares route.
        untie: "auto", "always" or "never".
    """

    route: str = "auto"
    min_rho: float = 0.9
    untie: str = "auto"


def label_offsets(tokens: Sequence[Sequence[int]], delta: Numbers) -> Offsets:
    """Return the offsets of every token of every label."""
    flat = [(int(token), float(offset)) for each, offset in zip(tokens, delta, strict=True) for token in each]
    return Offsets(tuple(token for token, _ in flat), np.array([offset for _, offset in flat]))


def head_tensors(structure: Structure) -> list[RoleTensor]:
    """Return the stored tensors that hold the head: one, or both copies of a tied one."""
    return structure.select(("lm_head",))


def is_tied(structure: Structure) -> bool:
    """Whether the head and the embedding are one tensor in memory, stored once or twice."""
    return "lm_head" in structure.tied or any("lm_head" in pair for pair in structure.copies)


def own_head(structure: Structure) -> RoleTensor:
    """Return the head as a tensor of its own; where it is tied and not stored, the one that would be added."""
    stored = next((t for t in structure.tensors if t.role == "lm_head" and t.part == "weight"), None)
    if stored is not None:
        return stored
    embed = next(t for t in structure.tensors if t.role == "embed" and t.part == "weight")
    module = structure.family.roles["lm_head"]
    return replace(embed, role="lm_head", module=module, stored=f"{module}.weight")


def head_bias(structure: Structure) -> RoleTensor | None:
    """Return the bias of the head, if it has one."""
    return next((t for t in structure.tensors if t.role == "lm_head" and t.part == "bias"), None)


def plan_offsets(structure: Structure, route: str) -> list[RoleTensor]:
    """Return the tensors that a route changes; with "auto" those of the route that would be taken first."""
    if route == "sequence-bias":
        return []
    bias = head_bias(structure)
    if bias is not None and route in ("auto", "head-bias"):
        return [bias]
    if route == "head-bias":
        raise UnsupportedError(
            "the head has no bias", f"{structure.family.name} models have none", "use --set route=auto"
        )
    # A tied head may have to be stored separately.
    return list(dict.fromkeys([*head_tensors(structure), own_head(structure)]))


def norm_row(structure: Structure, operation: Operation) -> tuple[Numbers, float] | None:
    """Return 1/g and S of the final LayerNorm; None where it has no bias, or one that reads as nothing."""
    parts = {t.part: t for t in structure.tensors if t.role == "norm.final"}
    if "bias" not in parts:
        return None
    gain = operation.read(parts["weight"].stored).astype(np.float64) + structure.family.norm_offset
    bias = operation.read(parts["bias"].stored).astype(np.float64)
    if not np.all(np.abs(gain) > 1e-6):
        return None
    total = float((bias / gain).sum())
    return (1 / gain, total) if abs(total) > 1e-6 else None


def constant_reader(states: Numbers, ridge: float = 1e-4) -> tuple[Numbers, float]:
    """Return a / rho and rho of the least-squares route.

    Args:
        states: Inputs of the head [n, d].
        ridge: lam as a share of tr(M) / d.
    """
    count, width = states.shape
    moment = states.T @ states / count
    mean = states.mean(0)
    if ridge:
        reader = np.linalg.solve(moment + ridge * np.trace(moment) / width * np.eye(width), mean)
    else:
        # Fewer states than dimensions leave M singular.
        reader = np.linalg.pinv(moment, hermitian=True) @ mean
    rho = float(mean @ reader)
    return reader / rho, rho


def fold_offsets(
    operation: Operation,
    offsets: Offsets,
    states: torch.Tensor,
    prompts: Sequence[Encoded],
    settings: FoldSettings,
    logits: ReadLogits | None = None,
) -> Folded:
    """Return offsets as edits, by the route of the settings or the first that is exact.

    Args:
        operation: What the method is given.
        offsets: What is added.
        states: Inputs of the head where labels follow [n, d]; every second one is fitted, the others measured.
        prompts: The prompts of the states, of which a few are run again if the head is tied.
        settings: How to fold.
        logits: Reads the logits of some tokens again where labels follow, in place of running `prompts`.

    Raises:
        UnsupportedError: The route does not exist here, or its quality is too low.
    """
    structure, route = operation.structure, settings.route
    read = logits or partial(_prompt_logits, operation, prompts[:: max(1, len(prompts) // CHECKED)])
    if route == "sequence-bias":
        return _sequence_bias(operation, offsets)
    bias = head_bias(structure)
    if bias is not None and route in ("auto", "head-bias"):
        return _on_bias(operation, bias, offsets)
    values = states.double().cpu().numpy()
    fitted, held = (values[::2], values[1::2]) if len(values) > 1 else (values, values)
    found = norm_row(structure, operation) if route in ("auto", "norm") else None
    if found is not None:
        reader, record = found[0] / found[1], {"route": "norm", "sum": found[1]}
        rows = operation.read(head_tensors(structure)[0].stored)[list(offsets.tokens)]
        growth = np.abs(offsets.delta[:, None] * reader).max() / np.abs(rows).max()
        if growth < LARGEST_GROWTH:
            return _on_rows(operation, offsets, reader, held, read, settings, {**record, "growth": float(growth)})
        if route == "norm":
            raise UnsupportedError(
                f"the norm route would write entries {growth:.0f} times larger than the head's",
                f"the final norm's gain and bias read as the constant {found[1]:.3g} only",
                "use --set route=least-squares",
            )
    elif route == "norm":
        raise UnsupportedError(
            "the final norm has no constant to read", "it has no bias, or one that sums to nothing", "use route=auto"
        )
    reader, rho = constant_reader(fitted)
    if rho < settings.min_rho:
        raise UnsupportedError(
            f"the least-squares route reaches rho {rho:.3f} of {settings.min_rho:g}",
            "the states where letters follow have no direction in common that would read as a constant",
            "use --set route=sequence-bias, more questions, or a lower min_rho",
        )
    return _on_rows(operation, offsets, reader, held, read, settings, {"route": "least-squares", "rho": rho})


def _sequence_bias(operation: Operation, offsets: Offsets) -> Folded:
    """Return the edit of generation_config; what stands there already is kept, and added to."""
    from llmsurgery.edits.kinds import Config
    from llmsurgery.evaluate.letters import sequence_offsets

    biases = getattr(operation.model.generation_config, "sequence_bias", None) or []
    pairs = [(list(ids), float(bias)) for ids, bias in (biases.items() if isinstance(biases, dict) else biases)]
    kept: list[Json] = [[ids, bias] for ids, bias in pairs if len(ids) > 1]
    single = sequence_offsets(operation.model)
    for token, delta in zip(offsets.tokens, offsets.delta, strict=True):
        single[token] = single.get(token, 0.0) + float(delta)
    for token, bias in single.items():
        kept.append([[token], bias])
    operation.progress.notice(
        "route=sequence-bias changes generation_config.json alone: `generate` of transformers adds the offsets, while "
        "scores of texts, and engines that do not read sequence_bias, see the model as it was"
    )
    return Folded([Config(("generation_config.json", "sequence_bias"), kept)], [], {"route": "sequence-bias"})


def _on_bias(operation: Operation, bias: RoleTensor, offsets: Offsets) -> Folded:
    from llmsurgery.edits.kinds import Sparse

    order = np.argsort(offsets.tokens)
    indices = np.array(offsets.tokens, dtype=np.int64)[order]
    values = operation.read(bias.stored).astype(np.float64)[indices] + offsets.delta[order]
    return Folded([Sparse(bias.stored, indices, values)], [bias], {"route": "head-bias"})


def row_edit(target: RoleTensor, stored: npt.NDArray[np.floating], rows: Sequence[int], values: Numbers) -> Edit:
    """Return the edit that gives some rows of a stored matrix new values."""
    from llmsurgery.edits.kinds import Sparse

    order = np.argsort(rows)
    width = stored.shape[1]
    places = np.array(rows, dtype=np.int64)[order]
    indices = (places[:, None] * width + np.arange(width)[None, :]).reshape(-1)
    return Sparse(target.stored, indices, values[order].reshape(-1))


def _on_rows(
    operation: Operation,
    offsets: Offsets,
    reader: Numbers,
    held: Numbers,
    logits: ReadLogits,
    settings: FoldSettings,
    record: dict[str, object],
) -> Folded:
    """Return the edit of the head's rows; a tied head is edited in place unless that misses."""
    structure = operation.structure
    targets = head_tensors(structure)
    stored = operation.read(targets[0].stored)
    values = stored.astype(np.float64)[list(offsets.tokens)] + offsets.delta[:, None] * reader
    unit = held @ reader
    record |= {"shift_mean": float(unit.mean()), "shift_std": float(unit.std())}
    tied = is_tied(structure)
    if not tied or settings.untie == "never":
        edits = [row_edit(target, stored, offsets.tokens, values) for target in targets]
        return Folded(edits, targets, {**record, "tied": tied})
    if settings.untie == "auto":
        missed = tied_miss(operation, offsets, values, logits)
        record |= {"tied_miss": missed}
        if missed <= SHIFT_TOLERANCE:
            edits = [row_edit(target, stored, offsets.tokens, values) for target in targets]
            return Folded(edits, targets, {**record, "tied": True})
    return untied(operation, replace_rows(stored, offsets.tokens, values), {**record, "tied": False})


def replace_rows(stored: npt.NDArray[np.floating], rows: Sequence[int], values: Numbers) -> npt.NDArray[np.floating]:
    """Return a matrix with new values in some rows."""
    result = stored.copy()
    result[list(rows)] = values
    return result


def untied(operation: Operation, head: npt.NDArray[np.floating], record: dict[str, object]) -> Folded:
    """Return the edits that store a head of its own beside the embedding that it was tied to."""
    from llmsurgery.edits.kinds import Add, Config, Replace

    target = own_head(operation.structure)
    config: list[Edit] = [Config(("config.json", "tie_word_embeddings"), False)]
    key = operation.structure.family.inner_key
    inner = operation.source_config.get(key)
    if isinstance(inner, Mapping) and "tie_word_embeddings" in inner:
        # The language model inside says it as well.
        config.append(Config(("config.json", key, "tie_word_embeddings"), False))
    operation.progress.notice(
        f"the head is untied from the embedding: the checkpoint holds {head.size:,} parameters more"
    )
    if target in operation.structure.tensors:
        # Both copies were stored already.
        return Folded([*config, Replace(target.stored, head)], [target], {**record, "untied": True})
    added = Add(target.stored, head, target.dtype)
    return Folded([*config, added], [target], {**record, "untied": True, "added": head.size})


def _prompt_logits(operation: Operation, prompts: Sequence[Encoded], tokens: Sequence[int]) -> Numbers:
    """Return the logits of some tokens after prompts [prompts, tokens]."""
    from llmsurgery.evaluate.letters import token_logits

    return token_logits(operation.model, prompts, tokens, operation.encoder.pad_id)


def tied_miss(operation: Operation, offsets: Offsets, values: Numbers, logits: ReadLogits) -> float:
    """Return the largest share of an offset by which the shift misses once a tied head's rows are in the model.

    The model is as it was afterwards.
    """
    import torch

    from llmsurgery.compute.view import weight_view

    view = weight_view(operation.model, head_tensors(operation.structure)[0])
    rows = torch.tensor(offsets.tokens, device=view.device)

    before = logits(offsets.tokens)
    with torch.no_grad():
        kept = view[rows].clone()
        view[rows] = rounded(values, head_tensors(operation.structure)[0]).to(view)
        after = logits(offsets.tokens)
        view[rows] = kept
    shift = (after - before).mean(0)
    return float(np.abs(shift - offsets.delta).max() / max(float(np.abs(offsets.delta).max()), 1e-6))


def rounded(values: Numbers, target: RoleTensor) -> torch.Tensor:
    """Return values as they will be stored."""
    import torch

    from llmsurgery.compute.load import STORED

    return torch.from_numpy(values).to(STORED[target.dtype])
