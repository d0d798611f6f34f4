"""What every method must do on every architecture: plan, effect, coverage, exact bytes, reload, seed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmsurgery import (
    apply,
    debias,
    diff,
    prune,
    recover_alignment,
    redirect,
    remove_layernorm,
    revert,
    unlearn,
    verify,
)
from llmsurgery.arch.detect import detect
from llmsurgery.checkpoint import Checkpoint, decode
from llmsurgery.compute.view import weight_view
from llmsurgery.edits.kinds import Config, Edit, File, LowRank, Replace, Sparse, StoredEdit
from llmsurgery.errors import NoEffectError, UnsupportedError
from llmsurgery.methods.registry import all_methods, find_method
from llmsurgery.methods.settings import settings_of
from llmsurgery.run import forms

from ..builders import BUILDERS, MOE_BUILDERS
from ..builders.twin import adapter_of, twin
from ..conftest import HARMFUL, write_asked, write_data_files, write_pairs, write_recovery_files, write_rows
from ..edits.reference import expected

# The function of each task, and the data that its methods are given.
TASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unlearn": (unlearn, ("forget", "retain", "text")),
    "redirect": (redirect, ("pairs", "forget", "text")),
    "recover-alignment": (recover_alignment, ("harmful", "harmless", "task", "text")),
    "debias": (debias, ("mcq", "contrast", "text")),
    "prune": (prune, ("calibration", "domain", "text")),
    "remove-layernorm": (remove_layernorm, ("corpus", "text")),
}
METHODS = {method.spec.name: method.spec for method in all_methods()}
KNOWN = {method.spec.name: settings_of(method.config_type) for method in all_methods()}
# `make conformance` runs every method on every checkpoint. Otherwise FLAT does, and each other one on two: transposed
# weights or routed experts, and one that changes from method to method, so that all are seen. What needs further runs
# of a method, and what it plans, is then checked on the last of them alone.
EVERYWHERE = os.environ.get("LLMSURGERY_CONFORMANCE") == "all"
ALWAYS = ("gpt2", "mixtral")
# Methods that refuse many of them, and would have none at their turn.
OWN = {"pat": "sharded_llama"}


def cases(builders: Iterable[str], runs: Sequence[str] = (), once: bool = False) -> list[Any]:
    """Pairs of method and architecture, as parameters of a check; with `runs`, each with the name of a run too.

    What does not train has one way to run, and the first name stands for it. The checks of a pair go to one process,
    which makes their runs once.

    Args:
        builders: Names of the architectures.
        runs: Names of runs; all but the first are made where a check is done `once`, and all of FLAT's.
        once: One architecture of each method is enough.
    """
    pairs = []
    # Methods for models that see pictures have tests of their own; what they refuse is checked here.
    for number, (method, spec) in enumerate((name, spec) for name, spec in METHODS.items() if not spec.pictures):
        names = [name for name in builders if name in MOE_BUILDERS or not spec.one_expert]
        others = [name for name in names if name not in ALWAYS]
        # A repair loads two or three models: one checkpoint each is enough, another one from method to method.
        few = once or bool(spec.models)
        single = OWN.get(method, ([*ALWAYS, *others] if spec.models else others)[number % len(others)])
        whole = EVERYWHERE or (method == "flat" and not once)
        # In turn; a method that moves an expert finds one in the second alone.
        always = ALWAYS if spec.one_expert else (ALWAYS[number % 2],)
        for name in names:
            if not whole and name != single and (few or name not in always):
                continue
            mark = pytest.mark.xdist_group(f"{method}-{name}")
            if runs:
                named = runs if spec.trained and (whole or name == single) else runs[:1]
                pairs += [pytest.param(method, name, run, id=f"{run}-{method}-{name}", marks=mark) for run in named]
            else:
                pairs.append(pytest.param(method, name, id=f"{method}-{name}", marks=mark))
    return pairs


def supported(method: str, root: Path) -> bool:
    """Whether a checkpoint has the roles and dtypes that a method says it needs, and none that it cannot do with."""
    checkpoint = Checkpoint.open(root)
    structure = detect(checkpoint.config, checkpoint.tensors)
    spec, present = METHODS[method], set(structure.roles)
    if (spec.roles and not set(spec.roles) & present) or set(spec.lacks) & present:
        return False
    stored = {info.dtype for info in checkpoint.tensors.values()}
    refused = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    if {refused[name] for name in spec.refuses} & stored:
        return False
    if not (spec.structured and spec.trained):
        return True
    chosen = find_method(method)
    try:
        chosen.plan(chosen.config_type(), structure)
    except UnsupportedError:
        return False
    return True


def operate(method: str, model: Path, data: dict[str, Path], **options: Any) -> Any:
    """Run a method by the function of its task."""
    function, names = TASKS[METHODS[method].task]
    models = {name: twin(model, name) for name in METHODS[method].models}
    if METHODS[method].adapter:
        model, models = adapter_of(model), {"aligned": model}
        data = {**data, "harmful": data["safe"]}
    return function(model, method=method, **options, **models, **{name: data[name] for name in names})


# Every check below reads the same few runs of a method on a checkpoint; each is made once, when first asked for.
SETTINGS: dict[str, dict[str, object]] = {
    "lora": {"train": "lora", "roles": "linear"},
    "full": {"train": "full", "roles": "all"},
    "again": {"train": "lora", "roles": "linear"},
    "other seed": {"train": "lora", "roles": "linear"},
    "one tensor": {"roles": "attn.o", "layers": "1"},
    "one expert": {
        "train": "full",
        "roles": "expert.gate,expert.up,expert.down,router",
        "layers": "1",
        "experts": "2",
    },
}
# Methods that move one expert and its router choose by themselves which, unless they are told.
EXPERT_SETTINGS: dict[str, dict[str, object]] = {
    "lora": {},
    "full": {"layers": "1"},
    "again": {},
    "other seed": {},
    "one expert": {"layers": "1", "experts": "2"},
}
# Random weights have no states in common where letters follow, and no text that would mind.
FAST = {
    "max_steps": 3, "lr": 0.01, "eval.generate": False, "min_rho": 0.0, "kl_budget": None, "items": 2, "window": 16,
    "samples": 4, "domain_samples": 4,
}  # fmt: skip
RECOVERY: dict[str, object] = {
    "steps": 2, "rate": 0.01, "drop": 1.0, "keep": 0.5, "gamma": 0.5, "mode": "number", "number": 1000,
    "controls": False, "eval.refusal_tokens": 3,
}  # fmt: skip


def options_of(method: str, name: str) -> dict[str, Any]:
    """The options of a run: what the method knows of them, and its plain form if there is a choice."""
    spec = METHODS[method]
    wanted = {
        **FAST,
        **(RECOVERY if spec.models else {}),
        # All windows in one batch would leave nothing to the seed.
        **({"batch_size": 2} if spec.task == "remove-layernorm" else {}),
        **(EXPERT_SETTINGS if spec.one_expert else SETTINGS)[name],
        **({"form": spec.plain_form} if spec.plain_form else {}),
    }
    settings = {key: value for key, value in wanted.items() if key in KNOWN[method] or "." in key}
    return {"settings": settings, **({"until": "none", "guard": "none"} if spec.trained else {})}


@dataclass(frozen=True)
class Run:
    """A finished run: its source and result, its manifest and the edits that were handed to the writer."""

    source: Path
    out: Path
    manifest: dict[str, Any]
    edits: list[Edit]

    @property
    def stored(self) -> list[StoredEdit]:
        """The edits of stored tensors."""
        return [edit for edit in self.edits if not isinstance(edit, Config | File)]

    @property
    def plain(self) -> bool:
        """Whether every edited tensor has one edit that leaves its shape alone."""
        edits = self.stored
        return all(isinstance(e, LowRank | Replace) for e in edits) and len({e.name for e in edits}) == len(edits)


class Runs:
    """Makes and keeps runs; the sources must not change."""

    def __init__(self, checkpoints: dict[str, Path], data: dict[str, Path], root: Path) -> None:
        self.checkpoints, self.data, self.root = checkpoints, data, root
        self.made: dict[tuple[str, str, str], Run] = {}
        self.sources: dict[str, dict[str, str]] = {}

    def get(self, method: str, architecture: str, name: str) -> Run:
        key = method, architecture, name
        if not supported(method, self.checkpoints[architecture]):
            spec = METHODS[method]
            pytest.skip(f"{method} needs one of the roles {', '.join(spec.roles)}, and none of {', '.join(spec.lacks)}")
        if method == "fold" and architecture in ("tied_llama", "sharded_llama"):
            pytest.skip("gains of 1 and no biases: nothing to fold, and a run that changes nothing is an error")
        if key not in self.made:
            self.sources.setdefault(architecture, tree(self.checkpoints[architecture]))
            try:
                self.made[key] = self._make(*key)
            except NoEffectError:
                # Of the ordinary share one is found.
                if method != "anchored" or not EVERYWHERE:
                    raise
                pytest.skip("no neuron of this untrained model pushes a letter: a run that changes nothing is an error")
        return self.made[key]

    def _make(self, method: str, architecture: str, name: str) -> Run:
        out = self.root / f"{method}-{architecture}-{name.replace(' ', '-')}"
        kept: list[Edit] = []
        original, original_files = forms.write_edits, forms.beside_files

        def record(checkpoint: Any, publication: Any, edits: Any, *more: Any) -> Any:
            # Values that lie in the state of a run are gone behind it.
            kept.extend(replace(e, values=np.asarray(e.values)) if isinstance(e, Replace) else e for e in edits)
            return original(checkpoint, publication, edits, *more)

        def record_files(checkpoint: Any, edits: Any) -> Any:
            kept.extend(edit for edit in edits if isinstance(edit, Config))
            return original_files(checkpoint, edits)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forms, "write_edits", record)
            patch.setattr(forms, "beside_files", record_files)
            outcome = operate(
                method,
                self.checkpoints[architecture],
                self.data,
                out=out,
                seed=1 if name == "other seed" else 0,
                **options_of(method, name),
            )
        return Run(self.checkpoints[architecture], out, dict(outcome.manifest), kept)


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("conformance")
    files = write_data_files(root)
    data = {**files, **write_recovery_files(root), "pairs": write_pairs(root), **write_asked(root)}
    data["safe"] = write_rows(root / "safe.jsonl", [{**row, "completion": "I'm sorry."} for row in HARMFUL])
    data |= {"calibration": files["text"], "domain": files["retain"], "corpus": files["text"]}
    return Runs(checkpoints, data, root)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoint_files(root: Path) -> dict[str, str]:
    """The files that make the model: no card, manifest or undo data."""
    return {
        name: digest
        for name, digest in tree(root).items()
        if name not in {"README.md", "surgery.json"} and not name.startswith(".llmsurgery/")
    }


def stored(root: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = file.get_tensor(name)
    return tensors


def rounded(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Reference rounding: the nearest of the two neighbours in the stored dtype, ties to the even one."""
    exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
    guess = exact.to(dtype)
    step_up = torch.nextafter(guess, torch.full_like(guess, torch.inf))
    step_down = torch.nextafter(guess, torch.full_like(guess, -torch.inf))
    best = guess
    for candidate in (step_down, step_up):
        error, best_error = (candidate.double() - exact).abs(), (best.double() - exact).abs()
        width = {torch.float32: torch.int32}.get(dtype, torch.int16)
        even = (candidate.view(width) & 1) == 0
        best = torch.where((error < best_error) | ((error == best_error) & even), candidate, best)
    return best


