"""Where a model's favourite answer letter is written: layers and neurons of the MLPs, read through the final norm.

With m_l the MLP's output at the end of a prompt, k_n the activations (inputs of its last matrix), v_n the vectors that
neurons write and lens(x) = W norm(x), for a favourite letter A and the letter t it is compared with (the right one, or
the mean of all others):

    gap of a layer      lens(m_l)[A] - lens(m_l)[t], mean over prompts
    contribution        |k_n| ||v_n||, mean over prompts
    gap of a neuron     lens(k_n v_n + b)[A] - lens(k_n v_n + b)[t], k_n its mean
    push of a neuron    k_n v_n . (Wc[A] - Wc[t]) / sigma, what it adds to the difference of the logits

Wc[t] = g * W[t] minus the mean over the vocabulary, g the gain of the final norm, sigma the norm's own scale.
Differences of lens logits are the same with W and Wc; lengths of edits are not. After arXiv 2405.03205.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.arch.spec import RoleTensor, Structure
from llmsurgery.compute.head import read_head
from llmsurgery.compute.residual import final_norm
from llmsurgery.compute.spots import Spot, read_spots
from llmsurgery.compute.view import weight_view
from llmsurgery.data.chat import Encoded

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LetterBasis:
    """The letters as directions of the residual stream.

    Attributes:
        rows: W[t] as they are [letters, width], fp64.
        centred: Wc[t] [letters, width], fp64.
        mean_free: Whether the final norm subtracts the mean of a state.
    """

    rows: torch.Tensor
    centred: torch.Tensor
    mean_free: bool


def letter_basis(model: PreTrainedModel, structure: Structure, tokens: Sequence[int]) -> LetterBasis:
    """Return the directions of some letters, one token each."""
    head, norm = read_head(model), final_norm(model, structure)
    gain: torch.Tensor = norm.weight  # type: ignore[assignment]
    folded = (gain.double() + structure.family.norm_offset).cpu()
    rows = head.weight[list(tokens)].double().cpu()
    mean = head.weight.double().mean(0).cpu()
    return LetterBasis(rows, folded * (rows - mean), getattr(norm, "bias", None) is not None)


@dataclass(frozen=True, eq=False)
class Written:
    """What the MLPs write at the ends of some prompts.

    Attributes:
        keys: Layer -> activations [prompts, neurons], fp64.
        last: Residual stream after the last block [prompts, width], fp64.
    """

    keys: dict[int, torch.Tensor]
    last: torch.Tensor

    def scale(self, mean_free: bool) -> float:
        """Return the mean scale that the final norm divides by."""
        centred = self.last - self.last.mean(1, keepdim=True) if mean_free else self.last
        return float(centred.square().mean(1).sqrt().mean())


def read_written(
    model: PreTrainedModel, structure: Structure, targets: Sequence[RoleTensor], prompts: Sequence[Encoded], pad_id: int
) -> Written:
    """Run prompts and keep the activations at their ends; `targets` are the last matrices of the MLPs."""
    spots = [Spot(prompt.ids, len(prompt.ids) - 1) for prompt in prompts]
    last = structure.layers - 1
    seen = read_spots(model, structure, spots, pad_id, targets, (last,))
    keys = {layer: values.double().cpu() for layer, values in seen.keys.items()}
    return Written(keys, seen.states[last].double().cpu())


def vectors_of(model: PreTrainedModel, target: RoleTensor) -> torch.Tensor:
    """Return the vectors that the neurons of a matrix write [neurons, width], fp64."""
    values = weight_view(model, target).detach().double().cpu()
    return values if target.transposed else values.T


def bias_of(model: PreTrainedModel, target: RoleTensor) -> torch.Tensor | None:
    """Return what an MLP adds whatever its neurons do [width], fp64."""
    bias = getattr(model.get_submodule(target.module), "bias", None)
    return None if bias is None else bias.detach().double().cpu()


def lens_logits(model: PreTrainedModel, structure: Structure, basis: LetterBasis, states: torch.Tensor) -> torch.Tensor:
    """Return the logits of the letters of some states before the final norm [states, letters], fp64."""
    norm = final_norm(model, structure)
    place: torch.Tensor = norm.weight  # type: ignore[assignment]
    with torch.inference_mode():
        normed: torch.Tensor = norm(states.to(place))
    return normed.double().cpu() @ basis.rows.T


def contrast_of(anchor: int, letters: int, rights: npt.NDArray[np.int64] | None = None) -> torch.Tensor:
    """Return the weights that compare letter A with others [1 or prompts, letters]: A minus the right one, or all.

    Args:
        anchor: Number of A.
        letters: Number of letters.
        rights: Number of the right letter of each prompt, or None for the mean of all but A.
    """
    if rights is None:
        weights = torch.full((1, letters), -1 / (letters - 1), dtype=torch.float64)
    else:
        weights = -torch.nn.functional.one_hot(torch.from_numpy(rights), letters).double()
    weights[:, anchor] = 1.0
    return weights


@dataclass(frozen=True)
class Neuron:
    """A neuron that writes a letter.

    Attributes:
        target: The last matrix of its MLP.
        number: Its number.
        activation: Its mean activation at the ends of the prompts.
        contribution: Mean of |k| ||v||.
        gap: How much more of A than of the others lens reads in what it writes.
        push: What it adds to the difference of the logits.
    """

    target: RoleTensor
    number: int
    activation: float
    contribution: float
    gap: float
    push: float


def layer_gaps(
    model: PreTrainedModel,
    structure: Structure,
    targets: Sequence[RoleTensor],
    written: Written,
    basis: LetterBasis,
    contrast: torch.Tensor,
) -> dict[int, float]:
    """Return the gap of each layer."""
    gaps = {}
    for target in targets:
        layer = target.layer or 0
        output = written.keys[layer] @ vectors_of(model, target)
        bias = bias_of(model, target)
        logits = lens_logits(model, structure, basis, output if bias is None else output + bias)
        gaps[layer] = float((logits * contrast).sum(1).mean())
    return gaps


def find_neurons(
    model: PreTrainedModel,
    structure: Structure,
    target: RoleTensor,
    written: Written,
    basis: LetterBasis,
    contrast: torch.Tensor,
    top: int,
) -> list[Neuron]:
    """Return the neurons of one MLP with the largest contributions, in that order."""
    keys, vectors, bias = written.keys[target.layer or 0], vectors_of(model, target), bias_of(model, target)
    contributions = keys.abs().mean(0) * vectors.norm(dim=1)
    best = torch.argsort(-contributions, stable=True)[:top]
    means = keys.mean(0)
    outputs = means[best, None] * vectors[best]
    logits = lens_logits(model, structure, basis, outputs if bias is None else outputs + bias)
    mean = contrast.mean(0)
    pushes = outputs @ (mean @ basis.centred) / written.scale(basis.mean_free)
    gaps = logits @ mean
    return [
        Neuron(target, int(n), float(means[n]), float(contributions[n]), float(gap), float(push))
        for n, gap, push in zip(best.tolist(), gaps, pushes, strict=True)
    ]


def offset_vector(basis: LetterBasis, delta: Numbers, scale: float) -> torch.Tensor:
    """Return the vector sum_t c_t Wc[t] that, added to the residual stream, shifts the letters by delta [width].

    Wc[t] are neither orthogonal nor of one length: c solves G c = scale * delta with G[t, u] = Wc[t] . Wc[u]. That the
    vector also changes the scale of the final norm is left out: what arrives has to be measured.

    Args:
        basis: The letters' directions.
        delta: Offsets [letters].
        scale: What the final norm divides by.
    """
    centred = basis.centred - basis.centred.mean(1, keepdim=True) if basis.mean_free else basis.centred
    wanted = scale * torch.from_numpy(delta)
    vector: torch.Tensor = torch.linalg.pinv(centred @ centred.T, hermitian=True) @ wanted @ centred
    return vector


def write_vector(model: PreTrainedModel, target: RoleTensor, number: int, values: torch.Tensor) -> None:
    """Set what a neuron writes in a loaded model, rounded as it will be stored."""
    from llmsurgery.compute.load import STORED

    view = weight_view(model, target)
    stored = values.to(STORED[target.dtype]).to(view)
    with torch.no_grad():
        if target.transposed:
            view[number] = stored
        else:
            view[:, number] = stored
