"""Where a MODEL argument leads: a local directory, a GGUF file converted once, or a cached hub snapshot."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path

from llmsurgery.checkpoint import file_digest
from llmsurgery.errors import InputError, UnsupportedError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


def cache_directory() -> Path:
    """Return the toolkit's cache: `LLMSURGERY_CACHE`, else `llmsurgery` in the user's cache directory."""
    if explicit := os.environ.get("LLMSURGERY_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmsurgery"


def resolve_source(model: str | Path) -> Path:
    """Return the local checkpoint directory of a MODEL argument.

    Args:
        model: A directory, a `.gguf` file (converted once to a cached bf16 directory) or a hub id.

    Raises:
        InputError: Nothing is there.
        UnsupportedError: A file that is not a checkpoint directory or GGUF file.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return convert_gguf(path)
        pickled = path.suffix in _PICKLES
        raise UnsupportedError(
            f"{path} is a file",
            "pickle files can run code when opened" if pickled else "a checkpoint is a directory or a .gguf file",
            "give the directory that holds config.json and the safetensors files",
        )
    if _HUB_ID.match(str(model)) and path.suffix not in {".gguf", ".safetensors", *_PICKLES}:
        return _hub_snapshot(str(model))
    raise InputError(f"model {model} does not exist", "no such directory or file", "check the path")


def _hub_snapshot(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:  # ValueError: not a valid id
        raise InputError(
            f"model {repository} is neither a directory nor a cached or reachable hub repository",
            str(error).splitlines()[0],
            "give a local directory, or download the model first",
        ) from error


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file to a bf16 safetensors directory in the cache, once per file content.

    Args:
        path: The `.gguf` file.

    Returns:
        The directory, which then is the source of everything that follows.

    Raises:
        InputError: The file cannot be read as GGUF.
    """
    target = cache_directory() / "gguf" / f"{path.stem}-{file_digest(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # A private folder per process, renamed when complete: two runs at once cannot see each other's half.
    building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _convert(path, building)
        try:
            building.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _convert(path: Path, building: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    except (ValueError, KeyError, OSError, NotImplementedError, IndexError, struct.error) as error:
        raise InputError(
            f"{path} could not be read as GGUF", str(error).splitlines()[0][:200], "check that the file is complete"
        ) from error
    # The loaded model still claims to be quantised and would refuse to be saved as plain weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.quantization_method = None
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    note = {"converted_from": path.name, "sha256": file_digest(path)}
    (building / "conversion.json").write_text(json.dumps(note, indent=2) + "\n")
