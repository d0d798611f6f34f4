# Copyright the llmsurgery authors. Licensed under the Apache License, Version 2.0.
"""Skill unlearning (arXiv 2503.21730): a model whose own weights are unchanged, and a rule that acts while it runs.

This file needs torch and transformers alone. It is shipped beside a checkpoint:
`AutoModelForCausalLM.from_pretrained(PATH, trust_remote_code=True)` gives `SkillForCausalLM`.

Three rules, of which the config names one:

- `neuron-adjust`: some pre-activations of the MLPs are replaced where they look like those of the forgotten texts.
- `key-space`: where the key of the newest token lies in a box, the model ends its answer.
- `key-space-steering`: where it does, the key is replaced by a stored one.

All decide for each token by itself, so that batches, padding and caches change nothing.
"""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import cached_file

FOLDER = "rule"
STATISTICS = "statistics.safetensors"
GAP = 30.0
"""Lead of the end token over all others, in nats, where the model abstains: the others share less than 1e-7."""


def adjust(z, mu_r, sd_r, mu_f, sd_f, mode, uniform=None):
    """Return pre-activations, replaced where they look like those of the forget texts.

    With p_r and p_f the Gaussian densities of z, computed as logarithms in fp32:

        replaced if p_f > p_r, and, with u uniform in [0, 1], if u >= p_r / (p_r + p_f)
        z' = (z - mu_f) / sd_f * sd_r + mu_r              mode "shift"
        2 mu_r - z'                                       mode "reflect"

    Args:
        z: Pre-activations [..., neurons].
        mu_r: Mean over the retain texts [neurons]; sd_r, mu_f and sd_f likewise.
        sd_r: Standard deviation over the retain texts.
        mu_f: Mean over the forget texts.
        sd_f: Standard deviation over the forget texts.
        mode: "reflect" or "shift".
        uniform: u, of the shape of z; None: every value with p_f > p_r is replaced.
    """
    values = z.float()
    log_r = -0.5 * ((values - mu_r) / sd_r).square() - sd_r.log()
    log_f = -0.5 * ((values - mu_f) / sd_f).square() - sd_f.log()
    moved = (values - mu_f) / sd_f * sd_r + mu_r
    if mode == "reflect":
        moved = 2 * mu_r - moved
    if uniform is None:
        chosen = log_f > log_r
    else:
        chosen = (log_f >= log_r) & (uniform >= torch.sigmoid(log_r - log_f))
    return torch.where(chosen, moved, values).to(z.dtype)


def inside(keys, center, half):
    """Return whether |k_i - center_i| <= half_i for all i: bool [...] of keys [..., m]; the border is inside."""
    return ((keys.float() - center).abs() <= half).all(-1)


class NeuronAdjust(nn.Module):
    """The rule `neuron-adjust` on the outputs of some linear layers of a model.

    Args:
        target: The model.
        settings: `modules` (paths of the linear layers), `mode`, `decision` ("threshold" or "sampled") and `seed`.
        tensors: For each module by its number in the list: indices, mu_r, sd_r, mu_f and sd_f [neurons].
    """

    def __init__(self, target, settings, tensors):
        super().__init__()
        self.mode = settings["mode"]
        self.sampled = settings["decision"] == "sampled"
        self.seed = settings["seed"]
        self.generators = {}
        for name, values in tensors.items():
            self.register_buffer(name.replace(".", "_"), values)
        for number, path in enumerate(settings["modules"]):
            target.get_submodule(path).register_forward_hook(self._hook(number))

    def _hook(self, number):
        def replace(_module, _inputs, output):
            indices, *moments = (
                getattr(self, f"{number}_{name}").to(output.device)
                for name in ("indices", "mu_r", "sd_r", "mu_f", "sd_f")
            )
            z = output[..., indices]
            uniform = self._draw(z) if self.sampled else None
            output = output.clone()
            output[..., indices] = adjust(z, *moments, self.mode, uniform)
            return output

        return replace

    def _draw(self, z):
        """Draw a number for each token and neuron; one stream of them per device, from the seed."""
        if z.device not in self.generators:
            self.generators[z.device] = torch.Generator(z.device).manual_seed(self.seed)
        return torch.rand(z.shape, generator=self.generators[z.device], device=z.device)


class KeySpaceBox(nn.Module):
    """The rule `key-space`: remembers of each token of the last forward whether its key lies in the box.

    Args:
        target: The model.
        settings: `module`, path of the layer whose inputs are the keys, and `scale` c.
        tensors: `center` and `half` [m]; the box is |k_i - center_i| <= c half_i.
    """

    def __init__(self, target, settings, tensors):
        super().__init__()
        self.register_buffer("center", tensors["center"])
        self.register_buffer("half_width", tensors["half"] * settings["scale"])
        self.flags = None
        target.get_submodule(settings["module"]).register_forward_pre_hook(self._look)

    def _look(self, _module, inputs):
        keys = inputs[0]
        self.flags = inside(keys, self.center.to(keys.device), self.half_width.to(keys.device))


