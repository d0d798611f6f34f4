"""What a vision-language model answers to questions about pictures, and what it answers without them.

    vision.accuracy   share of questions with the right answer
    vision.changed    share of answers that are another one when the picture is removed; its detail has the accuracy
                      without the picture

An answer is the likeliest of the question's choices by the first token that the model says. A choice's probability is
the sum over its tokens (with and without a blank before it, as it is written, in small letters and capitalised, where
that is one token), of the whole vocabulary's, at temperature 1. Two choices never share a token.

A picture is removed by leaving its tokens out of the prompt ("none"), or by an unknown token in each of their places
("unk").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, PreTrainedModel, ProcessorMixin

from llmsurgery.compute.head import Head, backbone, read_head
from llmsurgery.compute.modeling_contrast import without_picture
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoder
from llmsurgery.data.pictured import Pictured, PicturedQuestion, open_picture
from llmsurgery.errors import InputError, UnsupportedError
from llmsurgery.evaluate.intervals import Figure, mean_figure
from llmsurgery.evaluate.letters import letter_log_probabilities, sequence_offsets

Numbers = npt.NDArray[np.float64]

SHOWN = "shown"
"""With the picture; the other values say how it is removed."""


@dataclass(frozen=True)
class Group:
    """Questions with the same choices.

    Attributes:
        labels: The choices.
        tokens: Tokens of each choice, as many for each.
    """

    labels: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PicturedSet:
    """Questions about pictures as the prompts of one model; pictures are opened batch by batch.

    Attributes:
        questions: The questions.
        prompts: The prompt of each, with one image token.
        groups: The different choices.
        group_of: Number of the group of each question.
        processor: Turns pictures and text into inputs.
        encoder: The model's encoder.
        image_id: The image token.
        unknown_id: The unknown token, or None.
    """

    questions: tuple[PicturedQuestion, ...]
    prompts: tuple[str, ...]
    groups: tuple[Group, ...]
    group_of: tuple[int, ...]
    processor: ProcessorMixin
    encoder: Encoder
    image_id: int
    unknown_id: int | None

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """Number of the right answer of each question [questions]."""
        return np.array([question.answer for question in self.questions])

    def members(self, group: int) -> list[int]:
        """Return the numbers of a group's questions."""
        return [number for number, found in enumerate(self.group_of) if found == group]


def encode_pictured(processor: ProcessorMixin, encoder: Encoder, pictured: Pictured) -> PicturedSet:
    """Render the prompts and find the tokens of the choices.

    Args:
        processor: The checkpoint's processor.
        encoder: The checkpoint's encoder.
        pictured: The questions.

    Raises:
        UnsupportedError: The processor has no single image token, two choices of a question begin with the same token,
            or two groups of choices share one.
        InputError: The chat template does not place the picture.
    """
    image_id = getattr(processor, "image_token_id", None)
    if not isinstance(image_id, int):
        raise UnsupportedError(
            f"a {type(processor).__name__} has no image token",
            "the picture is removed by its tokens, and without them nobody knows where it is",
            "",
        )
    prompts = tuple(_render(processor, encoder, question) for question in pictured.questions)
    found = pictured.groups
    group_of = tuple(found.index(question.choices) for question in pictured.questions)
    groups = tuple(
        Group(labels, choice_tokens(encoder, prompts[group_of.index(number)], labels))
        for number, labels in enumerate(found)
    )
    owners: dict[int, Group] = {}
    for group in groups:
        for token in (token for tokens in group.tokens for token in tokens):
            if token in owners:
                raise UnsupportedError(
                    f"the choices {', '.join(owners[token].labels)} and {', '.join(group.labels)} share a token",
                    "every group of choices has a prior of its own, and a token one offset",
                    "give the two kinds of questions in files of their own",
                )
            owners[token] = group
    unknown = encoder.tokenizer.unk_token_id
    return PicturedSet(
        pictured.questions, prompts, groups, group_of, processor, encoder, image_id,
        int(unknown) if isinstance(unknown, int) else None,
    )  # fmt: skip


