"""Greedy answers and their ROUGE-L recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    new_tokens: int,
    batch_size: int,
    progress: Progress,
    name: str,
) -> list[str]:
    """Answer prompts greedily.

    Args:
        model: A causal language model in eval mode.
        encoder: Knows the tokenizer and the end token.
        prompts: Rows up to their answer.
        new_tokens: New tokens at most.
        batch_size: Prompts per batch, padded on the left.
        progress: Told of every batch.
        name: Name of the task in the progress display.

    Returns:
        The answers, cut at the end of the turn and stripped, in the order of the prompts.
    """
    tokenizer = encoder.tokenizer
    ends = sorted({encoder.end_id, int(tokenizer.eos_token_id)})
    # Every field that a checkpoint's own generation_config could turn away from greedy search is set here.
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends,
        pad_token_id=encoder.pad_id,
        use_cache=True,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    with progress.task(name, len(prompts)) as tick:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            time = max(len(prompts[i].ids) for i in indices)
            ids = torch.full((len(indices), time), encoder.pad_id, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(indices):
                length = len(prompts[i].ids)
                ids[row, time - length :] = torch.tensor(prompts[i].ids)
                mask[row, time - length :] = 1
            output: Any = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            for row, i in enumerate(indices):
                answers[i] = _cut(output[row, time:].tolist(), ends, tokenizer)
            tick(len(indices))
    return answers


def _cut(ids: list[int], ends: Sequence[int], tokenizer: Any) -> str:
    stop = next((position for position, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=True)).strip()


class _Characters:
    """Splits text into characters, for scripts that ROUGE's [a-z0-9] words do not cover."""

    def tokenize(self, text: str) -> list[str]:
        """Return the characters of a text, blanks left out."""
        return [character for character in text.lower() if not character.isspace()]


def is_mostly_ascii(texts: Sequence[str]) -> bool:
    """Whether at least half of the letters are ASCII."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return not letters or 2 * sum(character.isascii() for character in letters) >= len(letters)


def rouge_l_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return ROUGE-L recall of each answer against its reference, with Porter stemming.

    Texts mostly outside [a-z0-9] are compared by characters instead of words.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if is_mostly_ascii(references):
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
    else:
        scorer = RougeScorer(["rougeL"], tokenizer=_Characters())
    pairs = zip(references, answers, strict=True)
    return [float(scorer.score(reference, answer)["rougeL"].recall) for reference, answer in pairs]