def test_one_of_the_checkpoints_has_five_shards(checkpoints: dict[str, Path]) -> None:
    assert len(Checkpoint.open(checkpoints["sharded_llama"]).shards) == 5


@pytest.mark.parametrize(("method", "architecture", "train"), cases(BUILDERS, ("lora", "full")))
def test_patch_leads_there_and_revert_leads_back(
    method: str, architecture: str, train: str, runs: Runs, tmp_path: Path
) -> None:
    run = runs.get(method, architecture, train)
    diff(run.source, run.out, out=tmp_path / "patch")
    manifest = apply(tmp_path / "patch", run.source, out=tmp_path / "applied")
    assert checkpoint_files(tmp_path / "applied") == checkpoint_files(run.out)
    changed = {name for name, row in run.manifest["tensors"].items() if row["sha256_before"] != row["sha256_after"]}
    assert manifest["tensors"] == {name: run.manifest["tensors"][name] for name in changed}
    revert(run.out, out=tmp_path / "reverted")
    assert tree(tmp_path / "reverted") == runs.sources[architecture]
    assert verify(run.out, base=run.source)["save"] == "full"


@pytest.mark.parametrize(("method", "architecture", "train"), cases(BUILDERS, ("lora", "full")))
def test_method_writes_exactly_its_edits(method: str, architecture: str, train: str, runs: Runs) -> None:
    run = runs.get(method, architecture, train)
    assert tree(run.source) == runs.sources[architecture], "the source changed"
    # Coverage: every planned tensor was edited, unless the data choose among them, and something moved.
    for row in run.manifest["coverage"]:
        assert row["matched"] == row["targeted"] or (METHODS[method].selects and row["matched"] < row["targeted"])
    assert sum(row["changed"] for row in run.manifest["coverage"]) > 0
    # Exact bytes: base plus edit, rounded once; everything else untouched.
    old, new = stored(run.source), stored(run.out)
    written = Checkpoint.open(run.out)
    edits = {edit.name: edit for edit in run.stored}
    assert set(edits) <= set(run.manifest["tensors"])
    if not run.plain:
        whole = expected(Checkpoint.open(run.source), run.stored)
        assert {name: (code, raw.tobytes()) for name, (code, raw) in whole.items()} == {
            name: (info.dtype, written.read(name).tobytes()) for name, info in written.tensors.items()
        }
    else:
        assert set(edits) == set(run.manifest["tensors"])
        assert list(old) == list(new)
    for name, tensor in old.items() if run.plain else ():
        edit = edits.get(name)
        if isinstance(edit, LowRank):
            right = rounded(tensor.double().numpy() + edit.u @ edit.v, tensor.dtype)
        elif isinstance(edit, Replace):
            right = rounded(edit.values, tensor.dtype)
        elif isinstance(edit, Sparse):
            right = tensor.clone()
            right.view(-1)[torch.from_numpy(edit.indices)] = rounded(edit.values, tensor.dtype)
        else:
            right = tensor
        assert new[name].dtype == tensor.dtype
        assert torch.equal(new[name], right), name
    # Hashes in the manifest are those of the bytes on disk.
    for name, row in run.manifest["tensors"].items():
        assert (name in written.tensors) == (row["sha256_after"] is not None)
        if name in written.tensors:
            assert hashlib.sha256(written.read(name).tobytes()).hexdigest() == row["sha256_after"]
    # Side files are carried over as they were.
    settings = {edit.path[0] for edit in run.edits if isinstance(edit, Config)}
    for name in {"config.json", "tokenizer.json", "tokenizer_config.json"} - settings:
        assert (run.out / name).read_bytes() == (run.source / name).read_bytes()


