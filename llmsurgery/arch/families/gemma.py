"""Gemma, first generation: the tree of Llama, RMSNorm that multiplies by 1 + weight, a tied head.

What the embedding gives is multiplied by sqrt(width) before the first block, and the tied head is not: the input of
the first block is not a row of the head. Logits are not capped.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.mlp": "model.layers.{layer}.post_attention_layernorm",
        "mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "mlp.up": "model.layers.{layer}.mlp.up_proj",
        "mlp.down": "model.layers.{layer}.mlp.down_proj",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("model.", "model."), ("model.", "")),
    tied_by_default=True,
    norm_offset=1.0,
    scaled_embedding=True,
)