def _render(processor: Any, encoder: Encoder, question: PicturedQuestion) -> str:
    """Return the prompt of a question, with one image token."""
    if not getattr(processor, "chat_template", None):
        return f"USER: {processor.image_token}\n{question.question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question.question}]
    turns = [{"role": "user", "content": content}]
    text = str(processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    if text.count(processor.image_token) != 1:
        raise InputError(
            f"{question.where}: the chat template places {text.count(processor.image_token)} pictures",
            "each question is about one",
            "correct chat_template in the processor's files, and leave image tokens out of questions",
        )
    return text


def choice_tokens(encoder: Encoder, prompt: str, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each choice as it follows a prompt, as many for each.

    They are those of all ways of writing in which every choice is one token; where there is none, the first tokens of
    the choices as they are written.

    Raises:
        UnsupportedError: The first tokens do not tell the choices apart.
    """
    alone = _token_ids(encoder, prompt)
    one: list[list[int]] = []
    first: list[list[int]] = []
    for blank in ("", " "):
        for write in (str, str.lower, str.capitalize):
            ends = [_ending(alone, _token_ids(encoder, f"{prompt}{blank}{write(label)}")) for label in labels]
            ids = [end[0] for end in ends if end]
            ways = one if all(len(end) == 1 for end in ends) else first
            taken = {token for way in ways for token in way}
            if len(ids) == len(set(ids)) == len(labels) and not taken & set(ids) and (ways is one or write is str):
                ways.append(ids)
    if not one and not first:
        raise UnsupportedError(
            f"the choices {', '.join(labels)} are not told apart by their first token",
            "a choice's probability is read, and its prior shifted, at one token",
            "give choices that begin in different ways",
        )
    return tuple(zip(*(one or first), strict=True))


def _ending(alone: list[int], whole: list[int]) -> list[int]:
    """Return the tokens behind a prompt; none where the prompt's own are others."""
    return whole[len(alone) :] if whole[: len(alone)] == alone else []


def _token_ids(encoder: Encoder, text: str) -> list[int]:
    return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class PicturedScores:
    """What a model says to every question.

    Attributes:
        log_probabilities: log p of each choice [choices] by question, of the whole vocabulary's.
        states: Inputs of the head [questions, width], fp32; None unless asked for.
    """

    log_probabilities: list[Numbers]
    states: torch.Tensor | None = None


@torch.inference_mode()
def score_pictured(
    model: PreTrainedModel,
    data: PicturedSet,
    batch_size: int,
    progress: Progress,
    picture: str = SHOWN,
    keep_states: bool = False,
    decoder: LogitsProcessor | None = None,
) -> PicturedScores:
    """Ask every question once; prompts without a picture that are the same are asked once together.

    Args:
        model: The model in eval mode. The constants that its generation_config adds to single tokens are counted.
        data: The questions.
        batch_size: Rows per forward.
        progress: Told of every batch.
        picture: "shown", "none" or "unk".
        keep_states: Return the inputs of the head too.
        decoder: Changes the logits as it would while the model generates.

    Raises:
        UnsupportedError: "unk" without an unknown token.
    """
    head, offsets = read_head(model), sequence_offsets(model)
    scores: list[Numbers] = [np.empty(0)] * len(data.questions)
    states: dict[int, torch.Tensor] = {}
    batches = _batches(data, batch_size, picture)
    task = "looking at pictures" if picture == SHOWN else "asking without pictures"
    with progress.task(task, len(batches)) as advance:
        for batch in batches:
            rows, pixels = _inputs(data, [members[0] for members in batch], picture)
            last = _last_states(model, rows, pixels, data.encoder.pad_id)
            group = data.groups[data.group_of[batch[0][0]]]
            if decoder is None:
                found = letter_log_probabilities(last, head, group.tokens, offsets)
            else:
                found = _decoded(last, head, rows, group, offsets, decoder, data.encoder.pad_id)
            for members, values, state in zip(batch, found, last, strict=True):
                for number in members:
                    scores[number] = values
                    states[number] = state.float().cpu()
            advance(1)
    kept = torch.stack([states[number] for number in range(len(scores))]) if keep_states else None
    return PicturedScores(scores, kept)


def _batches(data: PicturedSet, batch_size: int, picture: str) -> list[list[list[int]]]:
    """Return batches of rows of one group; a row is the numbers of the questions that it stands for."""
    result = []
    for number in range(len(data.groups)):
        rows: dict[object, list[int]] = {}
        for member in data.members(number):
            # Without a picture only the words count; an unknown token stands for every patch, whatever is in it.
            rows.setdefault(member if picture == SHOWN else data.prompts[member], []).append(member)
        listed = list(rows.values())
        result += [listed[start : start + batch_size] for start in range(0, len(listed), batch_size)]
    return result


def _inputs(data: PicturedSet, members: Sequence[int], picture: str) -> tuple[list[list[int]], torch.Tensor | None]:
    """Return the token ids of some questions, and their pictures [questions, colours, rows, columns]."""
    if picture == "unk" and data.unknown_id is None:
        raise UnsupportedError(
            "the tokenizer has no unknown token", "it stands for the picture", "use --set content_free=none"
        )
    process: Any = data.processor
    rows, pixels = [], []
    for member in members:
        prompt = data.prompts[member]
        start = data.encoder.tokenizer.bos_token
        # A chat template may write the first token itself.
        options = {"add_special_tokens": not (start and prompt.startswith(start))}
        if picture == "none":
            ids = list(data.encoder.tokenizer(prompt, **options)["input_ids"])
        else:
            found = process(
                text=[prompt], images=[open_picture(data.questions[member])], return_tensors="pt", **options
            )
            ids = found["input_ids"][0].tolist()
            pixels.append(found["pixel_values"])
        rows.append(ids if picture == SHOWN else without_picture(ids, data.image_id, picture, data.unknown_id))
    return rows, torch.cat(pixels) if picture == SHOWN else None


def _last_states(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], pixels: torch.Tensor | None, pad_id: int
) -> torch.Tensor:
    """Return the inputs of the head after each prompt [rows, width]."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=model.device)
    mask = (torch.arange(width) < lengths[:, None]).long().to(model.device)
    shown = {} if pixels is None else {"pixel_values": pixels.to(model.device, model.dtype)}
    hidden: torch.Tensor = backbone(model)(
        input_ids=ids, attention_mask=mask, use_cache=False, **shown
    ).last_hidden_state
    return hidden[torch.arange(len(rows)), lengths - 1]


def _decoded(
    last: torch.Tensor,
    head: Head,
    rows: Sequence[Sequence[int]],
    group: Group,
    offsets: Mapping[int, float],
    decoder: LogitsProcessor,
    pad_id: int,
) -> Numbers:
    """Return log p of each choice [rows, choices] behind a logits processor, which is given what `generate` gives."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[pad_id] * (width - len(row)), *row] for row in rows], device=last.device)
    logits = head.to(last.dtype).logits(last).float()
    for token, offset in offsets.items():
        logits[:, token] += offset
    changed = torch.log_softmax(decoder(ids, logits).float(), -1)
    chosen = torch.tensor([list(tokens) for tokens in group.tokens], device=last.device)
    return np.asarray(torch.logsumexp(changed[:, chosen], -1).double().cpu().numpy())


def chosen_answers(scores: PicturedScores) -> npt.NDArray[np.int64]:
    """Return the number of the likeliest choice of each question [questions]; -1 where none is possible."""
    return np.array([int(each.argmax()) if np.isfinite(each).any() else -1 for each in scores.log_probabilities])


def pictured_figures(shown: PicturedScores, removed: PicturedScores, data: PicturedSet) -> dict[str, Figure]:
    """Return the figures.

    Args:
        shown: What the model says with the pictures.
        removed: What it says without.
        data: The questions.
    """
    seen, blind = chosen_answers(shown), chosen_answers(removed)
    shares: dict[str, object] = {}
    for number, group in enumerate(data.groups):
        members = data.members(number)
        shares |= {label: float((seen[members] == place).mean()) for place, label in enumerate(group.labels)}
    chance = float(np.mean([1 / len(data.groups[number].labels) for number in data.group_of]))
    return {
        "vision.accuracy": mean_figure(
            (seen == data.answers).astype(float).tolist(), {"chosen": shares, "chance": chance}
        ),
        "vision.changed": mean_figure(
            (seen != blind).astype(float).tolist(),
            {"accuracy_without": float((blind == data.answers).mean())},
        ),
    }


def measure_pictured(
    model: PreTrainedModel, data: PicturedSet, batch_size: int, progress: Progress, decoder: LogitsProcessor | None
) -> dict[str, Figure]:
    """Ask every question with and without its picture, and return the figures."""
    shown = score_pictured(model, data, batch_size, progress, decoder=decoder)
    removed = score_pictured(model, data, batch_size, progress, "none", decoder=decoder)
    return pictured_figures(shown, removed, data)