@pytest.mark.parametrize(("method", "architecture", "train"), cases(BUILDERS, ("lora", "full")))
def test_result_reloads_with_the_logits_of_base_plus_edits(
    method: str, architecture: str, train: str, runs: Runs
) -> None:
    run = runs.get(method, architecture, train)
    if not run.plain:
        _, report = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32, output_loading_info=True)
        assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return
    # What edits say of the config belongs to them.
    said = {e.path[1]: e.value for e in run.edits if isinstance(e, Config) and e.path[0] == "config.json"}
    reference = AutoModelForCausalLM.from_pretrained(run.source, dtype=torch.float32, **said)
    written = Checkpoint.open(run.out)
    ids = torch.arange(1, 25)[None]
    with torch.inference_mode():
        source_logits = reference(input_ids=ids).logits
        for target in detect(written.config, written.tensors).tensors:
            values = torch.from_numpy(decode(written.read(target.stored), target.dtype))
            weight_view(reference, target).copy_(values)
    reloaded, report = AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.inference_mode():
        logits = reloaded(input_ids=ids).logits
        assert torch.equal(logits, reference(input_ids=ids).logits)
        assert not torch.equal(logits, source_logits)
    assert AutoTokenizer.from_pretrained(run.out).chat_template


@pytest.mark.parametrize(("method", "architecture"), cases(BUILDERS, once=True))
def test_one_seed_gives_one_result(method: str, architecture: str, runs: Runs) -> None:
    one, two = (runs.get(method, architecture, name) for name in ("lora", "again"))
    trees = [tree(run.out) for run in (one, two)]
    for files in trees:
        del files["surgery.json"]
    assert trees[0] == trees[1]
    varying = {"cost", "out"}
    manifests = [{key: value for key, value in run.manifest.items() if key not in varying} for run in (one, two)]
    for manifest in manifests:
        manifest["metrics"] = {name: row for name, row in manifest["metrics"].items() if not name.startswith("speed.")}
    assert json.dumps(manifests[0]) == json.dumps(manifests[1])
    if METHODS[method].trained:
        assert runs.get(method, architecture, "other seed").manifest["tensors"] != one.manifest["tensors"]


