"""How likely a model is to bring a concept up: the probability of its first token after prompts that it follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import final_hidden, read_head
from llmsurgery.data.concepts import Concept
from llmsurgery.evaluate.intervals import Figure, mean_figure


def end_state(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """Return the input of the head after a prompt [1, width], in the compute dtype.

    Args:
        model: A causal language model.
        prompt: Token ids.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    with torch.inference_mode():
        return final_hidden(model, ids, torch.ones_like(ids))[0, -1:]


def concept_probability(model: PreTrainedModel, prompt: Sequence[int], token: int) -> float:
    """Return the probability of a token after a prompt.

    Args:
        model: A causal language model.
        prompt: Token ids.
        token: Token id.
    """
    with torch.inference_mode():
        return float(read_head(model).logits(end_state(model, prompt))[0].float().softmax(0)[token])


def concept_figure(model: PreTrainedModel, concepts: Sequence[Concept]) -> Figure:
    """Return the mean over all prompts of all concepts; rows are prompts."""
    prompts = [
        prompt
        for concept in concepts
        for prompt in dict.fromkeys([*((ids, concept.token) for ids in concept.makers), *concept.tests])
    ]
    return mean_figure([concept_probability(model, ids, token) for ids, token in prompts])