class KeySpaceSteering(nn.Module):
    """The rule `key-space-steering`: replaces the keys that lie in the box.

    Args:
        target: The model.
        settings: As for `KeySpaceBox`.
        tensors: As for `KeySpaceBox`, and `steering` [m], what such a key becomes.
    """

    def __init__(self, target, settings, tensors):
        super().__init__()
        self.register_buffer("center", tensors["center"])
        self.register_buffer("half_width", tensors["half"] * settings["scale"])
        self.register_buffer("steering", tensors["steering"])
        target.get_submodule(settings["module"]).register_forward_pre_hook(self._replace)

    def _replace(self, _module, inputs):
        keys = inputs[0]
        chosen = inside(keys, self.center.to(keys.device), self.half_width.to(keys.device))
        return (torch.where(chosen[..., None], self.steering.to(keys), keys), *inputs[1:])


class Body(nn.Module):
    """The model below its head, and the rule."""

    def __init__(self, target, rule):
        super().__init__()
        self.target = target
        self.rule = rule

    def forward(self, **inputs):
        """Return final hidden states [batch, time, width]; a box adds a column, 1 where the model abstains."""
        output = self.target.base_model(**inputs)
        states = output.last_hidden_state
        if isinstance(self.rule, KeySpaceBox):
            flags = self.rule.flags.reshape(*states.shape[:-1], 1)
            states = torch.cat([states, flags.to(states)], -1)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=output.past_key_values)


class Head(nn.Module):
    """The model's head; abstaining tokens get logits that leave the end token alone."""

    def __init__(self, target, abstain_id):
        super().__init__()
        self.layer = target.get_output_embeddings()
        self.softcap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
        self.abstain_id = abstain_id

    @property
    def weight(self):
        """The head's matrix [V, width]."""
        return self.layer.weight

    def forward(self, states):
        """Return logits [..., V] from the states of `Body`."""
        if self.abstain_id is None:
            return self._logits(states)
        flags, logits = states[..., -1:] > 0.5, self._logits(states[..., :-1])
        ending = logits.new_full(logits.shape[-1:], -GAP)
        ending[self.abstain_id] = 0.0
        return torch.where(flags, ending, logits)

    def _logits(self, hidden):
        logits = self.layer(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class SkillConfig(PreTrainedConfig):
    """Config of the model and settings of the rule."""

    model_type = "skill_unlearning"

    def __init__(self, target=None, rule="neuron-adjust", settings=None, **more):
        self.target = AutoConfig.for_model(**target) if isinstance(target, dict) else target
        self.rule = rule
        self.settings = settings or {}
        super().__init__(**more)

    def get_text_config(self, *_, **__):
        """Return the model's config, which generation asks for sizes."""
        return self.target or self


class SkillForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model under a rule."""

    config_class = SkillConfig
    base_model_prefix = "body"

    def __init__(self, config, target, tensors):
        super().__init__(config)
        rules = {"neuron-adjust": NeuronAdjust, "key-space": KeySpaceBox, "key-space-steering": KeySpaceSteering}
        rule = rules[config.rule]
        self.body = Body(target, rule(target, config.settings, tensors))
        self.head = Head(target, config.settings.get("abstain_id"))
        self.generation_config = target.generation_config

    @classmethod
    def from_pretrained(cls, path, *arguments, config=None, output_loading_info=False, **options):
        """Load the model with stock transformers, and put the rule on it."""
        for name in ("adapter_kwargs", "code_revision", "trust_remote_code", "_from_auto"):
            options.pop(name, None)
        where = {
            name: options[name]
            for name in ("revision", "cache_dir", "token", "local_files_only", "force_download")
            if name in options
        }
        config = SkillConfig.from_pretrained(path, **where) if config is None else config
        target, report = AutoModelForCausalLM.from_pretrained(
            path, *arguments, config=config.target, output_loading_info=True, **options
        )
        tensors = load_file(cached_file(path, STATISTICS, subfolder=FOLDER, **where))
        model = cls(config, target, tensors).eval()
        return (model, report) if output_loading_info else model

    def save_pretrained(self, *_, **__):
        """Refuse: the files of this model are not written by transformers."""
        raise NotImplementedError("copy the directory that this model was loaded from")

    def get_input_embeddings(self):
        """Return the model's embedding."""
        return self.body.target.get_input_embeddings()

    def get_output_embeddings(self):
        """Return the head, which abstains where the rule says so."""
        return self.head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **more,
    ):
        """Return logits [batch, time, V]."""
        output = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.body.target.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **more)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)
