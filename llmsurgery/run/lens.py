"""`lens`: what a model would say after every layer; nothing is changed.

The residual stream after a block is read as if it were the last: through the final norm and the head (logit lens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmsurgery.arch.bundle import is_bundle
from llmsurgery.arch.detect import detect
from llmsurgery.arch.spec import require_text_model
from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.source import resolve_source
from llmsurgery.errors import InputError, UnsupportedError, UsageError
from llmsurgery.run.prepare import make_encoder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import Structure
    from llmsurgery.data.chat import Encoder

SITES = ("block", "attention", "middle", "mlp")


@dataclass(frozen=True)
class LensRequest:
    """What `lens` is asked for; see `llmsurgery.api.lens`."""

    model: str
    prompt: str
    token: str | None
    top: int
    site: str
    device: str
    dtype: str
    trust_remote_code: bool


def read_through_lens(request: LensRequest) -> dict[str, object]:
    """Read every layer at every token of a prompt; see `llmsurgery.api.lens` for the result."""
    from llmsurgery.compute.device import memory_errors, resolve_device, resolve_dtype, suitable_threads
    from llmsurgery.compute.load import load_model

    _check(request)
    checkpoint = Checkpoint.open(resolve_source(request.model))
    if is_bundle(checkpoint.config):
        raise UnsupportedError(
            f"{str(checkpoint.root)!r} is a bundle with model code of its own",
            "the lens reads the residual stream of a stock model",
            "read the model before surgery, whose weights it holds, or a plain form of the result",
        )
    structure = detect(checkpoint.config, checkpoint.tensors)
    require_text_model(structure, "lens")
    encoder = make_encoder(checkpoint)
    ids = encoder.encode_text(request.prompt, encoder.max_length).ids
    if not ids:
        raise InputError("the prompt has no token", "there is nothing to read", "give a longer prompt")
    wanted = None if request.token is None else _single_token(encoder, request.prompt, request.token)
    device = resolve_device(request.device)
    # Probabilities of a hundredth matter here; half precision is used only on demand.
    dtype = resolve_dtype("float32" if request.dtype == "auto" else request.dtype, "F32", device)
    parameters = sum(info.size for info in checkpoint.tensors.values())
    with memory_errors(), suitable_threads(parameters, device):
        model = load_model(checkpoint.root, dtype, device, request.trust_remote_code, structure.family.buffers)
        layers = _read(model, structure, encoder, ids, request, wanted)
    document: dict[str, object] = {
        "path": str(checkpoint.root),
        "layers": structure.layers,
        "site": request.site,
        "tokens": [_text(encoder, number) for number in ids],
        "readings": layers,
    }
    if wanted is not None:
        document["token"] = {"id": wanted, "text": _text(encoder, wanted)}
    return document


def _check(request: LensRequest) -> None:
    if request.site not in SITES:
        raise UsageError(f"unknown site {request.site!r}", f"choose one of {', '.join(SITES)}", "")
    if request.top < 1:
        raise UsageError("--top is out of bounds", "at least one token is shown", "--top 5")
    if not request.prompt:
        raise UsageError("the prompt is empty", "there is nothing to read", "give a text")
    if request.token == "":
        raise UsageError("--token is empty", "it names the token that is followed", '--token " Paris"')


def _single_token(encoder: Encoder, prompt: str, text: str) -> int:
    """Return the id of the first token of a text that goes on from a prompt; a word gets the blank before it."""
    blank = "" if prompt[-1:].isspace() or text[:1].isspace() or not text[:1].isalnum() else " "
    encoded, _ = encoder.encode_continuation(prompt, blank + text, None, "--token")
    return encoded.ids[encoded.answer_start]


def _text(encoder: Encoder, number: int) -> str:
    return str(encoder.tokenizer.decode([number]))


def _states(
    model: PreTrainedModel, structure: Structure, ids: Sequence[int], site: str
) -> list[tuple[str, torch.Tensor]]:
    """Return label and states [time, width] of every entry."""
    import torch

    from llmsurgery.compute.residual import read_entries, read_sites

    inputs = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(inputs)
    if site == "block":
        entries = read_entries(model, structure, inputs, mask)
        names = ["embedding", *(str(layer) for layer in range(structure.layers))]
        return [(name, entry[0]) for name, entry in zip(names, entries, strict=True)]
    found = read_sites(model, structure, site, inputs, mask)
    if found is None:
        raise UnsupportedError(
            f"a {structure.family.name} model has no site {site}",
            "attention and MLP of its blocks read the same residual, or no norm stands between them",
            "choose block, attention or mlp",
        )
    return [(str(layer), states[0]) for layer, states in enumerate(found)]


def _read(
    model: PreTrainedModel,
    structure: Structure,
    encoder: Encoder,
    ids: Sequence[int],
    request: LensRequest,
    wanted: int | None,
) -> list[dict[str, object]]:
    """Return one reading per layer: first tokens of each position, and the wanted token's probability and rank."""
    import torch

    from llmsurgery.compute.head import chunk_rows
    from llmsurgery.compute.residual import Lens

    texts: dict[int, str] = {}

    def text_of(number: int) -> str:
        if number not in texts:
            texts[number] = _text(encoder, number)
        return texts[number]

    result: list[dict[str, object]] = []
    with torch.inference_mode():
        lens = Lens(model, structure)
        rows = chunk_rows(lens.head.weight)
        for name, states in _states(model, structure, ids, request.site):
            positions: list[dict[str, Any]] = []
            for start in range(0, len(states), rows):
                logits = lens.logits(states[start : start + rows])
                p = logits.softmax(-1)
                chances, tokens = p.topk(min(request.top, p.shape[-1]), dim=-1)
                for number, (firsts, shares) in enumerate(zip(tokens.tolist(), chances.tolist(), strict=True)):
                    top = [
                        {"id": token, "text": text_of(token), "p": share}
                        for token, share in zip(firsts, shares, strict=True)
                    ]
                    position: dict[str, Any] = {"top": top}
                    if wanted is not None:
                        own = logits[number, wanted]
                        position["p"] = float(p[number, wanted])
                        position["rank"] = int((logits[number] > own).sum()) + 1
                    positions.append(position)
            result.append({"layer": name, "positions": positions})
    return result
