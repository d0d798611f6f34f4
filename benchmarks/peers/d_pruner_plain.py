"""D-Pruner written down as one would: all gradients, both score sets and the mask in memory at once.

python -m benchmarks.peers.d_pruner_plain MODEL OPEN.json DOMAIN.json OUT SPARSITY

Both files hold a list of windows of token ids. Scores are those of the toolkit's default (form taylor, sum of both,
pruning per block of columns), the model is loaded, zeroed and saved by transformers. Nothing of llmsurgery is used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

BLOCKS = 32


def main() -> None:
    """Load, score, zero, save."""
    import torch
    from transformers import AutoModelForCausalLM

    source, ordinary, domain, out, sparsity = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    matrices = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    }
    squares = {name: torch.zeros(weight.shape[1]) for name, weight in matrices.items()}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
            squares[name] += inputs[0].reshape(-1, inputs[0].shape[-1]).square().sum(0)

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in matrices]
    with torch.no_grad():
        for window in json.loads(Path(ordinary).read_text()):
            model(torch.tensor([window]))
    for handle in handles:
        handle.remove()
    general = {name: weight.detach().abs() * squares[name].sqrt() for name, weight in matrices.items()}
    windows = json.loads(Path(domain).read_text())
    scores = {name: torch.zeros_like(weight) for name, weight in matrices.items()}
    for window in windows:
        ids = torch.tensor([window])
        model(ids, labels=ids).loss.backward()
        for name, weight in matrices.items():
            assert weight.grad is not None
            change = weight.grad * weight.detach()
            scores[name] += (change + change.square() / (2 * len(windows))).abs()
        model.zero_grad()
    with torch.no_grad():
        for name, weight in matrices.items():
            score = scores[name] / scores[name].mean() + general[name] / general[name].mean()
            for values, part in zip(weight.chunk(BLOCKS, 1), score.chunk(BLOCKS, 1), strict=True):
                count = round(float(sparsity) * part.numel())
                mask = torch.zeros(part.numel(), dtype=torch.bool)
                mask[part.reshape(-1).argsort()[:count]] = True
                values[mask.reshape(part.shape)] = 0
    model.to(torch.bfloat16).save_pretrained(out)


if __name__ == "__main__":
    main()
