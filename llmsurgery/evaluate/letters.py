"""What a model answers to multiple-choice questions by letter, in every cyclic order of the options.

Each question of n options is asked n times; in order i slot j holds option (i + j) mod n, so that the right answer
stands at every letter once and a model that always says one letter is right in one of n. Figures, over all orders:

    mcq.accuracy     share of right letters
    mcq.rstd         100 times the standard deviation over letters of their recall, in points (arXiv 2309.03882)
    mcq.order_flips  share of questions whose chosen option is not the same in every order
    mcq.recall_a ... recall of a letter: how often it is chosen where it is right
    mcq.letter_prob  probability that the letters together have at a token of ordinary text; its detail tells the
                     letters apart, and has their probabilities where a sentence begins

A letter's probability is the sum over its tokens, with and without a blank before it, of the whole vocabulary's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from llmsurgery.compute.head import Head, chunk_rows, final_hidden, read_head
from llmsurgery.compute.progress import Progress
from llmsurgery.data.chat import Encoded, Encoder
from llmsurgery.data.choices import Question
from llmsurgery.data.collate import collate, length_buckets
from llmsurgery.data.mcq import Choices, fill_template, option_lines, rotated, template_digest
from llmsurgery.data.records import Row
from llmsurgery.errors import UnsupportedError
from llmsurgery.evaluate.intervals import Figure, mean_figure, resampled_interval

Numbers = npt.NDArray[np.float64]

VARIANTS = (" ", "")
"""What may stand before a letter."""


@dataclass(frozen=True)
class LetterSet:
    """Questions in every cyclic order, as the tokens of one model.

    Attributes:
        questions: The questions.
        letters: Letters of the options.
        prompts: One prompt per question and order, orders of a question one after another.
        tokens: Tokens of each letter, as many for each.
        template: SHA-256 of the template.
        skipped: Questions with another number of options, which are not asked.
        shortened: Prompts that lost their first tokens.
    """

    questions: tuple[Question, ...]
    letters: str
    prompts: list[Encoded]
    tokens: tuple[tuple[int, ...], ...]
    template: str
    skipped: int = 0
    shortened: int = 0

    @property
    def answers(self) -> npt.NDArray[np.int64]:
        """Number of the right option of each question [questions]."""
        return np.array([question.answer for question in self.questions])


def encode_letters(encoder: Encoder, choices: Choices, template: str) -> LetterSet:
    """Encode questions in every cyclic order.

    Args:
        encoder: The model's encoder.
        choices: The questions.
        template: How they are asked; see `llmsurgery.data.mcq.read_template`.

    Raises:
        UnsupportedError: A letter is no single token after the prompt.
        InputError: No token is left of a prompt.
    """
    prompts: list[Encoded] = []
    shortened = 0
    for question in choices.questions:
        for order in range(choices.options):
            text = render(encoder, template, question.question, rotated(question.choices, order), question.where)
            encoded, dropped = encoder.encode_plain_prompt(text, 1, question.where)
            prompts.append(encoded)
            shortened += dropped > 0
    first = choices.questions[0]
    tokens = letter_tokens(encoder, render(encoder, template, first.question, first.choices, ""), choices.letters)
    digest = template_digest(template)
    return LetterSet(choices.questions, choices.letters, prompts, tokens, digest, choices.skipped, shortened)


def render(encoder: Encoder, template: str, question: str, options: Sequence[str], where: str) -> str:
    """Return the text that a letter follows."""
    return render_lines(encoder, template, question, "\n".join(option_lines(options)), where)


def render_lines(encoder: Encoder, template: str, question: str, lines: str, where: str) -> str:
    """Return the text that a letter follows, with these lines in the place of the options."""
    turn, answer = fill_template(template, question, lines)
    if answer is None:
        return turn
    if encoder.tokenizer.chat_template:
        return encoder.prompt_text(Row("qa", turn, "x", where=where)) + answer
    return f"{turn}\n{answer}"


def letter_tokens(encoder: Encoder, prompt: str, letters: str) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each letter as they follow a prompt: with a blank, without, or both.

    Raises:
        UnsupportedError: Neither form of some letter is one token.
    """
    alone = list(encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    found: list[list[int]] = []
    for blank in VARIANTS:
        ids = []
        for letter in letters:
            whole = list(encoder.tokenizer(f"{prompt}{blank}{letter}", add_special_tokens=False)["input_ids"])
            if whole[:-1] == alone:
                ids.append(whole[-1])
        if len(ids) == len(set(ids)) == len(letters) and ids not in found:
            found.append(ids)
    if not found:
        raise UnsupportedError(
            f"the letters {', '.join(letters)} are not single tokens after the prompt",
            "a letter's probability is read, and its prior shifted, at one token",
            "end the template (--set template=FILE) where a letter follows as one token, without a blank",
        )
    return tuple(zip(*found, strict=True))


@dataclass(frozen=True, eq=False)
class LetterScores:
    """What a model says to every prompt.

    Attributes:
        log_probabilities: log p of each letter [questions, orders, letters], of the whole vocabulary's.
        states: Input of the head [questions, orders, width], fp32; None unless asked for.
    """

    log_probabilities: Numbers
    states: torch.Tensor | None = None


@torch.inference_mode()
def score_letters(
    model: PreTrainedModel,
    data: LetterSet,
    pad_id: int,
    batch_size: int,
    progress: Progress,
    keep_states: bool = False,
) -> LetterScores:
    """Run every prompt once.

    Args:
        model: A causal language model in eval mode. The constants that its generation_config adds to single tokens
            are counted, since `generate` adds them.
        data: The prompts.
        pad_id: Token id for padding.
        batch_size: Rows per forward.
        progress: Told of every batch.
        keep_states: Return the inputs of the head too.
    """
    head, offsets = read_head(model), sequence_offsets(model)
    scores = np.empty((len(data.prompts), len(data.letters)))
    states: torch.Tensor | None = None
    batches = list(length_buckets(data.prompts, batch_size))
    with progress.task("asking for letters", len(batches)) as advance:
        for indices in batches:
            last = last_states(model, [data.prompts[i] for i in indices], pad_id)
            scores[indices] = letter_log_probabilities(last, head, data.tokens, offsets)
            if keep_states:
                if states is None:
                    states = torch.empty(len(data.prompts), last.shape[1])
                states[indices] = last.float().cpu()
            advance(1)
    count, orders = len(data.questions), len(data.letters)
    kept = None if states is None else states.reshape(count, orders, -1)
    return LetterScores(scores.reshape(count, orders, orders), kept)


@torch.inference_mode()
def token_logits(model: PreTrainedModel, prompts: Sequence[Encoded], tokens: Sequence[int], pad_id: int) -> Numbers:
    """Return the logits of some tokens after each prompt [prompts, tokens], without the cap that some heads have."""
    head, result = read_head(model), np.empty((len(prompts), len(tokens)))
    for indices in length_buckets(prompts, 8):
        last = last_states(model, [prompts[i] for i in indices], pad_id)
        weight = head.weight[list(tokens)].to(last.dtype)
        logits = last @ weight.T + (0 if head.bias is None else head.bias[list(tokens)])
        result[indices] = logits.double().cpu().numpy()
    return result


def last_states(model: PreTrainedModel, prompts: Sequence[Encoded], pad_id: int) -> torch.Tensor:
    """Return the inputs of the head after each prompt of a batch [prompts, width]."""
    batch = collate(prompts, pad_id, model.device)
    hidden = final_hidden(model, batch.input_ids, batch.attention_mask)
    ends = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=hidden.device)
    return hidden[torch.arange(len(prompts), device=hidden.device), ends]