@pytest.mark.parametrize(("method", "architecture"), cases(BUILDERS, once=True))
def test_dry_run_plans_what_the_run_does(method: str, architecture: str, runs: Runs, tmp_path: Path) -> None:
    run = runs.get(method, architecture, "lora")
    options = options_of(method, "lora")
    outcome = operate(method, run.source, runs.data, out=tmp_path / "out", dry_run=True, **options)
    assert outcome.out is None
    assert not (tmp_path / "out").exists()
    targets: Any = outcome.manifest["targets"]
    covered = {row["role"]: row["targeted"] for row in run.manifest["coverage"]}
    tensors = {role: row["tensors"] for role, row in targets.items()}
    fewer = all(count <= tensors.get(role, 0) for role, count in covered.items())
    assert covered == tensors or (METHODS[method].selects and fewer)
    source = Checkpoint.open(run.source)
    sizes = [source.info(name).nbytes for name in run.manifest["tensors"] if name in source.tensors]
    planned: Any = outcome.manifest["bytes_to_rewrite"]
    assert planned == sum(sizes) or (METHODS[method].selects and planned > sum(sizes))


@pytest.mark.parametrize(
    ("method", "architecture"),
    [case for case in cases(BUILDERS, once=True) if not METHODS[case.values[0]].one_expert],
)
def test_untargeted_roles_and_layers_are_left_alone(method: str, architecture: str, runs: Runs) -> None:
    if "layers" not in KNOWN[method] or METHODS[method].structured:
        pytest.skip(f"{method} has no choice of layers that stay as they are")
    roles, source = METHODS[method].roles, Checkpoint.open(runs.checkpoints[architecture])
    tensors = detect(source.config, source.tensors).tensors
    if roles and not any(tensor.layer == 1 and tensor.role in roles for tensor in tensors):
        pytest.skip(f"{method} needs one of the roles {', '.join(roles)}, and the second block has routed experts")
    run = runs.get(method, architecture, "one tensor")
    old, new = stored(run.source), stored(run.out)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert set(changed) == set(run.manifest["tensors"])
    if "roles" in KNOWN[method]:
        assert len(changed) == 1
    layers = {tensor.stored: tensor.layer for tensor in tensors}
    assert {layers[name] for name in changed} == {1}


