"""Load checkpoints with stock transformers, and say clearly when one cannot be."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.initialization import no_init_weights

from llmsurgery.checkpoint import Checkpoint
from llmsurgery.compute.halving import is_memory_error
from llmsurgery.errors import DamagedError, InputError, UnsupportedError, UsageError

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Stored dtype code -> dtype."""


def quiet_transformers() -> None:
    """Silence progress bars and advice of transformers; errors still raise."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a checkpoint.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    quiet_transformers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        # Some values of its config, such as a length that is no number, are only looked at here.
        tokenizer("a")
    except StrictDataclassError as error:
        # The tokenizer's loader reads the model's config first.
        raise _bad_config(path, error) from error
    except (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RecursionError) as error:
        raise _bad_tokenizer(path, error) from error
    except BaseException as error:
        # The package tokenizers raises bare exceptions for a broken tokenizer.json, and its panics are not even these.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise _bad_tokenizer(path, error) from error
    if tokenizer.eos_token_id is None:
        raise UnsupportedError(
            f"the tokenizer in {path} has no end-of-sequence token",
            "answers are scored and trained with exactly one",
            "set eos_token in tokenizer_config.json",
        )
    return tokenizer


def _bad_tokenizer(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"no usable tokenizer in {path}",
        str(error).partition("\n")[0][:200] or type(error).__name__,
        "copy tokenizer.json and tokenizer_config.json beside the weights",
    )


def _bad_config(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error.__cause__ or error).split())
    return InputError(f"config.json in {path} is not accepted", reason[:300], "correct that value")


def load_model(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    buffers: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load a causal language model with the stock Auto class.

    Args:
        path: Checkpoint directory.
        dtype: Compute dtype.
        device: Where to put it.
        trust_remote_code: Run model code that the checkpoint brings.
        buffers: Endings of stored names that the model's code rightly ignores.

    Returns:
        The model in eval mode, without gradients.

    Raises:
        DamagedError: Stored tensors are missing, unexpected or of the wrong shape, or hold NaN or Inf.
        UnsupportedError: transformers has no class for it.
    """
    model = load_with(path, trust_remote_code, buffers, dtype=dtype)
    model.to(device)
    model.eval()
    model.requires_grad_(False)
    require_finite_model(model)
    return model


def empty_model(path: Path, dtype: torch.dtype, trust_remote_code: bool, buffers: tuple[str, ...]) -> PreTrainedModel:
    """Return a model without weights, on the meta device, in eval mode and without gradients.

    Args:
        path: Checkpoint directory; config and headers are read.
        dtype: Compute dtype.
        trust_remote_code: Run model code that the checkpoint brings.
        buffers: As for `load_model`.

    Raises:
        DamagedError: As for `load_model`.
        UnsupportedError: As for `load_model`.
    """
    model = load_with(path, trust_remote_code, buffers, dtype=dtype, device_map="meta")
    model.eval()
    model.requires_grad_(False)
    return model


def check_loadable(path: Path, trust_remote_code: bool = False, buffers: tuple[str, ...] = ()) -> str:
    """Check that stock transformers takes every stored tensor, on the meta device: nothing of the weights is read.

    Args:
        path: Checkpoint directory.
        trust_remote_code: Run model code that the checkpoint brings.
        buffers: As for `load_model`.

    Returns:
        The name of the model class.

    Raises:
        DamagedError: Stored tensors are missing, unexpected or of the wrong shape.
        UnsupportedError: transformers has no class for it.
    """
    return type(load_with(path, trust_remote_code, buffers, device_map="meta")).__name__


