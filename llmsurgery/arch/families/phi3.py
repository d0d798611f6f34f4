"""Phi-3 and Phi-4: Llama's layout with q, k and v in one matrix, and gate and up in another.

`attn.qkv` has the rows of q, then k, then v; `mlp.gate_up` has the rows of gate, then up.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.qkv": "model.layers.{layer}.self_attn.qkv_proj",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.mlp": "model.layers.{layer}.post_attention_layernorm",
        "mlp.gate_up": "model.layers.{layer}.mlp.gate_up_proj",
        "mlp.down": "model.layers.{layer}.mlp.down_proj",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("model.", "model."), ("model.", "")),
)