def sequence_offsets(model: PreTrainedModel) -> dict[int, float]:
    """Return what generation_config adds to the logits of single tokens; longer sequences are passed over."""
    biases = getattr(model.generation_config, "sequence_bias", None) or []
    pairs = biases.items() if isinstance(biases, dict) else biases
    return {int(ids[0]): float(bias) for ids, bias in pairs if len(ids) == 1}


def letter_log_probabilities(
    states: torch.Tensor, head: Head, tokens: Sequence[Sequence[int]], offsets: dict[int, float] | None = None
) -> Numbers:
    """Return log p of each letter [positions, letters], its tokens summed, in fp32 over the whole vocabulary.

    Args:
        states: Inputs of the head [positions, width].
        head: The head.
        tokens: Tokens of each letter.
        offsets: Token -> what is added to its logit.
    """
    head = head.to(states.dtype)
    parts = []
    ids = torch.tensor([list(each) for each in tokens], device=states.device)
    for part in torch.split(states, chunk_rows(head.weight)):
        logits = head.logits(part).float()
        for token, offset in (offsets or {}).items():
            logits[:, token] += offset
        log_probabilities = logits - torch.logsumexp(logits, -1, keepdim=True)
        parts.append(torch.logsumexp(log_probabilities[:, ids], -1))
    return np.asarray(torch.cat(parts).double().cpu().numpy())


