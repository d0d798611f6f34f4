"""Gemma 3, text models: the norms of Gemma 2, and an RMSNorm on queries and keys; all multiply by 1 + weight.

The multimodal checkpoints have `model_type` gemma3 and another tree of modules; they do not belong here.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
        "norm.q": "model.layers.{layer}.self_attn.q_norm",
        "norm.k": "model.layers.{layer}.self_attn.k_norm",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.attn_post": "model.layers.{layer}.post_attention_layernorm",
        "norm.mlp": "model.layers.{layer}.pre_feedforward_layernorm",
        "mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "mlp.up": "model.layers.{layer}.mlp.up_proj",
        "mlp.down": "model.layers.{layer}.mlp.down_proj",
        "norm.mlp_post": "model.layers.{layer}.post_feedforward_layernorm",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("model.", "model."), ("model.", "")),
    tied_by_default=True,
    norm_offset=1.0,
    scaled_embedding=True,
)