def load_with(
    path: Path, trust_remote_code: bool, buffers: tuple[str, ...], **options: object
) -> PreTrainedModel:  # fmt: skip
    """Load with the stock Auto class, and refuse stored tensors that it drops or invents.

    Args:
        path: Checkpoint directory.
        trust_remote_code: Run model code that the checkpoint brings.
        buffers: As for `load_model`.
        options: Passed to `from_pretrained`: dtype, device_map, quantization_config.

    Raises:
        DamagedError: Stored tensors are missing, unexpected or of the wrong shape.
        UnsupportedError: transformers has no class for it.
    """
    common: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return _checked(
        path,
        buffers,
        lambda: auto_class(AutoConfig.from_pretrained(path, **common)).from_pretrained(
            path,
            **options,
            **common,
            output_loading_info=True,
            use_safetensors=True,
            # Wrong shapes are reported below instead of raised as a bare RuntimeError.
            ignore_mismatched_sizes=True,
        ),
    )


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that a config is registered for: causal language models, else those that see pictures."""
    seeing, speaking = AutoModelForImageTextToText._model_mapping, AutoModelForCausalLM._model_mapping
    return (
        AutoModelForImageTextToText if type(config) in seeing and type(config) not in speaking else AutoModelForCausalLM
    )


def load_processor(path: Path) -> ProcessorMixin:
    """Load what turns pictures and text into a model's inputs.

    Raises:
        InputError: There is none beside the weights, or it cannot be read.
    """
    quiet_transformers()
    try:
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise InputError(
            f"no usable processor of pictures in {path}",
            str(error).partition("\n")[0][:200],
            "copy processor_config.json or preprocessor_config.json beside the weights",
        ) from error
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise InputError(
            f"no usable processor of pictures in {path}",
            f"what is there is a {type(processor).__name__}, which takes text alone",
            "copy processor_config.json or preprocessor_config.json beside the weights",
        )
    return processor


def model_of_headers(
    checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool, buffers: tuple[str, ...]
) -> PreTrainedModel:
    """Return a model without weights as `empty_model` does, but without mapping any file.

    A private mapping counts against limits on memory with its whole length, though nothing of it is read.

    Args:
        checkpoint: An open checkpoint.
        dtype: Compute dtype.
        trust_remote_code: Run model code that the checkpoint brings.
        buffers: As for `load_model`.

    Raises:
        DamagedError: As for `load_model`.
        UnsupportedError: As for `load_model`.
    """
    path = checkpoint.root

    def make() -> tuple[Any, dict[str, Any]]:
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(path, **options)
        with torch.device("meta"), no_init_weights():
            # Only to learn the class, which may come with the checkpoint.
            kind = type(auto_class(config).from_config(config, trust_remote_code=trust_remote_code))
        stored = {
            name: torch.empty(info.shape, dtype=STORED.get(info.dtype, torch.float32), device="meta")
            for name, info in checkpoint.tensors.items()
        }
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=stored,
            dtype=dtype,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        return model, report

    model = _checked(path, buffers, make)
    model.eval()
    model.requires_grad_(False)
    return model


def _checked(path: Path, buffers: tuple[str, ...], make: Callable[[], tuple[Any, dict[str, Any]]]) -> PreTrainedModel:
    """Make a model, and refuse stored tensors that it drops or invents; arguments and errors as for `load_with`."""
    quiet_transformers()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, report = make()
    except StrictDataclassError as error:
        raise _bad_config(path, error) from error
    except SafetensorError as error:
        raise DamagedError(
            f"the weights in {path} cannot be read", str(error), "download or copy the checkpoint again"
        ) from error
    except (
        ValueError,
        LookupError,
        ImportError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        if is_memory_error(error):
            raise
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot build the model in {path}",
            str(error).partition("\n")[0][:300] or type(error).__name__,
            "check config.json, or a newer transformers",
        ) from error
    # A silently dropped or freshly initialised tensor would make every figure meaningless.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = (str(name[0] if isinstance(name, tuple) else name) for name in report.get(problem) or ())
        if names := sorted(name for name in found if not name.endswith(buffers)):
            raise DamagedError(
                f"{len(names)} tensors of {path} are {problem.removesuffix('_keys')}, first {names[0]}",
                "stock transformers would ignore them or fill them with random numbers, since config.json does not "
                "announce what is stored",
                "check that config.json and the weights belong together",
            )
    return cast(PreTrainedModel, model)


def require_taken(
    model: PreTrainedModel,
    path: Path,
    names: Sequence[str],
    read: Callable[[str], npt.NDArray[np.floating]],
    buffers: tuple[str, ...] = (),
) -> None:
    """Refuse a loaded model that did not take stored tensors which its source does not have.

    A loader may pass over a tensor in silence, because its class ignores the name, or because something else is tied
    to its place. What `load_model` refuses is not looked for again.

    Args:
        model: The model.
        path: The checkpoint that it was loaded from.
        names: Stored names.
        read: Reads a stored tensor.
        buffers: As for `load_model`.

    Raises:
        DamagedError: Names the first tensor that has no effect.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name in names:
        found = parameters.get(name)
        if found is not None and found.is_meta:
            taken = True
        elif found is not None:
            taken = torch.equal(torch.from_numpy(read(name)).to(found.dtype), found.detach().cpu())
        else:
            taken = not name.endswith(buffers) and not any(re.search(pattern, name) for pattern in ignored)
        if not taken:
            raise DamagedError(
                f"stock transformers does not take the tensor {name} of {path}",
                "config.json does not announce it, so that it would be dropped in silence",
                "this is a defect of the method: report it, with the name of the model",
            )


def require_finite_model(model: PreTrainedModel) -> None:
    """Refuse a model with NaN or Inf in a parameter.

    Raises:
        DamagedError: Names the first bad tensor.
        UsageError: A value is too large for the compute dtype.
    """
    for name, parameter in model.named_parameters():
        require_finite_values(name, parameter)


def require_finite_values(name: str, values: torch.Tensor) -> None:
    """Refuse weights with NaN or Inf.

    Args:
        name: Name of the tensor, for the message.
        values: Its values in the compute dtype.

    Raises:
        DamagedError: One is NaN or Inf.
        UsageError: A value is too large for the compute dtype.
    """
    # One pass over the values, and no second tensor: a sum is finite only if all of them are.
    if bool(torch.isfinite(values.sum(dtype=torch.float32))):
        return
    # Large values may add up to more than fits.
    if not bool(torch.isfinite(values).all()):
        if values.dtype == torch.float16 and not bool(values.isnan().any()):
            raise UsageError(
                f"tensor {name} does not fit into float16",
                "a value above 65504 becomes infinite there",
                "use --dtype bfloat16 or --dtype float32",
            )
        raise DamagedError(
            f"tensor {name} holds NaN or Inf",
            "no figure or gradient computed with it means anything",
            "use an undamaged copy of the checkpoint",
        )
