"""LLaVA: a vision tower, a projector of two layers, and a Llama that reads what it makes of a picture as tokens.

The language model's names are Llama's below another prefix, and its config is a part of config.json. On disk the head
lies below `language_model` and the projector outside of it. The vision tower has no roles: no method touches it.
"""

from llmsurgery.arch.spec import Family

FAMILY = Family(
    name="llava",
    model_types=("llava",),
    layers_key="num_hidden_layers",
    roles={
        "embed": "model.language_model.embed_tokens",
        "norm.attn": "model.language_model.layers.{layer}.input_layernorm",
        "attn.q": "model.language_model.layers.{layer}.self_attn.q_proj",
        "attn.k": "model.language_model.layers.{layer}.self_attn.k_proj",
        "attn.v": "model.language_model.layers.{layer}.self_attn.v_proj",
        "attn.o": "model.language_model.layers.{layer}.self_attn.o_proj",
        "norm.mlp": "model.language_model.layers.{layer}.post_attention_layernorm",
        "mlp.gate": "model.language_model.layers.{layer}.mlp.gate_proj",
        "mlp.up": "model.language_model.layers.{layer}.mlp.up_proj",
        "mlp.down": "model.language_model.layers.{layer}.mlp.down_proj",
        "norm.final": "model.language_model.norm",
        "lm_head": "lm_head",
        "projector.in": "model.multi_modal_projector.linear_1",
        "projector.out": "model.multi_modal_projector.linear_2",
    },
    stored_prefixes=(("model.language_model.", "language_model.model."),),
    stored={
        "lm_head": "language_model.lm_head",
        "projector.in": "multi_modal_projector.linear_1",
        "projector.out": "multi_modal_projector.linear_2",
    },
    inner_key="text_config",
    inner_types=("llama", "mistral", "qwen2"),
)
