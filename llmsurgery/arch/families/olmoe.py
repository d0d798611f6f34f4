"""OLMoE: routed experts in every block, norms before the sublayers, and an RMSNorm over all queries and all keys."""

from llmsurgery.arch.spec import Family, Fused

FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
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
        "norm.mlp": "model.layers.{layer}.post_attention_layernorm",
        "router": "model.layers.{layer}.mlp.gate",
        "expert.gate": "model.layers.{layer}.mlp.experts",
        "expert.up": "model.layers.{layer}.mlp.experts",
        "expert.down": "model.layers.{layer}.mlp.experts",
        "norm.final": "model.norm",
        "lm_head": "lm_head",
    },
    stored={
        "expert.gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
        "expert.up": "model.layers.{layer}.mlp.experts.{expert}.up_proj",
        "expert.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj",
    },
    fused={
        "expert.gate": Fused("gate_up_proj", 0, 2),
        "expert.up": Fused("gate_up_proj", 1, 2),
        "expert.down": Fused("down_proj"),
    },
    experts_keys=("num_experts", "num_local_experts"),
    stored_prefixes=(("model.", "model."), ("model.", "")),
)
