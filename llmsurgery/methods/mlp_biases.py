"""Biases that a checkpoint's MLPs do not have yet: the tensors, and what config.json must say for them to be taken.

transformers drops a bias that the configuration does not announce, and says so in a report line alone. Llama announces
those of its MLPs by `mlp_bias`, of all layers at once. Mistral and Qwen2 have no such switch, and are Llama otherwise:
without sliding windows their weights load as LlamaForCausalLM bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmsurgery.errors import SurgeryError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmsurgery.arch.spec import RoleTensor, Structure
    from llmsurgery.edits.kinds import Edit

MLP = ("mlp.gate", "mlp.up", "mlp.down")
AS_LLAMA = ("mistral", "qwen2")
"""Families that are Llama under another name, as long as no window slides."""

_FIRST = "config.json"
_GEOMETRY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""What a class fills in where config.json is silent, each with its own default."""

_GONE = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "rope_theta", "rope_scaling")
"""A window that does not slide, and an older spelling of `rope_parameters`."""


def require_biases(structure: Structure, model: PreTrainedModel, as_llama: bool) -> None:
    """Refuse a model whose MLPs can have no bias of the kind that is needed.

    Args:
        structure: The checkpoint's roles.
        model: The loaded model; its configuration has all defaults filled in.
        as_llama: Whether a model that is Llama under another name may be stored as Llama.

    Raises:
        UnsupportedError: Says what is possible.
    """
    family = structure.family.name
    if family == "llama":
        return
    only_zero = "there a neuron can be switched off exactly (value=0) and nothing else"
    if family not in AS_LLAMA:
        raise UnsupportedError(f"a {family} model has no biases in its MLPs", only_zero, "use value=0")
    if not as_llama:
        raise UnsupportedError(
            f"a {family} model has no biases in its MLPs",
            "its weights can be stored as a Llama model, which has them; that changes the model's class",
            "--set as_llama=true, or value=0",
        )
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = config.sliding_window is not None if family == "mistral" else kinds != {"full_attention"}
    if windows:
        raise UnsupportedError(
            f"this {family} model has a sliding window", "Llama has none, and would attend to more", "use value=0"
        )


def bias_edits(
    structure: Structure, model: PreTrainedModel, values: Mapping[tuple[str, int], np.ndarray[Any, Any]]
) -> list[Edit]:
    """Return the edits that give an MLP biases: given ones, and zeros wherever the announcement asks for more.

    Args:
        structure: The checkpoint's roles; `require_biases` has let it pass, or its MLPs have biases.
        model: The loaded model.
        values: (role, layer) -> new bias.

    Returns:
        `Replace` where there is a bias; otherwise `Add` for all layers and the `Config` that announces them.
    """
    from llmsurgery.edits.kinds import Add, Config, Replace

    present = {(t.role, t.layer): t for t in structure.tensors if t.part == "bias"}
    if all(key in present for key in values):
        return [Replace(present[key].stored, bias) for key, bias in values.items()]
    edits: list[Edit] = []
    for tensor in structure.select([role for role in MLP if role in structure.roles]):
        assert tensor.layer is not None
        if (tensor.role, tensor.layer) not in present:
            zeros = np.zeros(tensor.shape[0], dtype=np.float32)
            bias = values.get((tensor.role, tensor.layer), zeros)
            edits.append(Add(_bias_name(tensor), bias, tensor.dtype))
    edits.append(Config((_FIRST, "mlp_bias"), True))
    if structure.family.name in AS_LLAMA:
        edits += _as_llama(structure, model)
    require_announced(edits, model.config.to_dict())
    return edits


def _bias_name(weight: RoleTensor) -> str:
    return f"{weight.stored.removesuffix('.weight')}.bias"


def _as_llama(structure: Structure, model: PreTrainedModel) -> list[Edit]:
    """Return the edits that store a Mistral or Qwen2 model as Llama."""
    from llmsurgery.edits.kinds import REMOVED, Add, Config

    config = model.config
    settings: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    settings |= {name: getattr(config, name) for name in _GEOMETRY if hasattr(config, name)}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    biased = any(t.part == "bias" and t.role.startswith("attn.") for t in structure.tensors)
    settings |= {"head_dim": head_dim, "attention_bias": biased}
    edits: list[Edit] = [Config((_FIRST, name), value) for name, value in settings.items()]
    edits += [Config((_FIRST, name), REMOVED) for name in _GONE]
    if biased:
        # Llama's switch is for all four matrices; Qwen2 has no bias on the last one.
        present = {(t.role, t.layer) for t in structure.tensors if t.part == "bias"}
        for tensor in structure.select(("attn.o",)):
            if (tensor.role, tensor.layer) not in present:
                edits.append(Add(_bias_name(tensor), np.zeros(tensor.shape[0], dtype=np.float32), tensor.dtype))
    return edits


def require_announced(edits: Sequence[Edit], config: Mapping[str, Any]) -> None:
    """Refuse biases of MLPs that config.json will not announce.

    Args:
        edits: All edits of a run.
        config: The source's configuration.

    Raises:
        SurgeryError: They would be stored and dropped when the result is loaded: a method's bug.
    """
    from llmsurgery.edits.kinds import Add, Config

    said = {edit.path[1:]: edit.value for edit in edits if isinstance(edit, Config) and edit.path[0] == _FIRST}
    announced = said.get(("mlp_bias",), config.get("mlp_bias", False))
    kind = said.get(("model_type",), config.get("model_type"))
    added = [edit.name for edit in edits if isinstance(edit, Add)]
    silent = [name for name in added if ".mlp." in name and name.endswith(".bias")]
    if silent and not (announced is True and kind == "llama"):
        raise SurgeryError(
            f"{len(silent)} biases would be dropped, first {silent[0]}",
            "config.json does not announce them by mlp_bias, and transformers would ignore them in silence",
            "report this, with the name of the model",
        )
