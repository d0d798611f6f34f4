"""llmcompressor on a checkpoint: Wanda or SparseGPT, by its one-shot entry point, on given windows.

    PYTHON -m benchmarks.peers.llmcompressor_prune MODEL METHOD SPARSITY DTYPE WINDOWS.json OUT

PYTHON is that of an environment with llmcompressor; nothing of this project is imported. Options are those that the
library's examples use: all linear modules but the head, blocks in sequence. WINDOWS.json holds lists of token ids.
Prints versions, and seconds without imports.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Load, prune, save densely."""
    import torch
    from datasets import Dataset  # type: ignore[import-not-found,unused-ignore]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning import (  # type: ignore[import-not-found]
        SparseGPTModifier,
        WandaPruningModifier,
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, method, sparsity, dtype, file, out = sys.argv[1:]
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = json.loads(Path(file).read_text())
    rows = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=kind(sparsity=float(sparsity), ignore=["re:.*lm_head"]),
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
    )
    # As the source stores its values, which is what the other side writes.
    model.to(torch.bfloat16)
    model.save_pretrained(out, save_compressed=False)
    tokenizer.save_pretrained(out)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    found = {"versions": {name: version(name) for name in names}, "inside_seconds": time.perf_counter() - started}
    Path(out, "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
