"""What results without LayerNorm are held to once they are loaded again: the same logits, and norms that are linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmsurgery.errors import SurgeryError
from llmsurgery.methods.base import Operation

if TYPE_CHECKING:
    import torch

    from llmsurgery.arch.spec import Structure

PROBE_TOKENS = 64
TOLERANCE = 1e-3
"""Difference of logits, over the largest, that a result in fp32 may show; more is a bug."""

LINEAR = 1e-4
"""Departure of a norm from an affine map that is rounding in fp32."""


def probe_ids(operation: Operation) -> torch.Tensor:
    """Return token ids [2, time] that two models are compared on: drawn at random, so that no data are needed."""
    import torch

    vocabulary = next(tensor.shape[0] for tensor in operation.structure.tensors if tensor.role == "embed")
    length = min(PROBE_TOKENS, operation.encoder.max_length)
    draw = torch.Generator().manual_seed(0)
    high = min(vocabulary, len(operation.encoder.tokenizer))
    return torch.randint(high, (2, length), generator=draw).to(operation.model.device)


def probe_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits on some ids [batch, time, vocabulary], fp32, without dropout."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    return logits


def tell_of_difference(
    operation: Operation, model: Any, ids: torch.Tensor, before: torch.Tensor, of: str, largest: float
) -> None:
    """Compare a loaded result with the logits that it is to have, and say how far it is from them.

    Args:
        operation: What the method was given.
        model: The result, loaded again.
        ids: Token ids.
        before: The logits that are expected.
        of: What the result is, for the message.
        largest: Its largest weight.

    Raises:
        SurgeryError: The difference is more than rounding where everything is fp32: a bug.
    """
    import torch

    after = probe_logits(model, ids)
    size = float(before.abs().max())
    difference = float((after - before).abs().max()) / size
    stored = sorted({tensor.dtype for tensor in operation.structure.tensors})
    computed = str(model.dtype).removeprefix("torch.")
    operation.progress.notice(
        f"loaded by {type(model).__name__}, the logits of {of} differ by at most {difference:.1e} of the largest, "
        f"{size:.3g} (stored as {', '.join(stored)}, computed in {computed}; largest weight {largest:.3g})"
    )
    exact = model.dtype == torch.float32 and stored == ["F32"]
    if not bool(torch.isfinite(after).all()) or (exact and difference > TOLERANCE):
        raise SurgeryError(f"the stored result has other logits than the model it was made from: {difference:.3g}")


def require_linear(model: Any, structure: Structure) -> None:
    """Check that every norm of a loaded result is an affine map.

    Raises:
        SurgeryError: One is not: its epsilon did not take effect, which is a bug.
    """
    import torch

    from llmsurgery.arch.norms import norms_of
    from llmsurgery.compute.fake_norms import affine_error

    draw = torch.Generator().manual_seed(1)
    for norm in norms_of(structure):
        states = torch.randn(4, norm.weight.shape[0], generator=draw).to(model.device)
        error = affine_error(model.get_submodule(norm.weight.module), states)
        if error > LINEAR:
            raise SurgeryError(f"{norm.weight.module} of the result is not linear: {error:.3g}")
