"""torch-pruning on a Llama checkpoint: width of the residual stream and of the MLPs by group magnitude, heads kept.

    python -m benchmarks.peers.torch_pruning_llama MODEL RATIO OUT

Needs torch-pruning beside torch and transformers. What a user of the library has to do himself is done here as its
example for language models does it: heads are declared, the head is left out, and the config is set afterwards. The
result is saved by transformers. Prints seconds without imports and the parameters that are left.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Load, prune, save."""
    import torch
    import torch_pruning  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    source, ratio, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    heads = {}
    for layer in model.model.layers:
        attention = layer.self_attn
        heads[attention.q_proj] = model.config.num_attention_heads
        heads[attention.k_proj] = heads[attention.v_proj] = model.config.num_key_value_heads
    # A tied head follows the embedding; an untied one keeps its rows, and loses the columns that the width loses.
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=torch.arange(16)[None],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        global_pruning=False,
        pruning_ratio=float(ratio),
        num_heads=heads,
        prune_num_heads=False,
        prune_head_dims=False,
        ignored_layers=[model.lm_head],
        root_module_types=[torch.nn.Linear, torch.nn.RMSNorm, torch.nn.Embedding],
        round_to=8,
        output_transform=lambda outputs: outputs.logits,
    )
    pruner.step()
    config = model.config
    config.head_dim = model.model.layers[0].self_attn.head_dim
    config.hidden_size = model.model.embed_tokens.weight.shape[1]
    config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    config.use_cache = True
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    print(json.dumps({"inside_seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}))


if __name__ == "__main__":
    main()
