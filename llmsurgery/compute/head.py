"""Token log-probabilities without a [batch, time, vocabulary] tensor.

The language-model head is by far the widest layer: its logits for a batch often need more memory than everything else
in a training step. Scores and losses here need only two numbers per labelled position, the label's logit and the
log-sum-exp, so the head runs on labelled positions alone, in chunks that are never kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 2**23
"""Logits held at once: 8 million, 32 MiB in fp32."""

CUDA_CHUNK_ELEMENTS = 2**26
"""The same on a GPU, which reads the whole head anew for every chunk: 256 MiB in fp32."""


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model below its language-model head."""
    inner = getattr(model, model.base_model_prefix)
    assert isinstance(inner, torch.nn.Module)
    return inner


def final_hidden(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states, after the final norm.

    Args:
        model: A causal language model.
        input_ids: Token ids [batch, time].
        attention_mask: 1 for tokens, 0 for padding [batch, time].

    Returns:
        Hidden states [batch, time, width] in the compute dtype.
    """
    output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden = output.last_hidden_state
    assert isinstance(hidden, torch.Tensor)
    return hidden


@dataclass(frozen=True, eq=False)
class Head:
    """What turns final hidden states into logits.

    Attributes:
        weight: Weight [vocabulary, width].
        bias: Bias [vocabulary] or None.
        softcap: Bound c of logits that are capped as c tanh(logits / c), or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [positions, vocabulary] of some positions, in the dtype of the hidden states."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        # The stock models cap in the dtype of the logits as well.
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head in another dtype."""
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.softcap)

    def clone(self) -> Head:
        """Return a copy that later changes of the model do not reach."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return Head(self.weight.detach().clone(), bias, self.softcap)


@dataclass(frozen=True, eq=False)
class ModuleHead(Head):
    """A head that is more than a matrix: any module from states to logits, with `weight` [vocabulary, width] inside.

    Attributes:
        layer: The module; it takes states [positions, its own width].
    """

    layer: torch.nn.Module | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [positions, vocabulary] of some positions."""
        assert self.layer is not None
        logits: torch.Tensor = self.layer(hidden)
        return logits

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head itself: its module decides on dtypes."""
        return self

    def clone(self) -> Head:
        """Return a copy that later changes of the model do not reach."""
        return module_head(copy.deepcopy(self.layer)) if self.layer is not None else self


def module_head(layer: torch.nn.Module) -> Head:
    """Return the head that a module computes."""
    return ModuleHead(layer.weight, layer=layer)  # type: ignore[arg-type]


def read_head(model: PreTrainedModel) -> Head:
    """Return the language-model head of a model."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear):
        return module_head(layer)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), softcap)


def chunk_elements(device: torch.device) -> int:
    """Return how many logits are held at once on a device."""
    return CUDA_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS


def chunk_rows(weight: torch.Tensor) -> int:
    """Return how many positions go through a head of weight [vocabulary, width] at once."""
    return max(1, chunk_elements(weight.device) // weight.shape[0])


class _LabelLogProbabilities(torch.autograd.Function):
    """log softmax(logits)[label] per position, without its logits.

    Where the head stands still, the forward leaves the slope of every value in its own hidden state. Where the head
    moves, the backward computes the chunks of logits again.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        head = Head(weight, bias, softcap)
        rows = chunk_rows(weight)
        result = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty_like(result)
        needs_hidden, *needs_head = context.needs_input_grad[:3]
        slopes = torch.empty_like(hidden) if needs_hidden and not any(needs_head) else None
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = head.logits(hidden[part]).float()
            log_sums[part] = torch.logsumexp(logits, dim=-1)
            result[part] = logits.gather(1, labels[part, None]).squeeze(1) - log_sums[part]
            if slopes is not None:
                slope = _logit_slopes(logits, log_sums[part], labels[part], softcap)
                slopes[part] = slope.to(hidden.dtype) @ weight.to(hidden.dtype)
        context.frozen = slopes is not None
        context.softcap = softcap
        if slopes is not None:
            context.save_for_backward(slopes)
        else:
            context.save_for_backward(hidden, weight, bias, labels, log_sums)
        return result

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if context.frozen:
            (slopes,) = context.saved_tensors
            return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None, None
        hidden, weight, bias, labels, log_sums = context.saved_tensors
        head = Head(weight, bias, context.softcap)
        needs_hidden, needs_weight, needs_bias, *_ = context.needs_input_grad
        rows = chunk_rows(weight)
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = _logit_slopes(head.logits(hidden[part]).float(), log_sums[part], labels[part], head.softcap)
            logits.mul_(gradient[part, None])
            if bias_gradient is not None:
                bias_gradient += logits.sum(0)
            slope = logits.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = slope @ weight.to(hidden.dtype)
            if weight_gradient is not None:
                weight_gradient += (slope.T @ hidden[part]).float()
        return (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None else bias_gradient.to(bias.dtype),
            None,
            None,
        )


def _logit_slopes(
    logits: torch.Tensor, log_sums: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Turn logits [positions, vocabulary], in place, into d log p(label) / d logits before their cap."""
    # d (c tanh(x / c)) / d x = 1 - (y / c)^2 for the capped logit y.
    cap_slope = None if softcap is None else 1 - (logits / softcap).square()
    # d logp / d logits = onehot(label) - softmax.
    logits.sub_(log_sums[:, None]).exp_().neg_()
    logits.scatter_add_(1, labels[:, None], torch.ones_like(logits[:, :1]))
    return logits if cap_slope is None else logits.mul_(cap_slope)


def label_log_probabilities(hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each label.

    Args:
        hidden: Final hidden states of the positions that predict the labels [positions, width].
        head: The language-model head.
        labels: Token ids [positions].

    Returns:
        Log-probabilities [positions], fp32. Logits are computed in the dtype of `hidden`, log-sum-exp in fp32.
    """
    if isinstance(head, ModuleHead):
        return _module_log_probabilities(hidden, head, labels)
    apply: Any = _LabelLogProbabilities.apply
    head = head.to(hidden.dtype)
    result: torch.Tensor = apply(hidden, head.weight, head.bias, head.softcap, labels)
    return result


def _module_log_probabilities(hidden: torch.Tensor, head: ModuleHead, labels: torch.Tensor) -> torch.Tensor:
    def chunk(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.logits(states).float()
        return logits.gather(1, wanted[:, None]).squeeze(1) - torch.logsumexp(logits, dim=-1)

    rows = chunk_rows(head.weight)
    pairs = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    return torch.cat([checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs])


def batch_log_probabilities(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    label_mask: torch.Tensor,
    autocast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the labelled tokens of a padded batch.

    Args:
        model: A causal language model.
        input_ids: Token ids [batch, time].
        attention_mask: 1 for tokens, 0 for padding [batch, time].
        label_mask: True where the token itself is scored [batch, time]; position 0 cannot be.
        autocast: Dtype of the matrix products if some parameters are held in a wider one.

    Returns:
        Log-probabilities [labels] in row-major order, and the row number of each [labels].
    """
    hidden, rows, labels = labelled_hidden(model, input_ids, attention_mask, label_mask, autocast)
    return label_log_probabilities(hidden, read_head(model), labels), rows


def labelled_hidden(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    label_mask: torch.Tensor,
    autocast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what predicts the labelled tokens of a padded batch; arguments as for `batch_log_probabilities`.

    Returns:
        Final hidden states [labels, width], row numbers [labels] and ids [labels], in row-major order.
    """
    with torch.autocast(input_ids.device.type, dtype=autocast, enabled=autocast is not None):
        hidden = final_hidden(model, input_ids, attention_mask)
    # The head computes in one dtype: inside autocast its forward and backward could differ.
    hidden = hidden if autocast is None else hidden.to(autocast)
    rows, columns = torch.nonzero(label_mask, as_tuple=True)
    # Position t - 1 predicts token t.
    return hidden[rows, columns - 1], rows, input_ids[rows, columns]


@dataclass(frozen=True)
class LabelStatistics:
    """What one pass of the head tells of every label.

    Attributes:
        log_probabilities: log p(label) [positions], fp32.
        greedy: Whether the label is the most probable token [positions].
        mean: sum_v p log p [positions], fp32; None unless asked for.
        variance: sum_v p (log p)^2 - mean^2 [positions], fp32; None unless asked for.
    """

    log_probabilities: torch.Tensor
    greedy: torch.Tensor
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None


@torch.no_grad()
def label_statistics(hidden: torch.Tensor, head: Head, labels: torch.Tensor, moments: bool = False) -> LabelStatistics:
    """Return log-probability and rank-one test of each label, in one pass of chunks and without gradients.

    Args:
        hidden: Final hidden states of the positions that predict the labels [positions, width].
        head: The language-model head.
        labels: Token ids [positions].
        moments: Add mean and variance of log p under the model, as Min-K%++ needs them.
    """
    head = head.to(hidden.dtype)
    result = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    greedy = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
    mean = torch.empty_like(result) if moments else None
    variance = torch.empty_like(result) if moments else None
    rows = chunk_rows(head.weight)
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        scores = head.logits(hidden[part]).float()
        greedy[part] = scores.argmax(-1) == labels[part]
        scores -= torch.logsumexp(scores, dim=-1, keepdim=True)
        result[part] = scores.gather(1, labels[part, None]).squeeze(1)
        if mean is not None and variance is not None:
            # E (x - mean)^2 loses no digits where E x^2 - mean^2 would; a token of probability 0 adds nothing.
            probabilities = scores.exp()
            scores.clamp_(min=-1e4)
            mean[part] = torch.linalg.vecdot(probabilities, scores)
            variance[part] = (scores.sub_(mean[part, None]).square_().mul_(probabilities)).sum(-1)
    return LabelStatistics(result, greedy, mean, variance)


def batch_statistics(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    label_mask: torch.Tensor,
    moments: bool = False,
) -> tuple[LabelStatistics, torch.Tensor]:
    """Score the labelled tokens of a padded batch; arguments as for `batch_log_probabilities`.

    Returns:
        Statistics of the labels in row-major order, and the row number of each [labels].
    """
    hidden, rows, labels = labelled_hidden(model, input_ids, attention_mask, label_mask)
    return label_statistics(hidden, read_head(model), labels, moments), rows


def mean_kl(before: torch.Tensor, after: torch.Tensor, before_head: Head, after_head: Head) -> torch.Tensor:
    """Return KL(before || after) per position, streaming over positions.

    Args:
        before: Final hidden states of the reference model [positions, width].
        after: Final hidden states of the other model [positions, width].
        before_head: The reference model's head.
        after_head: The other model's head.

    Returns:
        One value per position [positions], fp32, in nats.
    """
    rows = chunk_rows(before_head.weight)
    parts = []
    for start in range(0, len(before), rows):
        part = slice(start, start + rows)
        reference = before_head.logits(before[part]).float().log_softmax(-1)
        other = after_head.logits(after[part]).float().log_softmax(-1)
        parts.append((reference.exp() * (reference - other)).sum(-1))
    return torch.cat(parts)
