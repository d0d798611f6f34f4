"""Position-invariant inference: the output does not depend on the order in which segments of a prompt are listed.

Paper: PINE, arXiv 2407.01100 (ICLR 2025); `llmsurgery.compute.segments` has the positions. This is no edit of weights:
it changes how attention is computed, by the segments of every prompt, and lives in the running model alone. Nothing of
it can be stored in a checkpoint.

Segments see each other in both directions, each is causal inside, and the rotary positions at which a query sees the
segments follow from how much it attends to them. The function registers itself with transformers' attention interface
as `NAME`; no model class is copied. Hooks on the attention modules take the rotary tables away from them (so that
queries, keys and the cache stay unrotated) and hand them to the function, which rotates.

A rotary logit depends on the difference of two positions alone. So keys are rotated once, each segment's by its own
first position, and it is the query that is turned for every segment it looks at: [heads, queries, width] at a time,
where the released code rotates all keys anew for every token of the suffix.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from llmsurgery.compute.segments import Segments, importances, shifts
from llmsurgery.errors import UnsupportedError

NAME = "llmsurgery_position_invariant"
"""The function's name in transformers' attention interface."""

PROBE_TOKENS = 9
"""Tokens on which a model's own attention is compared with this one before it is relied on."""

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Run:
    """What the attention functions of one prompt share.

    Attributes:
        segments: The prompt.
        tables: Attention module -> rotary cosines and sines of all positions so far [1, positions, width].
    """

    segments: Segments
    tables: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    position_invariant: _Run | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend to the segments of one prompt, wherever they are listed.

    Args:
        module: The attention module.
        query: Unrotated queries of the last tokens [1, heads, queries, width].
        key: Unrotated keys of all tokens [1, key heads, tokens, width].
        value: Values of all tokens [1, key heads, tokens, width].
        attention_mask: Not looked at: a prompt has no padding, and visibility follows from the positions.
        scaling: Factor of the logits.
        softcap: Bound c of logits that are capped as c tanh(logits / c).
        sliding_window: Positions that a query sees, its own included; distances are those of the assigned positions.
        position_invariant: The prompt.
        options: Of other attention functions.

    Returns:
        Outputs [1, queries, heads, width], and None in place of the weights.
    """
    assert position_invariant is not None
    segments, table = position_invariant.segments, position_invariant.tables[module]
    groups = query.shape[1] // key.shape[1]
    keys, values = (states[0].repeat_interleave(groups, 0) for states in (key, value))
    view = _View(module, query[0], keys, segments, table, scaling or query.shape[-1] ** -0.5, softcap)
    logits, distances = view.look()
    visible = distances >= 0
    if sliding_window is not None:
        visible &= distances < sliding_window
    sinks = options.get("s_aux")
    logits = logits.masked_fill(~visible, -torch.inf)
    if isinstance(sinks, torch.Tensor):
        # A learned logit per head that takes part in the softmax and has no value.
        extra = sinks.float().reshape(-1, 1, 1).expand(-1, logits.shape[1], 1)
        weights = torch.cat([logits, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    output = weights.to(values.dtype) @ values
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, attend)


class _View:
    """What some queries see of a prompt: the logits of every key and how far away it lies."""

    def __init__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        segments: Segments,
        table: tuple[torch.Tensor, torch.Tensor],
        scaling: float,
        softcap: float | None,
    ) -> None:
        self.rotate = _rotation(module)
        self.query, self.key, self.segments, self.table = query, key, segments, table
        self.scaling, self.softcap = scaling, softcap
        tokens, first = key.shape[1], key.shape[1] - query.shape[1]
        self.base = segments.base_positions(tokens).to(key.device)
        self.owners = segments.owners(tokens).to(key.device)
        self.query_base, self.query_owners = self.base[first:], self.owners[first:]

    def look(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [heads, queries, tokens], fp32, and the distances of the keys, negative where unseen."""
        heads, queries, _ = self.query.shape
        logits = self.query.new_empty(heads, queries, self.key.shape[1], dtype=torch.float32)
        distances = torch.empty(logits.shape, dtype=torch.int64, device=logits.device)
        segments = self.segments
        outside = (self.owners < 0) | (self.owners == len(segments.parts))
        places = self.base[outside]
        logits[..., outside] = self._logits(self.query_base.expand(heads, -1), self.key[:, outside], places)
        distances[..., outside] = self.query_base[:, None] - places
        moved = shifts(self._importance(), segments)
        # The prefix sees no segment, and stands before all of them.
        before = self.query_owners < 0
        for number, (span, base) in enumerate(zip(segments.spans, segments.bases, strict=True)):
            apart = (self.query_base - base + moved[..., number]).masked_fill(before, -1)
            local = torch.arange(segments.lengths[number], device=logits.device)
            logits[..., span] = self._logits(apart.clamp(min=0), self.key[:, span], local)
            distances[..., span] = apart[..., None] - local
        return logits, distances

    def _importance(self) -> torch.Tensor:
        """Return the importances of the segments [heads, queries, segments]."""
        span = slice(self.segments.start, self.segments.stop)
        plain = self._scale(self.query.float() @ self.key[:, span].float().transpose(1, 2))
        return importances(plain, self.query_owners, self.segments)

    def _logits(self, positions: torch.Tensor, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the logits [heads, queries, keys] of queries at positions [heads, queries] and keys at places."""
        query = self._turn(self.query, positions)
        key = self._turn(keys, places.expand(len(keys), -1))
        return self._scale((query @ key.transpose(1, 2)).float())

    def _turn(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate states [heads, tokens, width] to positions [heads, tokens], as the model itself does."""
        cosines, sines = (part[0].to(states.dtype)[positions] for part in self.table)
        single = states[:, None]
        # The function takes queries and keys together; no keys are given.
        turned, _ = self.rotate(single, single[:, :0], cosines, sines)
        return turned[:, 0]

    def _scale(self, logits: torch.Tensor) -> torch.Tensor:
        scaled = logits * self.scaling
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def _rotation(module: torch.nn.Module) -> Rotate:
    """Return the function by which an attention module rotates queries and keys."""
    return cast(Rotate, sys.modules[type(module).__module__].apply_rotary_pos_emb)


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the attention modules of a model, in order.

    Raises:
        UnsupportedError: They are not of a kind that positions can be taken from.
    """
    found = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
    rotary = [module for module in found if "position_embeddings" in inspect.signature(module.forward).parameters]
    if not found or len(rotary) < len(found):
        raise _unsupported(
            model, "its positions do not enter through rotary embeddings of the attention (learned positions, ALiBi)"
        )
    for module in rotary:
        if hasattr(module, "kv_lora_rank"):
            raise _unsupported(model, "its heads join a rotated and an unrotated part (multi-head latent attention)")
        if not hasattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb"):
            raise _unsupported(model, f"{type(module).__name__} does not rotate by a function of its module")
    return rotary


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"position-invariant inference does not work on {type(model).__name__}",
        why,
        "use a model with rotary positions, such as Llama, Mistral, Qwen, Gemma, Phi-3, OLMo 2 or GPT-NeoX",
    )


@contextmanager
def position_invariant(model: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """Let a model read one prompt with segments; forwards inside take its ids, one row, with or without a cache.

    Args:
        model: A causal language model with rotary positions. Use `require_supported` once before.
        segments: The prompt.

    Raises:
        UnsupportedError: As for `attention_modules`.
    """
    modules = attention_modules(model)
    run = _Run(segments)

    def take_tables(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "position_embeddings" not in kwargs:
            raise _unsupported(model, "its blocks do not pass rotary embeddings by name")
        new = kwargs["position_embeddings"]
        if module in run.tables:
            # Decoding goes on: positions follow those before.
            new = tuple(torch.cat(pair, 1) for pair in zip(run.tables[module], new, strict=True))
        run.tables[module] = new
        cosines, sines = kwargs["position_embeddings"]
        # cos 1 and sin 0: the module rotates by nothing and scales by nothing.
        unrotated = (torch.ones_like(cosines), torch.zeros_like(sines))
        return args, kwargs | {"position_embeddings": unrotated, "position_invariant": run}

    before = model.config._attn_implementation
    hooks = [module.register_forward_pre_hook(take_tables, with_kwargs=True) for module in modules]
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def invariant_states(model: PreTrainedModel, segments: Segments) -> torch.Tensor:
    """Return the final hidden states of a prompt [tokens, width], after the final norm, in the compute dtype."""
    ids = torch.tensor([segments.ids], device=model.device)
    inner = getattr(model, model.base_model_prefix)
    with position_invariant(model, segments):
        hidden: torch.Tensor = inner(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden


@torch.inference_mode()
def generate_invariant(
    model: PreTrainedModel, segments: Segments, new_tokens: int, end_ids: tuple[int, ...] = ()
) -> list[int]:
    """Answer a prompt greedily; `generate` of transformers does not know the segments.

    Args:
        model: A causal language model with rotary positions.
        segments: The prompt.
        new_tokens: Tokens to generate at most.
        end_ids: Tokens that end the answer; they are not returned.

    Returns:
        The new tokens.
    """
    answer: list[int] = []
    # Not made from the config: a cache with sliding layers would drop keys by their place in the listing.
    cache = DynamicCache()
    given = torch.tensor([segments.ids], device=model.device)
    with position_invariant(model, segments):
        while len(answer) < new_tokens:
            logits = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token in end_ids:
                break
            answer.append(token)
            given = torch.tensor([[token]], device=model.device)
    return answer


@torch.inference_mode()
def require_supported(model: PreTrainedModel) -> None:
    """Check on a few tokens that, with a single segment, a model says what it says by its own attention.

    Raises:
        UnsupportedError: It does not, or its positions are of another kind.
    """
    attention_modules(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    tokens = tuple(1 + number * 7 % (vocabulary - 1) for number in range(PROBE_TOKENS))
    inner = getattr(model, model.base_model_prefix)
    own = inner(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).last_hidden_state[0].float()
    found = invariant_states(model, Segments(tokens[:3], (tokens[3:6],), tokens[6:])).float()
    # The two sum in different orders, and 16-bit states keep few digits of it.
    bound = 1e-3 if model.dtype == torch.float32 else 0.1
    if not bool((own - found).abs().mean() <= bound * own.abs().mean()):
        raise _unsupported(
            model, "its attention has parts that are not known here: with one segment the results differ"
        )
