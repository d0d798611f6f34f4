"""A rank-one fact edit as it is usually done: the whole model in memory, edited, saved with stock transformers.

python -m benchmarks.peers.plain_rome BASE TEXT LAYER TOKENS STEPS OUT

BASE is a Llama checkpoint; where it has no tokenizer, token ids are bytes. TEXT is a file with ordinary text, of which
TOKENS tokens give the second moment of the keys. The subject is the text's first word, the new answer its last one.
STEPS of Adam look for the value at LAYER (0: a random value, where only the cost of the rest is of interest). Nothing
of llmsurgery is used.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PASSAGE = 512
RIDGE = 1e-4


def encode(base: str, text: str) -> list[int]:
    """Return the token ids of a text, its bytes where the checkpoint has no tokenizer."""
    if not any((Path(base) / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return list(text.encode())
    from transformers import AutoTokenizer

    return list(AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"])


def second_moment(model: PreTrainedModel, down: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return E[k k^T] of the inputs of a matrix over some tokens."""
    import torch

    total: list[Any] = [0.0]

    def catch(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        keys = inputs[0].flatten(0, 1).float()
        total[0] = total[0] + keys.T @ keys

    handle = down.register_forward_pre_hook(catch)
    with torch.no_grad():
        for start in range(0, len(ids), PASSAGE):
            model(input_ids=torch.tensor([ids[start : start + PASSAGE]]), use_cache=False)
    handle.remove()
    moment: torch.Tensor = total[0] / len(ids)
    return moment


def find_value(
    model: PreTrainedModel, down: torch.nn.Module, prompt: list[int], answer: list[int], steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the key at the prompt's last token, and the value there that makes the model give the answer."""
    import torch

    seen: dict[str, torch.Tensor] = {}
    delta: list[torch.Tensor] = []

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        spot = len(prompt) - 1
        if not delta:
            seen["key"], seen["value"] = inputs[0][0, spot].detach().float(), output[0, spot].detach().float()
            delta.append(torch.zeros_like(seen["value"], requires_grad=True))
        changed = output.clone()
        changed[0, spot] = output[0, spot] + delta[0].to(output.dtype)
        return changed

    handle = down.register_forward_hook(hook)
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        model(input_ids=ids[:, : len(prompt)], use_cache=False)
    optimizer = torch.optim.Adam(delta, lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        scores = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        (-scores[range(len(answer)), answer].mean()).backward()
        optimizer.step()
    handle.remove()
    found = delta[0].detach() if steps else torch.randn(len(delta[0]), generator=torch.Generator().manual_seed(0))
    return seen["key"], seen["value"] + found


def main() -> None:
    """Load, measure, edit, save."""
    import torch
    from transformers import AutoModelForCausalLM

    base, text, layer, tokens, steps, out = sys.argv[1:]
    words = Path(text).read_text(encoding="utf-8").split()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.requires_grad_(False)
    down = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    moment = second_moment(model, down, encode(base, " ".join(words))[: int(tokens)])
    key, value = find_value(model, down, encode(base, words[0]), encode(base, f" {words[-1]}"), int(steps))
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    u = torch.linalg.solve(moment, key)
    with torch.no_grad():
        residual = value - down.weight.float() @ key
        down.weight.add_(torch.outer(residual, u) / (u @ key))
    model.save_pretrained(out, max_shard_size="5GB")


if __name__ == "__main__":
    main()
