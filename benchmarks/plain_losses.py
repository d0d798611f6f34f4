"""Unlearning losses as their papers print them: a second model copy as the reference, full logits, log_softmax.

Nothing of the toolkit's losses or heads is used here. Rows have one length, so that there is no padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import logsigmoid, one_hot
from transformers import PreTrainedModel

from benchmarks.training_setup import Loaded, Rows
from llmsurgery.data.chat import Encoded

Loss = Callable[[], torch.Tensor]
Batch = tuple[torch.Tensor, int]
"""Token ids [rows, time], and the first position of an answer."""


def batch(rows: Sequence[Encoded]) -> Batch:
    """Return rows as a batch."""
    return torch.tensor([row.ids for row in rows]), rows[0].answer_start


def logits(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Return all logits [rows, time, V], fp32."""
    result: torch.Tensor = model(input_ids=given[0], use_cache=False).logits.float()
    return result


def distributions(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Return log p at the positions that predict the answers [rows, answer, V]."""
    return logits(model, given).log_softmax(-1)[:, given[1] - 1 : -1]


def labels(given: Batch) -> torch.Tensor:
    """Return the answers [rows, answer, 1]."""
    return given[0][:, given[1] :, None]


def scores(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Return log p of the answer tokens [rows, answer]."""
    return distributions(model, given).gather(-1, labels(given)).squeeze(-1)


def cross_entropy(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Return the mean over answer tokens []."""
    return -scores(model, given).mean()


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) per position."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def second_copy(loaded: Loaded) -> PreTrainedModel:
    """Return a frozen copy of the model."""
    return copy.deepcopy(loaded.model).eval()


class Plain:
    """The losses of one model, by the name of their method.

    Args:
        model: The model, with its adapters.
        reference: The frozen copy; None where no loss asks for it.
        rows: The rows.
        config: The method's config.
        extra: What single losses need besides.
    """

    def __init__(
        self, model: PreTrainedModel, reference: PreTrainedModel | None, rows: Rows, config: Any, extra: Any = None
    ) -> None:
        self.model, self.config, self.extra = model, config, extra
        self._reference = reference
        self.forget, self.other, self.retain = (batch(part) for part in (rows.forget, rows.other, rows.retain))

    @property
    def reference(self) -> PreTrainedModel:
        """The frozen copy."""
        assert self._reference is not None
        return self._reference

    def number(self, name: str) -> float:
        """Return a number of the config."""
        return float(getattr(self.config, name))

    def ga(self) -> torch.Tensor:
        """Return minus the cross-entropy of the forget answers []."""
        return -cross_entropy(self.model, self.forget)

    def graddiff(self) -> torch.Tensor:
        """Return gradient difference []."""
        return self.ga() + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def kl_min(self) -> torch.Tensor:
        """Return ascent and the divergence from the reference on retain rows []."""
        with torch.no_grad():
            before = distributions(self.reference, self.retain)
        now = distributions(self.model, self.retain)
        return self.ga() + self.number("retain_weight") * divergence(before, now).mean()

    def _surprisals(self, given: Batch) -> torch.Tensor:
        """Return N - N_ref per row."""
        with torch.no_grad():
            before = scores(self.reference, given).sum(-1)
        return before - scores(self.model, given).sum(-1)

    def npo(self) -> torch.Tensor:
        """Return NPO with retain rows []."""
        beta = self.number("beta")
        forget = -(2 / beta) * logsigmoid(beta * self._surprisals(self.forget)).mean()
        return forget + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def dpo(self) -> torch.Tensor:
        """Return IdkDPO with retain rows []."""
        beta = self.number("beta")
        margin = self._surprisals(self.forget) - self._surprisals(self.other)
        forget = -(2 / beta) * logsigmoid(beta * margin).mean()
        return forget + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def simnpo(self) -> torch.Tensor:
        """Return SimNPO with retain rows []."""
        beta, delta = self.number("beta"), self.number("delta")
        forget = -(2 / beta) * logsigmoid(beta * (-scores(self.model, self.forget).mean(-1) - delta)).mean()
        return forget + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def undial(self) -> torch.Tensor:
        """Return self-distillation with lowered logits, and retain rows []."""
        with torch.no_grad():
            before = logits(self.reference, self.forget)[:, self.forget[1] - 1 : -1]
            lowered = before - self.number("beta") * one_hot(labels(self.forget).squeeze(-1), before.shape[-1])
            target = lowered.softmax(-1)
        forget = -(target * distributions(self.model, self.forget)).sum(-1).mean()
        return forget + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def flat(self) -> torch.Tensor:
        """Return FLAT with total variation."""
        answers, templates = (scores(self.model, part).exp().mean(-1) for part in (self.forget, self.other))
        return ((answers.tanh() - templates.tanh()) / 2).mean()

    def loku(self) -> torch.Tensor:
        """Return the inverted hinge loss with retain rows []."""
        p, y = distributions(self.model, self.forget).exp(), labels(self.forget)
        other = p.scatter(-1, y, -1.0).max(-1).values
        hinge = (self.number("margin") + p.gather(-1, y).squeeze(-1) - other).clamp(min=0).mean()
        return hinge + self.number("retain_weight") * cross_entropy(self.model, self.retain)

    def selective_amnesia(self) -> torch.Tensor:
        """Return -L_f + alpha L_r; alpha as in the epoch that takes the reference."""
        return self.ga() + self.number("weight_min") * cross_entropy(self.model, self.retain)

    def _stream(self, model: PreTrainedModel, given: Batch) -> torch.Tensor:
        """Return what a block writes at the answers, caught in a whole forward as the released codes do it."""
        caught: list[torch.Tensor] = []
        block = model.model.layers[self.extra["block"]]
        handle = block.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
        logits(model, given)
        handle.remove()
        return caught[0][:, given[1] :]

    def rmu(self) -> torch.Tensor:
        """Return the steering and the retain term []."""
        target: torch.Tensor = self.extra["target"]
        forget = (self._stream(self.model, self.forget) - target).square().mean()
        with torch.no_grad():
            before = self._stream(self.reference, self.retain)
        retain = (self._stream(self.model, self.retain) - before).square().mean()
        return self.number("forget_weight") * forget + self.number("retain_weight") * retain

    def uoe(self) -> torch.Tensor:
        """Return gradient difference and the anchor on the router's scores of the forget tokens."""
        caught: list[torch.Tensor] = []
        handle = self.extra["router"].register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
        forget = self.ga()
        handle.remove()
        s = caught[0].float().softmax(-1)
        anchor = (s - one_hot(torch.tensor(self.extra["expert"]), s.shape[1])).square().sum(-1).mean()
        return forget + self.number("anchor_weight") * anchor + cross_entropy(self.model, self.retain)

    def uld_assistant(self) -> torch.Tensor:
        """Return cross-entropy on forget rows and CE(uniform) - log V on all positions of the others."""
        others = torch.cat([self.retain[0], self.other[0]])
        log_p = logits(self.model, (others, 0)).log_softmax(-1)
        uniform = -log_p.mean(-1) - torch.tensor(float(log_p.shape[-1])).log()
        forget = -scores(self.model, self.forget).mean(-1).mean()
        return forget + float(self.config.assistant.beta) * uniform.mean()

    def uld_distillation(self) -> torch.Tensor:
        """Return KL(combination || student) at every position."""
        total = torch.zeros(())
        for given in (self.forget, self.retain):
            with torch.no_grad():
                target = combined(logits(self.reference, given), logits(self.extra, given), self.config)
            now = logits(self.model, given).log_softmax(-1)
            total = total + divergence(target.log_softmax(-1), now).mean() / 2
        return total

    def lat(self) -> torch.Tensor:
        """Attack, and return the loss under attack with the divergence on retain rows without it."""
        number, places, prompt = self.number, self.extra["places"], self.forget[1]
        width = self.model.lm_head.weight.shape[1]
        deltas = {place: torch.zeros(len(self.forget[0]), prompt, width).requires_grad_() for place in places}
        lr = number("eps") / (2 * width**0.5)
        optimizer = torch.optim.AdamW(deltas.values(), lr=lr, weight_decay=number("inner_weight_decay"))
        moving = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in moving:
            parameter.requires_grad_(False)
        for _ in range(int(number("pgd_steps"))):
            with attacked(self.model, deltas):
                toward = -scores(self.model, self.forget).mean(-1).sum()
                away = unlikely(self.model, self.other).mean(-1).sum()
            value = number("adversary_toward") * toward + number("adversary_away") * away
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            with torch.no_grad():
                for delta in deltas.values():
                    delta /= (delta.norm(dim=-1, keepdim=True) / number("eps")).clamp(min=1)
        for parameter in moving:
            parameter.requires_grad_(True)
        fixed = {place: delta.detach() for place, delta in deltas.items()}
        with attacked(self.model, fixed):
            toward = -scores(self.model, self.other).mean()
            away = unlikely(self.model, self.forget).mean()
        with torch.no_grad():
            before = distributions(self.reference, self.retain)
        benign = divergence(distributions(self.model, self.retain), before).mean()
        return number("toward_weight") * toward + number("away_weight") * away + number("kl_weight") * benign


def combined(target: torch.Tensor, assistant: torch.Tensor, config: Any) -> torch.Tensor:
    """Return ULD's l - alpha delta for the tokens that the target finds likely."""
    size = target.shape[-1]
    log_p = target.log_softmax(-1)
    best = log_p.topk(max(config.floor, 1, int(config.rho * size))).values
    limit = best[..., :1] + torch.tensor(config.rho).log()
    kept = log_p >= torch.minimum(best[..., -1:], limit)
    delta = (assistant.log_softmax(-1) + torch.tensor(float(size)).log()).clamp(min=0)
    return target - float(config.strength) * delta * kept


def unlikely(model: PreTrainedModel, given: Batch) -> torch.Tensor:
    """Return -log(1 - p) of the answer tokens, 0 where log p is below -5 [rows, answer]."""
    z, y = logits(model, given)[:, given[1] - 1 : -1], labels(given)
    log_p = z.log_softmax(-1).gather(-1, y).squeeze(-1)
    rest = z.scatter(-1, y, -torch.inf).logsumexp(-1) - z.logsumexp(-1)
    return torch.where(log_p < -5, 0.0, -rest)


@contextmanager
def attacked(model: PreTrainedModel, deltas: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Add perturbations of the prompts to what blocks write."""

    def add(delta: torch.Tensor) -> Callable[..., torch.Tensor]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            reach = delta.shape[1]
            return torch.cat([output[:, :reach] + delta, output[:, reach:]], dim=1)

        return hook

    handles = [model.model.layers[place].register_forward_hook(add(delta)) for place, delta in deltas.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