@pytest.mark.parametrize("method", [name for name, spec in METHODS.items() if spec.roles])
def test_a_model_without_the_roles_of_a_method_is_refused(method: str, runs: Runs, tmp_path: Path) -> None:
    lacking = [root for root in runs.checkpoints.values() if not supported(method, root)]
    assert lacking
    for root in lacking:
        for dry_run in (True, False):
            with pytest.raises(UnsupportedError):
                operate(method, root, runs.data, out=tmp_path / "out", dry_run=dry_run, **options_of(method, "lora"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "architecture"), cases(MOE_BUILDERS))
def test_one_expert_and_its_router_are_edited_as_stored(method: str, architecture: str, runs: Runs) -> None:
    if "experts" not in KNOWN[method] or METHODS[method].structured:
        pytest.skip(f"{method} has no choice of experts that stay as they are")
    run = runs.get(method, architecture, "one expert")
    checkpoint = Checkpoint.open(run.source)
    planned = {
        tensor.stored
        for tensor in detect(checkpoint.config, checkpoint.tensors).tensors
        if tensor.layer == 1 and (tensor.expert == 2 or tensor.label in ("router", "shared.gate"))
    }
    if "roles" in KNOWN[method]:
        planned = {name for name in planned if "shared" not in name}
        assert len(planned) == 4
        assert set(run.manifest["tensors"]) == planned
    old, new = stored(run.source), stored(run.out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert changed <= planned


@pytest.mark.parametrize("method", [method for method, spec in METHODS.items() if spec.one_expert])
@pytest.mark.parametrize("architecture", ["sharded_llama", "gpt2"])
def test_methods_of_experts_refuse_models_without(
    method: str, architecture: str, checkpoints: dict[str, Path], runs: Runs, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="routed experts") as caught:
        operate(method, checkpoints[architecture], runs.data, out=tmp_path / "out")
    assert caught.value.exit_code == 4
