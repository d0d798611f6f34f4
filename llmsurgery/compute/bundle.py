"""The files of a result that is no plain checkpoint: model code, settings, and what the code reads besides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save
from transformers import PreTrainedConfig, PreTrainedModel

from llmsurgery.compute import modeling_contrast, modeling_skill, modeling_uld
from llmsurgery.edits.kinds import File

MODULE = "modeling_uld"


def bundle_files(
    config: Mapping[str, object], settings: Mapping[str, object], adapter: Mapping[str, bytes]
) -> list[File]:  # fmt: skip
    """Return what turns a checkpoint into a bundle that loads with `trust_remote_code=True` and in no other way.

    Args:
        config: Parsed config.json of the checkpoint.
        settings: Arguments of `UldConfig` besides the target.
        adapter: Files of the assistant's adapter by name.
    """
    return [
        *custom_code(modeling_uld, modeling_uld.UldConfig, modeling_uld.UldForCausalLM, config, settings),
        *_assistant(adapter),
    ]


def rule_files(
    config: Mapping[str, object], rule: str, settings: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
) -> list[File]:
    """Return what puts a rule of `modeling_skill` on a checkpoint.

    Args:
        config: Parsed config.json of the checkpoint.
        rule: Name of the rule.
        settings: Its settings.
        tensors: Its tensors.
    """
    # Below a folder of its own, or it would be taken for weights of the checkpoint.
    content = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    statistics = File(f"{modeling_skill.FOLDER}/{modeling_skill.STATISTICS}", content)
    code = modeling_skill, modeling_skill.SkillConfig, modeling_skill.SkillForCausalLM
    return [*custom_code(*code, config, {"rule": rule, "settings": dict(settings)}), statistics]


def custom_code(
    code: ModuleType,
    config_type: type[PreTrainedConfig],
    model_type: type[PreTrainedModel],
    config: Mapping[str, object],
    settings: Mapping[str, object],
) -> list[File]:
    """Return a config.json that leads to model code, and the code.

    Args:
        code: The module, which needs nothing but torch and transformers.
        config_type: Its config class.
        model_type: Its model class.
        config: Parsed config.json of the checkpoint.
        settings: Arguments of the config class besides the target.
    """
    module = code.__name__.rpartition(".")[2]
    # Another model_type: with the target's own, stock transformers would load the unchanged model without a word.
    content = {
        "architectures": [model_type.__name__],
        "auto_map": {
            "AutoConfig": f"{module}.{config_type.__name__}",
            "AutoModelForCausalLM": f"{module}.{model_type.__name__}",
        },
        "model_type": config_type.model_type,
        **settings,
        "target": dict(config),
    }
    return [File("config.json", _json(content)), File(f"{module}.py", Path(str(code.__file__)).read_bytes())]


def processor_files(settings: Mapping[str, object], adapter: Mapping[str, bytes]) -> list[File]:
    """Return the files that `UldLogitsProcessor.from_pretrained` reads, and its code; arguments as above."""
    return [File(modeling_uld.SETTINGS, _json(settings)), _code(), *_assistant(adapter)]


def contrast_files(settings: Mapping[str, object]) -> list[File]:
    """Return the files that `ContrastLogitsProcessor.from_pretrained` reads, and its code."""
    code = File("modeling_contrast.py", Path(modeling_contrast.__file__).read_bytes())
    return [File(modeling_contrast.SETTINGS, _json(settings)), code]


def _code() -> File:
    return File(f"{MODULE}.py", Path(modeling_uld.__file__).read_bytes())


def _assistant(adapter: Mapping[str, bytes]) -> list[File]:
    return [File(f"{modeling_uld.FOLDER}/{name}", content) for name, content in adapter.items()]


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def model_with_processor(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Return a model that answers as a loaded one does with the logits processor of a directory.

    A contrastive processor does nothing for plain scores: then it is the model itself.

    Args:
        model: The unchanged model.
        path: What `processor_files` or `contrast_files` went into.
    """
    if contrast_processor(model, path) is not None:
        return model
    settings = json.loads((path / modeling_uld.SETTINGS).read_text("utf-8"))
    config = modeling_uld.UldConfig(target=model.config, **settings)
    pair: PreTrainedModel = modeling_uld.UldForCausalLM.assemble(model, config, str(path))
    return pair


def contrast_processor(model: PreTrainedModel, path: Path) -> modeling_contrast.ContrastLogitsProcessor | None:
    """Return the contrastive processor of a directory for a loaded model, None where there is none."""
    if not (path / modeling_contrast.SETTINGS).is_file():
        return None
    return modeling_contrast.ContrastLogitsProcessor.from_pretrained(str(path), model)