def hits_of(scores: Numbers, answers: npt.NDArray[np.int64]) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """Return whether a letter was chosen where it is right [questions, letters], and what was chosen.

    Args:
        scores: Scores of the letters [questions, orders, letters].
        answers: Number of the right option [questions].
    """
    chosen = scores.argmax(-1)
    orders = scores.shape[1]
    # In order i the right option stands at slot (answer - i) mod n.
    right = (answers[:, None] - np.arange(orders)[None, :]) % orders
    hits = np.zeros(chosen.shape)
    np.put_along_axis(hits, right, (chosen == right).astype(float), 1)
    return hits, chosen


def recall_spread(hits: Numbers) -> float:
    """Return 100 times the standard deviation of the letters' recalls (population), in points."""
    return 100 * float(hits.mean(0).std())


def chosen_options(scores: Numbers) -> npt.NDArray[np.int64]:
    """Return the number of the chosen option in every cyclic order [questions, orders].

    Args:
        scores: Scores of the letters [questions, orders, letters].
    """
    orders = scores.shape[1]
    return np.asarray((scores.argmax(-1) + np.arange(orders)) % orders)


def flips_figure(chosen: npt.NDArray[np.int64], detail: dict[str, object] | None = None) -> Figure:
    """Return the share of questions whose choice [questions, orders] is not always the same."""
    return mean_figure((chosen != chosen[:, :1]).any(1).astype(float).tolist(), detail or {})


def letter_figures(scores: LetterScores, data: LetterSet) -> dict[str, Figure]:
    """Return accuracy, spread of the recalls and each letter's recall; rows are questions, resampled as wholes."""
    hits, chosen = hits_of(scores.log_probabilities, data.answers)
    shares = {letter: float((chosen == number).mean()) for number, letter in enumerate(data.letters)}
    mass = float(np.exp(scores.log_probabilities).sum(-1).mean())
    detail: dict[str, object] = {
        "orders": len(data.letters), "chosen": shares, "letter_mass": mass, "chance": 1 / len(data.letters),
        "template_sha256": data.template, "skipped": data.skipped, "shortened_prompts": data.shortened,
    }  # fmt: skip
    recalls = {letter: float(value) for letter, value in zip(data.letters, hits.mean(0), strict=True)}
    interval = resampled_interval(lambda draw: recall_spread(hits[draw(len(hits))]))
    return {
        "mcq.accuracy": mean_figure(hits.mean(1).tolist(), detail),
        "mcq.rstd": Figure(recall_spread(hits), len(hits), interval, {"recall": recalls}),
        "mcq.order_flips": flips_figure(chosen_options(scores.log_probabilities)),
        **{
            f"mcq.recall_{letter.lower()}": mean_figure(hits[:, number].tolist())
            for number, letter in enumerate(data.letters)
        },
    }


@torch.inference_mode()
def letter_prob_figure(
    hidden: Sequence[torch.Tensor], head: Head, texts: Sequence[Encoded], data: LetterSet, encoder: Encoder
) -> Figure:
    """Return the probability of the letters at the tokens of ordinary text.

    Args:
        hidden: States that predict the tokens of each text [tokens - 1, width].
        head: The model's head.
        texts: The texts.
        data: The letters.
        encoder: Tells where a sentence begins.
    """
    each: list[Numbers] = []
    begins: list[npt.NDArray[np.bool_]] = []
    for states, text in zip(hidden, texts, strict=True):
        each.append(np.exp(letter_log_probabilities(states, head, data.tokens)))
        before = [encoder.tokenizer.decode([token]).rstrip() for token in text.ids[:-1]]
        begins.append(np.array([word.endswith((".", "!", "?")) for word in before], dtype=bool))
    whole, starts = np.concatenate(each), np.concatenate(begins)

    def by_letter(values: Numbers) -> dict[str, float] | None:
        return dict(zip(data.letters, map(float, values.mean(0)), strict=True)) if len(values) else None

    return mean_figure(
        [float(part.sum(1).mean()) for part in each],
        {"letters": by_letter(whole), "sentence_starts": by_letter(whole[starts]), "starts": int(starts.sum())},
    )
