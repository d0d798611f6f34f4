"""What writing facts did: how probable the new answers are, and what is said about other subjects."""

from __future__ import annotations

from dataclasses import replace

from llmsurgery.methods.base import Operation
from llmsurgery.methods.facts import FactConfig, make_rewrites

WEAK_ANSWER = 0.1
"""Probability of what was to be said below which an edit has failed."""


def answer_figures(operation: Operation, config: FactConfig) -> dict[str, float]:
    """Return how probable the answers to be written are now: in the prompts, and in the pairs' other wordings.

    Each is the geometric mean over the answer's tokens, and the mean over prompts; empty where nothing is to be said.
    """
    import torch

    from llmsurgery.compute.head import batch_log_probabilities
    from llmsurgery.data.chat import Encoded
    from llmsurgery.data.collate import collate

    if config.target not in ("text", "refusal"):
        return {}
    pairs = operation.pairs
    wordings = {"prompt": pairs, "paraphrase": [replace(pair, prompt=text) for pair in pairs for text in pair.prompts]}
    figures = {}
    for name, chosen in wordings.items():
        values = []
        for rewrite in make_rewrites(config, operation.encoder, chosen):
            for lookup in rewrite.contexts:
                row = Encoded(lookup.ids, lookup.start, False)
                batch = collate([row], operation.encoder.pad_id, operation.model.device)
                with torch.inference_mode():
                    scores, _ = batch_log_probabilities(
                        operation.model, batch.input_ids, batch.attention_mask, batch.label_mask
                    )
                values.append(float(scores.double().mean().exp()))
        if values:
            figures[name] = sum(values) / len(values)
    return figures


def neighbour_answers(operation: Operation) -> list[int]:
    """Return the model's first choice of token after each text about other subjects that the pairs bring."""
    import torch

    from llmsurgery.compute.head import final_hidden, read_head

    found = []
    for text in (text for pair in operation.pairs for text in pair.neighbours):
        ids = operation.encoder.encode_text(text, operation.encoder.max_length).ids
        row = torch.tensor([ids], device=operation.model.device)
        with torch.inference_mode():
            states = final_hidden(operation.model, row, torch.ones_like(row))[:, -1]
            found.append(int(read_head(operation.model).to(states.dtype).logits(states).argmax()))
    return found


def report(operation: Operation, config: FactConfig, before: tuple[dict[str, float], list[int]]) -> dict[str, object]:
    """Return what the edit did to the answers, and to texts about other subjects, as facts for the manifest.

    Args:
        operation: What the method was given, its model edited.
        config: What was to be said.
        before: What `answer_figures` and `neighbour_answers` found before.
    """
    after = answer_figures(operation, config)
    found: dict[str, object] = {
        f"{name}_probability": {"before": before[0][name], "after": after[name]} for name in after
    }
    if before[1]:
        same = sum(one == two for one, two in zip(before[1], neighbour_answers(operation), strict=True))
        found["neighbours_kept"] = same / len(before[1])
    if "prompt" in after and after["prompt"] < WEAK_ANSWER:
        operation.progress.notice(
            f"the answers have a probability of {after['prompt']:.3g} after their own prompts: other layers, or "
            "--set token=last, may do better"
        )
    return found
