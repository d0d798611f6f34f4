"""Greedy answers and their ROUGE-L recall."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from llmsurgery.compute.generate import generate_batch, own_generation_config
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.stream import StreamedModel, in_memory
from llmsurgery.data.chat import Encoded, Encoder


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    new_tokens: int,
    batch_size: int,
    progress: Progress,
    name: str,
    stripped: bool = True,
) -> list[str]:
    """Answer prompts greedily.

    Args:
        model: A causal language model in eval mode; if it is streamed, every new token reads all blocks once.
        encoder: Knows the tokenizer and the end token.
        prompts: Rows up to their answer.
        new_tokens: New tokens at most; fewer where a batch reaches the model's length first.
        batch_size: Prompts per batch, padded on the left.
        progress: Told of every batch.
        name: Name of the task in the progress display.
        stripped: Leave out the blanks around an answer.

    Returns:
        The answers, cut at the end of the turn, in the order of the prompts.
    """
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    answers = _answers(model, encoder, prompts, config, batch_size, progress, name)
    return [answer.strip() for answer in answers] if stripped else answers


@torch.inference_mode()
def sampled_answers(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    new_tokens: int,
    batch_size: int,
    progress: Progress,
    name: str,
    temperature: float,
) -> list[str]:
    """Answer prompts by drawing from the whole distribution, with torch's generator; otherwise as `greedy_answers`.

    Args:
        model: A causal language model in eval mode.
        encoder: Knows the tokenizer and the end token.
        prompts: Rows up to their answer; a prompt that stands twice is answered twice.
        new_tokens: New tokens at most.
        batch_size: Prompts per batch.
        progress: Told of every batch.
        name: Name of the task in the progress display.
        temperature: Logits are divided by it.
    """
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0, use_cache=True
    )
    answers = _answers(model, encoder, prompts, config, batch_size, progress, name)
    return [answer.strip() for answer in answers]


def _answers(
    model: PreTrainedModel | StreamedModel,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    config: GenerationConfig,
    batch_size: int,
    progress: Progress,
    name: str,
) -> list[str]:
    tokenizer = encoder.tokenizer
    ends = sorted({encoder.end_id, int(tokenizer.eos_token_id)})
    new_tokens = int(config.max_new_tokens)
    config.eos_token_id, config.pad_token_id = ends, encoder.pad_id
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    plain = in_memory(model)

    def call(indices: list[int]) -> Callable[[], list[list[int]]]:
        own = copy.deepcopy(config)
        time = max(len(prompts[i].ids) for i in indices)
        own.max_new_tokens = max(1, min(new_tokens, encoder.max_length - time))
        return lambda: generate_batch(plain, [prompts[i].ids for i in indices], encoder.pad_id, own)

    # Batches of a streamed model take turns, and each puts its config into the model.
    with progress.task(name, len(prompts)) as tick, own_generation_config(plain, config):
        for window in _windows(model, [len(i) * (len(prompts[i[-1]].ids) + new_tokens) for i in batches]):
            calls = [call(indices) for indices in batches[window]]
            outputs = model.run(calls) if isinstance(model, StreamedModel) else [one() for one in calls]
            for indices, output in zip(batches[window], outputs, strict=True):
                for new, i in zip(output or [], indices, strict=True):
                    answers[i] = _cut(new, ends, tokenizer)
                tick(len(indices))
    return answers


def _windows(model: PreTrainedModel | StreamedModel, tokens: Sequence[int]) -> Sequence[slice]:
    """Cut batches into those that run together: one by one in memory, as many as keys and values allow if streamed."""
    if isinstance(model, StreamedModel):
        return model.windows([count * model.blocks for count in tokens])
    return [slice(number, number + 1) for number in range(len(tokens))]


def _cut(ids: list[int], ends: Sequence[int], tokenizer: Any) -> str:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=True))


class _Characters:
    """Splits text into characters, for scripts that ROUGE's [a-z0-9] words do not cover."""

    def tokenize(self, text: str) -> list[str]:
        """Return the characters of a text, blanks left out."""
        return [character for character in text.lower() if not character.isspace()]


def is_mostly_ascii(texts: Sequence[str]) -> bool:
    """Whether at least half of the letters are ASCII."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return not letters or 2 * sum(character.isascii() for character in letters) >= len(letters)


def rouge_l(references: Sequence[str], answers: Sequence[str], part: str, stemming: bool) -> list[float]:
    """Return ROUGE-L of each answer against its reference.

    A row whose reference is mostly outside [a-z0-9] is compared by characters instead of words.

    Args:
        references: Reference answers.
        answers: Generated answers.
        part: "recall" or "fmeasure".
        stemming: Compare Porter stems of words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    words = RougeScorer(["rougeL"], use_stemmer=stemming)
    characters = RougeScorer(["rougeL"], tokenizer=_Characters())
    values = []
    for reference, answer in zip(references, answers, strict=True):
        scorer = words if is_mostly_ascii([reference]) else characters
        values.append(float(getattr(scorer.score(reference, answer)["rougeL"], part)))
    return values


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return ROUGE-L recall of each answer against its reference, with Porter stemming."""
    return rouge_l(references, answers, "recall", stemming=True)
