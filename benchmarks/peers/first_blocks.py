"""Read the first blocks of a Llama checkpoint and run some prompts through them: the work that no edit can do without.

python -m benchmarks.peers.first_blocks BASE PROMPTS.json LAST DTYPE

PROMPTS.json holds a list of lists of token ids. They run as one padded batch through blocks 0 to LAST, each of which is
read, run and dropped, with the modules of stock transformers. Nothing of llmsurgery is used.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Read and run; print the seconds without imports."""
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    started = time.perf_counter()
    base, prompts, last, precision = sys.argv[1:]
    dtype = getattr(torch, precision)
    config = AutoConfig.from_pretrained(base)
    config._attn_implementation = "sdpa"
    files = json.loads((Path(base) / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> torch.Tensor:
        with safe_open(Path(base) / files[name], "pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
        return tensor.to(dtype)

    rows = json.loads(Path(prompts).read_text())
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    positions = torch.arange(longest)[None]
    with torch.inference_mode():
        hidden = torch.nn.functional.embedding(ids, read("model.embed_tokens.weight"))
        angles = LlamaRotaryEmbedding(config)(hidden, positions)
        # Padding stands on the right, where causal attention does not look.
        seen = torch.ones(longest, longest, dtype=torch.bool).tril()[None, None]
        for layer in range(int(last) + 1):
            with torch.device("meta"):
                block = LlamaDecoderLayer(config, layer)
            values = {name: read(f"model.layers.{layer}.{name}") for name, _ in block.named_parameters()}
            block.load_state_dict(values, assign=True)
            hidden = block(hidden, attention_mask=seen, position_embeddings=angles, position_ids=positions)
            del block, values
    print(json.dumps({"inside_seconds": time.perf_counter() - started, "mean": float(hidden.float().mean())}))


if __name__ == "__main__":
    main()
