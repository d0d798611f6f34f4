"""Write `benchmarks/README.md` from the newest result of each benchmark.

python -m benchmarks.table
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.table.chains import recipe_smollm2
from benchmarks.table.cost import covariance, flat_step, memory, startup, unlearning
from benchmarks.table.faults import faults
from benchmarks.table.files import byte_layer, conformance, kill_resume, patches, reload
from benchmarks.table.forgetting import attacks, comparison, guard, guard_curves, unlearn_smollm2
from benchmarks.table.gpu import gpu_kernels
from benchmarks.table.letters import debias_cost, debias_smollm2
from benchmarks.table.narrowing import prune_pat, prune_pat_settings
from benchmarks.table.norms import layernorm
from benchmarks.table.page import machine, newest
from benchmarks.table.pruned import d_pruner_memory, prune_peers, prune_smollm2
from benchmarks.table.redirection import redirect_7b, redirect_smollm2
from benchmarks.table.repair import recover_smollm2, restore_large
from benchmarks.table.vision import vision_demo

HEAD = """# Benchmarks

Made by `python -m benchmarks.table` from the newest file of each kind under `results/`; every number has its JSON.

Repeat them with `make benchmarks` (startup, the FLAT step, every method's step, the guard, the methods on the demo),
and, with question and text files of your own,
`python -m benchmarks.unlearn_smollm2 MODEL QUESTIONS.jsonl TEXT.jsonl`,
`python -m benchmarks.redirect_smollm2 MODEL TEXT.jsonl`,
`python -m benchmarks.prune_pat MODEL TEXT.jsonl`,
`python -m benchmarks.debias_smollm2 MODEL ARC.jsonl TEXT.jsonl` and
`python -m benchmarks.memory MODEL FORGET.jsonl RETAIN.jsonl`.
`python -m benchmarks.byte_layer SCRATCH --make` needs 27 GB of disk, and so does
`python -m benchmarks.redirect_7b SCRATCH --make --tokenizer FOLDER`, with FOLDER a byte-pair tokenizer.
"""

SECTIONS = {
    "startup": startup,
    "flat_step": flat_step,
    "unlearning": unlearning,
    "memory": memory,
    "unlearn_smollm2": unlearn_smollm2,
    "unlearn_smollm2_guard": unlearn_smollm2,
    "unlearn_smollm2_strong": unlearn_smollm2,
    "guard_demo": guard,
    "patches": patches,
    "faults": faults,
    "kill_resume": kill_resume,
    "conformance": conformance,
    "compare_demo": comparison,
    "compare_demo_attacks": comparison,
    "compare_smollm2": comparison,
    "compare_smollm2_attacks": comparison,
    "attacks_smollm2_control": attacks,
    "reload": reload,
    "byte_layer": byte_layer,
    "redirect_7b": redirect_7b,
    "covariance": covariance,
    "redirect_smollm2": redirect_smollm2,
    "redirect_smollm2_layers": redirect_smollm2,
    "recover_smollm2": recover_smollm2,
    "recover_smollm2_strong": recover_smollm2,
    "restore_large": restore_large,
    "debias_smollm2": debias_smollm2,
    "debias_smollm2_all": debias_smollm2,
    "debias_cost": debias_cost,
    "prune_smollm2": prune_smollm2,
    "d_pruner_memory": d_pruner_memory,
    "prune_peers": prune_peers,
    "prune_peers_large": prune_peers,
    "recipe_smollm2": recipe_smollm2,
    "vision_demo": vision_demo,
    "layernorm": layernorm,
    "prune_pat": prune_pat,
    "prune_pat_settings": prune_pat_settings,
    "gpu_kernels": gpu_kernels,
}


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        result = newest(name)
        if result is not None:
            parts.append(f"{section(result)}\n\n{machine(result)}\n")
        if name == "guard_demo":
            parts.append(guard_curves())
    Path(__file__).parents[1].joinpath("README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
