"""OLMo 2: norms on the outputs of attention and MLP alone, and an RMSNorm over all queries and all keys.

No norm stands before a sublayer, so there is no `norm.attn` and no `norm.mlp`.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.embed_tokens",
        "attn.q": "model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.layers.{layer}.self_attn.v_proj",
        "norm.q": "model.layers.{layer}.self_attn.q_norm",
        "norm.k": "model.layers.{layer}.self_attn.k_norm",
        "attn.o": "model.layers.{layer}.self_attn.o_proj",
        "norm.attn_post": "model.layers.{layer}.post_attention_layernorm",
        "mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "mlp.up": "model.layers.{layer}.mlp.up_proj",
        "mlp.down": "model.layers.{layer}.mlp.down_proj",
        "norm.mlp_post": "model.layers.{layer}.post_feedforward_layernorm",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored_prefixes=(("model.", "model."), ("model.", "")),
)
