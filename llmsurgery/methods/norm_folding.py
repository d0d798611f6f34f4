"""Norms as constants and their gains folded into the matrices that read them: new values of stored tensors.

With C = I - 11^T / d (a LayerNorm takes off the mean; an RMSNorm does not, C = I), gain g, bias b, a matrix W [inputs,
outputs] with bias c that reads the norm, a constant sigma and s = `scale`:

    constants        weight = g s / sigma, bias = b                     and eps = s^2 for the whole config:
                     (x - mean) / sqrt(var + s^2) = (x - mean) / s up to var / (2 s^2)
    folded           W' = C diag(g / sigma) W, c' = c + b W, weight = s, bias = 0, eps = s^2
    gains alone      W' = C diag(g) W, c' = c + b W, weight = 1, bias = 0, eps as it was

A reader without a bias cannot take b: then the norm keeps b divided by the factor that moved, and W' is not centred.
Everything is computed in fp64 and rounded once, when it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmsurgery.arch.norms import FINAL, Norm, Reader, norms_of, readers_of
from llmsurgery.arch.spec import RoleTensor, Structure

Values = npt.NDArray[np.float64]
Read = Callable[[str], npt.NDArray[np.floating]]

SMALLEST_GAIN = 1e-6
"""Gain, over the largest, below which a bias cannot be divided by it."""


@dataclass
class Folded:
    """New values of stored tensors.

    Attributes:
        values: Stored name -> values.
        kept: Norms that were not folded.
    """

    values: dict[str, Values] = field(default_factory=dict)
    kept: list[Norm] = field(default_factory=list)


def folding_targets(structure: Structure) -> list[RoleTensor]:
    """Return the tensors that folding changes: norms that matrices alone read, and these matrices with their biases."""
    found: dict[str, RoleTensor] = {}
    for norm in norms_of(structure):
        readers = readers_of(structure, norm)
        members = [norm.weight, norm.bias] if readers else []
        members += [tensor for reader in readers for tensor in (reader.weight, _bias_in_use(norm, readers, reader))]
        found |= {tensor.stored: tensor for tensor in members if tensor is not None}
    return list(found.values())


def _bias_in_use(norm: Norm, readers: list[Reader], reader: Reader) -> RoleTensor | None:
    """Return the bias of a reader that takes the norm's bias: all readers must have one."""
    takes = norm.bias is not None and all(other.bias is not None for other in readers)
    return reader.bias if takes else None


def constant_norms(structure: Structure, read: Read, sigmas: Mapping[str, float], scale: float) -> Folded:
    """Return norms that divide by constants under eps = scale^2, and leave the matrices alone.

    Args:
        structure: The roles.
        read: Reads a stored tensor.
        sigmas: Name of a norm -> its constant.
        scale: s.
    """
    result = Folded()
    for norm in norms_of(structure):
        _as_constant(result, structure, norm, read, sigmas[norm.name], scale)
    return result


def folded_constants(structure: Structure, read: Read, sigmas: Mapping[str, float], scale: float) -> Folded:
    """Return the same with gain, bias and constant folded into the readers; what has none keeps them.

    The last norm keeps them too: the head is tied to the embedding or has no bias.

    Args:
        structure: The roles.
        read: Reads a stored tensor.
        sigmas: Name of a norm -> its constant.
        scale: s.
    """
    result = Folded()
    for norm in norms_of(structure):
        readers = [] if norm.role == FINAL else readers_of(structure, norm)
        if not readers or not _fold(result, structure, norm, readers, read, sigmas[norm.name], scale, True):
            _as_constant(result, structure, norm, read, sigmas[norm.name], scale)
            result.kept.append(norm)
    return result


def folded_gains(structure: Structure, read: Read, centre: bool) -> Folded:
    """Return gains and biases folded into the readers; the norms themselves stay.

    Args:
        structure: The roles.
        read: Reads a stored tensor.
        centre: Let what reads a LayerNorm ignore the mean of its inputs, which is zero.
    """
    result = Folded()
    for norm in norms_of(structure):
        readers = readers_of(structure, norm)
        if not readers or not _fold(result, structure, norm, readers, read, 1.0, 1.0, centre):
            result.kept.append(norm)
    return result


def _as_constant(result: Folded, structure: Structure, norm: Norm, read: Read, sigma: float, scale: float) -> None:
    offset = structure.family.norm_offset
    result.values[norm.weight.stored] = (_double(read, norm.weight) + offset) * (scale / sigma) - offset
    if norm.bias is not None:
        result.values[norm.bias.stored] = _double(read, norm.bias)


def _fold(
    result: Folded,
    structure: Structure,
    norm: Norm,
    readers: list[Reader],
    read: Read,
    sigma: float,
    scale: float,
    centre: bool,
) -> bool:
    """Fold one norm; return False, and change nothing, where its bias has no place to go."""
    offset = structure.family.norm_offset
    factor = (_double(read, norm.weight) + offset) / sigma
    bias = None if norm.bias is None else _double(read, norm.bias)
    stays = bias is not None and bool(bias.any()) and any(reader.bias is None for reader in readers)
    if stays and np.abs(factor).min() <= SMALLEST_GAIN * np.abs(factor).max():
        return False
    for reader in readers:
        weight = _inputs_first(_double(read, reader.weight), reader.weight)
        made = factor[:, None] * weight
        if centre and structure.family.norm_centres and not stays:
            made -= made.mean(0)
        result.values[reader.weight.stored] = np.ascontiguousarray(_inputs_first(made, reader.weight))
        own = _bias_in_use(norm, readers, reader)
        if own is not None and bias is not None:
            result.values[own.stored] = _double(read, own) + bias @ weight
    result.values[norm.weight.stored] = np.full_like(factor, scale - offset)
    if norm.bias is not None and bias is not None:
        result.values[norm.bias.stored] = bias / factor if stays else np.zeros_like(bias)
    return True


def _double(read: Read, tensor: RoleTensor) -> Values:
    return np.asarray(read(tensor.stored), dtype=np.float64)


def _inputs_first(values: Values, tensor: RoleTensor) -> Values:
    """Turn a matrix as stored into [inputs, outputs], or back."""
    return values if tensor.transposed else values.T
