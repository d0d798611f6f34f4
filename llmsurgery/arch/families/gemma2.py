"""Gemma 2: norms before and after attention and MLP, RMSNorm that multiplies by 1 + weight, a tied head.

Logits are soft-capped: c tanh(logits / c) with c = `final_logit_softcapping` of the config. `norm.attn` and `norm.mlp`
act on the inputs of a sublayer, `norm.attn_post` and `norm.mlp_post` on its output.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "norm.attn": "model.layers.{layer}.input_layernorm",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
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
