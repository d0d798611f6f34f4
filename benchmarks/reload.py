"""Every plain result, loaded by stock transformers in a fresh process, against its edits computed in memory.

    python -m benchmarks.reload [--no-demo] [--result SOURCE RESULT ...]

Every method of `unlearn` runs twice on the embedded demo with the same seed and few steps: once to a checkpoint, once
to a patch, which holds the edits alone. The checkpoint is loaded in a fresh process that imports nothing of llmsurgery;
here the edits of the patch are added to the source's tensors in memory, and stock transformers makes a model of them.
Logits of both on fixed prompts must be equal bit for bit. Of a `--result` made before, the edits are those that
`llmsurgery diff` finds. A method whose default is not plain runs in its plain form.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import write_result

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from llmsurgery.edits.patch import Patch
    from llmsurgery.methods.base import MethodSpec

PLAIN = {"key-space": {"form": "folded"}}
"""Settings of methods whose default is a bundle."""
PROMPTS, TOKENS = 4, 24
QUICK: dict[str, object] = {"eval.generate": False, "eval.truth_ratio": False, "eval.text_rows": 1, "eval.rows": 4}


def edited_tensors(source: Path, patch: Patch) -> dict[str, torch.Tensor]:
    """Return all tensors of the source with the edits of a patch, none of which touches a disk."""
    import numpy as np
    import torch
    from safetensors import safe_open

    from llmsurgery.checkpoint import Checkpoint
    from llmsurgery.edits.apply import PatchedRows
    from llmsurgery.edits.write import write_tensor

    base = Checkpoint.open(source)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({info.path for info in base.tensors.values()}):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def put(name: str, start: int, raw: npt.NDArray[Any], result: npt.NDArray[Any]) -> None:
        del raw
        content = torch.frombuffer(bytearray(np.ascontiguousarray(result).tobytes()), dtype=tensors[name].dtype)
        tensors[name][start : start + result.shape[0]] = content.reshape(result.shape)

    for name, tensor in patch.tensors.items():
        rows = PatchedRows(patch, tensor)
        if not rows.origin.in_place:
            raise SystemExit(f"{name} changes its name or shape")
        write_tensor(base, rows.origin, rows.compute, None, put)
        rows.finish()
    return tensors


def compare_logits(source: Path, result: Path, patch_file: Path, work: Path) -> dict[str, object]:
    """Return whether the published result and the edits in memory give the same logits."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from llmsurgery.edits.patch import read_patch

    patch = read_patch(patch_file)
    config = AutoConfig.from_pretrained(source)
    generator = random.Random(0)
    prompts = [[generator.randrange(config.vocab_size) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    (work / "prompts.json").write_text(json.dumps(prompts))
    words = [sys.executable, "-m", "benchmarks.peers.reload_stock", str(result), str(work / "prompts.json")]
    subprocess.run([*words, str(work / "logits.safetensors")], check=True, stdout=subprocess.DEVNULL)
    published = load_file(work / "logits.safetensors")
    tensors = edited_tensors(source, patch)
    # With tensors of one's own, the Auto class takes no configuration alone; its class does.
    stock = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = stock.from_pretrained(None, config=config, state_dict=tensors, dtype="auto").eval()
    untouched = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    different, moved = 0, False
    with torch.inference_mode():
        for number, ids in enumerate(prompts):
            logits = model(input_ids=torch.tensor([ids])).logits
            different += int((logits.view(torch.uint8) != published[str(number)].view(torch.uint8)).any(-1).sum())
            # Edits that no logit shows would make the comparison an empty one.
            moved |= not torch.equal(untouched(input_ids=torch.tensor([ids])).logits, logits)
    return {
        "tensors": len(patch.tensors),
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits": PROMPTS * TOKENS * config.vocab_size,
        "different_positions": different,
        "moved": moved,
    }


def run_method(spec: MethodSpec, folder: Path) -> tuple[Path, Path, Path]:
    """Run a method on its demo to a checkpoint and to a patch; return source, checkpoint and patch file."""
    from llmsurgery import unlearn
    from llmsurgery.demo import world_path
    from llmsurgery.run.forms import PATCH

    settings = {**QUICK, **({"max_steps": 4, "save_every": 0} if spec.trained else {}), **PLAIN.get(spec.name, {})}
    places = []
    for save in ("full", "patch"):
        guard, until = ("none", "none") if spec.trained else (None, None)
        outcome = unlearn(
            method=spec.name, settings=settings, out=folder / save, save=save, guard=guard, until=until, undo=False
        )
        places.append(outcome.out or folder / save)
    return world_path(spec.demo), places[0], places[1] / PATCH


def main() -> None:
    """Run, compare and write the result."""
    from llmsurgery import diff
    from llmsurgery.methods.registry import all_methods

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", nargs=2, action="append", default=[], metavar=("SOURCE", "RESULT"), type=Path)
    parser.add_argument("--no-demo", action="store_true", help="look at the given results alone")
    options = parser.parse_args()
    methods: dict[str, object] = {}
    results: dict[str, object] = {}
    for method in [] if options.no_demo else all_methods():
        if method.spec.task == "unlearn":
            with tempfile.TemporaryDirectory() as folder:
                methods[method.spec.name] = compare_logits(*run_method(method.spec, Path(folder)), Path(folder))
            print(method.spec.name, methods[method.spec.name], flush=True)
    for source, result in options.result:
        with tempfile.TemporaryDirectory() as folder:
            diff(source, result, out=Path(folder) / "edit.patch")
            results[result.name] = compare_logits(source, result, Path(folder) / "edit.patch", Path(folder))
        print(result.name, results[result.name], flush=True)
    write_result("reload", {"methods": methods, "results": results})


if __name__ == "__main__":
    main()
