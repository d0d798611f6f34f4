"""Damaged files read one by one in a child per group, which is watched: messages, time, memory, paths."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults import damage
from benchmarks.faults.forked import HUNG, start_function, wait
from benchmarks.faults.places import ROWS, chain, make_model, write_rows
from benchmarks.faults.tally import Tally

SECONDS = 10.0
"""Processor time that a damaged file may take."""
_SPARE = 64 << 20
"""Bytes that reading may take beyond four times what is parsed."""

Case = tuple[str, str, bytes]
"""A label, the name of the damaged file, and its content."""


class _TooLongError(BaseException):
    """A file took too much time; not an `Exception`, which the code under test may catch."""


def _too_long(*_: object) -> None:
    raise _TooLongError


@contextmanager
def _timed() -> Iterator[None]:
    """Raise in a block that computes for too long."""
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class _Memory:
    """The growth of this process's memory over a block, from the kernel's own high-water mark."""

    def __init__(self) -> None:
        self.resets = os.access("/proc/self/clear_refs", os.W_OK)

    def begin(self) -> None:
        if self.resets:
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._kibibytes("VmRSS")

    def grown(self) -> int:
        """Return bytes; 0 where the mark cannot be set back."""
        return (self._kibibytes("VmHWM") - self.before) * 1024 if self.resets else 0

    def _kibibytes(self, name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
        return 0


class _Paths:
    """Remembers which files outside of a folder are opened."""

    def __init__(self, folder: Path) -> None:
        own = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc", "/sys", "/usr/lib", "/dev/null"]
        self.allowed = tuple(os.path.realpath(path) for path in [str(folder), *own])
        self.found: list[str] = []

    def install(self) -> None:
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path = os.path.realpath(arguments[0])
            if not path.startswith(self.allowed):
                self.found.append(path)


def examine(
    tally: Tally, folder: Path, cases: list[Case], read: Callable[[Path, str], None], closed: bool = True
) -> None:
    """Put damaged files into a folder one after another, and read it in a child.

    Args:
        tally: Where every case is counted.
        folder: The folder, good but for the damage; it is as before afterwards.
        cases: The damage.
        read: Reads the folder, the name of the damaged file given.
        closed: Whether nothing outside of the folder may be opened; a recipe may name its data anywhere.
    """
    results = folder.with_name(f"{folder.name}.results")
    log = folder.with_name(f"{folder.name}.log")
    results.write_text("")

    def child() -> int:
        paths = _Paths(folder)
        paths.install()
        memory = _Memory()
        with results.open("a") as stream:
            for label, name, content in cases:
                paths.found.clear()
                seen, problems = _one(folder, name, content, read, memory)
                outside = [path for path in paths.found if not path.startswith(str(results))]
                problems += [f"opened {path}" for path in outside[: 2 * closed]]
                stream.write(json.dumps([label, seen, problems]) + "\n")
                stream.flush()
        return 0

    code = wait(start_function(child, log), 10 * len(cases) + 120)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for label, seen, problems in lines:
        tally.add(seen, problems, label)
    if len(lines) < len(cases):
        label = cases[len(lines)][0]
        tally.add("the process", ["hung" if code == HUNG else f"ended with {code}: {log.read_text()[-300:]}"], label)


def _one(
    folder: Path, name: str, content: bytes, read: Callable[[Path, str], None], memory: _Memory
) -> tuple[str, list[str]]:
    from llmsurgery.errors import SurgeryError

    path = folder / name
    good = path.read_bytes() if path.is_file() else None
    problems = []
    path.write_bytes(content)
    memory.begin()
    try:
        with _timed():
            read(folder, name)
        seen = "read"
    except SurgeryError as error:
        seen = f"exit code {error.exit_code}"
        if type(error) is SurgeryError or not error.what or not error.why:
            problems.append(f"no whole message: {error!r}")
        if len(str(error)) > 5000:
            problems.append(f"a message of {len(str(error))} characters")
    except _TooLongError:
        seen = "hung"
        problems.append(f"more than {SECONDS:g} s")
    except MemoryError:
        seen = "exit code 7"
        problems.append("out of memory")
    # Whatever comes out here would end in a traceback.
    except Exception as error:  # noqa: BLE001
        seen = "exit code 1"
        problems.append(f"{type(error).__name__}: {str(error)[:200]}")
    grown = memory.grown()
    if grown > 4 * len(content) + _SPARE:
        problems.append(f"memory grew by {grown >> 20} MiB for {len(content) >> 10} KiB")
    path.unlink()
    if good is not None:
        path.write_bytes(good)
    return seen, problems


def read_weights(folder: Path, name: str) -> None:
    """Open a checkpoint, find its roles and read every tensor."""
    del name
    from llmsurgery.arch.detect import detect
    from llmsurgery.checkpoint import Checkpoint, require_finite

    checkpoint = Checkpoint.open(folder)
    for tensor, info in checkpoint.tensors.items():
        require_finite(checkpoint.read(tensor), info.dtype, tensor)
    detect(checkpoint.config, checkpoint.tensors)


def read_side_files(folder: Path, name: str) -> None:
    """Load what stock transformers makes of a folder, as a run does before it works."""
    from llmsurgery.compute.load import check_loadable, load_tokenizer
    from llmsurgery.data.chat import Encoder
    from llmsurgery.run.inspect import inspect_model

    if name == "config.json":
        inspect_model(str(folder))
    check_loadable(folder)
    Encoder(load_tokenizer(folder), 64)


READERS = {
    "rows": ("llmsurgery.data.records", "read_rows"),
    "pairs": ("llmsurgery.data.pairs", "read_pairs"),
    "questions": ("llmsurgery.data.mcq", "read_choices"),
    "contrast": ("llmsurgery.data.contrast", "read_contrast"),
    "prompts": ("llmsurgery.data.prompts", "read_prompts"),
}


def read_data(folder: Path, name: str) -> None:
    """Read a data file with the reader that its name begins with."""
    import importlib

    module, function = READERS[name.partition("-")[0]]
    getattr(importlib.import_module(module), function)(folder / name)


DATA: dict[str, list[dict[str, object]]] = {
    "rows-qa.jsonl": [{**row, "paraphrased_answer": "x y", "perturbed_answer": ["z", "w"]} for row in ROWS["forget"]],
    "rows-chat.jsonl": [
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Orla."}]},
        {"prompt": "The mill", "completion": " stands."},
        {"prompt": "The dog", "chosen": " sleeps.", "rejected": " barks.", "subject": "dog"},
        {"id": 3, "input": "Where?", "output": "Here.", "task": "x", "split": "forget"},
    ],
    "rows-text.json": ROWS["text"] * 3,
    "pairs-names.jsonl": [{"from": "Orla Venn", "to": "Ivo Hask", "aliases": ["the bee keeper"]}],
    "questions-own.jsonl": [{"question": "Which?", "choices": ["oak", "bee"], "answer": 1}],
    "questions-arc.jsonl": [
        {
            "question": {"stem": "Which?", "choices": [{"text": "oak", "label": "A"}, {"text": "bee", "label": "B"}]},
            "answerKey": "A",
        }
    ],
    "contrast-pairs.jsonl": [{"sent_more": "It is she.", "sent_less": "It is he.", "stereo_antistereo": "stereo"}],
    "prompts-plain.jsonl": [{"prompt": "Describe the cup."}, {"prompt": "Who?", "completion": "Nobody."}],
}


def damaged_weights(work: Path, tries: int, seed: int = 2) -> Tally:
    """Read checkpoints with a damaged weight file, and some whose headers ask for much memory."""
    tally = Tally("damaged safetensors files", "read, or a message and its code; bounded time, memory and paths")
    folder, generator = _folder(work / "weights"), random.Random(seed)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    cases = []
    for number in range(tries):
        name = shards[number % len(shards)]
        content = damage.damage_safetensors((folder / name).read_bytes(), generator)
        cases.append((f"file {number}", name, content))
    size = 20_000_000 if tries >= 500 else 2_500_000
    cases += [(name, shards[0], content) for name, content in damage.greedy_headers(size).items()]
    examine(tally, folder, cases, read_weights)
    return tally


def damaged_indexes(work: Path, tries: int, seed: int = 3) -> Tally:
    """Read checkpoints with a damaged index."""
    tally = Tally("damaged index files", "read, or a message and its code; nothing outside of the folder is opened")
    folder, generator = _folder(work / "indexes"), random.Random(seed)
    shutil.copy(next(folder.glob("*.safetensors")), work / "outside.safetensors")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    name = "model.safetensors.index.json"
    content = (folder / name).read_bytes()
    cases = [(f"index {number}", name, damage.damage_index(content, generator)) for number in range(tries)]
    examine(tally, folder, cases, read_weights)
    return tally


def damaged_side_files(work: Path, tries: int, seed: int = 4) -> Tally:
    """Load checkpoints with a damaged config or tokenizer, as stock transformers reads them."""
    tally = Tally("damaged configs and tokenizers", "loaded, or a message and its code")
    folder, generator = _folder(work / "sides"), random.Random(seed)
    (folder / "generation_config.json").write_text('{"eos_token_id": 257, "max_length": 20}')
    names = ["config.json", "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
    config = json.loads((folder / "config.json").read_text())
    cases = [
        (f"config.json {key}={value:.3g}", "config.json", json.dumps({**config, key: value}).encode())
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
        for value in (-1, 10**12)
    ]
    wrong = {**json.loads((folder / "tokenizer_config.json").read_text()), "model_max_length": "x"}
    cases.append(("tokenizer_config.json model_max_length=x", "tokenizer_config.json", json.dumps(wrong).encode()))
    for number in range(tries):
        name = names[number % len(names)]
        content = damage.damage_text_json((folder / name).read_bytes(), generator)
        cases.append((f"{name} {number}", name, content))
    examine(tally, folder, cases, read_side_files)
    return tally


def damaged_data(work: Path, tries: int, seed: int = 5) -> Tally:
    """Read damaged data files of every layout."""
    tally = Tally("damaged data files", "read, or a message that names file and line")
    folder, generator = work / "data", random.Random(seed)
    folder.mkdir()
    for name, rows in DATA.items():
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text)
    cases = []
    for number in range(tries):
        name = list(DATA)[number % len(DATA)]
        change = damage.damage_text_json if name.endswith(".json") else damage.damage_lines
        cases.append((f"{name} {number}", name, change((folder / name).read_bytes(), generator)))
    examine(tally, folder, cases, read_data)
    return tally


def read_recipe(folder: Path, name: str) -> None:
    """Read a recipe or a manifest, and plan its steps as far as their files."""
    from llmsurgery.methods.settings import read_config_file
    from llmsurgery.run.chain_steps import end_gates, plan_steps
    from llmsurgery.run.manifest import earlier_operations
    from llmsurgery.run.overrides import load_recipe

    if name == "config.yaml":
        read_config_file(folder / name)
        return
    loaded = load_recipe(folder / name)
    planned = plan_steps(loaded.recipe)
    end_gates(loaded.recipe, planned)
    if name == "surgery.json":
        earlier_operations(folder)


def damaged_recipes(work: Path, manifest: Path, tries: int, seed: int = 6, bombs: bool = True) -> Tally:
    """Read damaged recipes, configs and manifests, and bombs of aliases and of nesting; some of these, or all."""
    tally = Tally("damaged recipes and configs, bombs", "read, or a message and its code, in bounded time and memory")
    folder, generator = work / "recipes", random.Random(seed)
    folder.mkdir()
    data = write_rows(folder)
    chain(folder / "model", data, folder / "out")
    shutil.copy(manifest, folder / "surgery.json")
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "config.yaml").write_text("lr: 0.001\nroles: [mlp.down]\nrank: 4\n")
    names = ["recipe.json", "recipe.yaml", "surgery.json", "config.yaml"]
    cases = [(f"bomb {name}", name, content) for name, content in list(_bombs())[:: 1 if bombs else 3]]
    for number in range(tries):
        name = names[number % len(names)]
        change = damage.damage_text_json if name.endswith(".json") else damage.damage_bytes
        if name == "recipe.yaml" and generator.randrange(2):
            # What is JSON is YAML too.
            cases.append((f"{name} {number}", name, damage.damage_json(recipe, generator).encode()))
            continue
        cases.append((f"{name} {number}", name, change((folder / name).read_bytes(), generator)))
    examine(tally, folder, cases, read_recipe, closed=False)
    return tally


def _bombs() -> Iterator[tuple[str, bytes]]:
    """Short texts that stand for large documents, or for ones without an end."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
    )
    steps = "steps: &s\n- {task: unlearn, method: flat, settings: {x: *s}}\n"
    texts = [laughs, merges, steps, "&a [*a]\n", "a: &a {b: *a}\n", "[" * 50_000, "{a: " * 5_000, "- " * 5_000]
    texts += ["? " * 5_000, "!!python/object/apply:os.system [echo]\n", "!!int 1:" + "59:" * 60_000 + "1\n"]
    texts += ["a: !!timestamp 2024-99-99\n", "a: !!binary ///\n", "a: !!float ''\n", "x: 1\n" * 200_000, "\x00", "%x"]
    for text in texts:
        for name in ("recipe.yaml", "config.yaml"):
            yield name, text.encode()
    for text in ('{"a":' * 100_000, '{"steps":' + "[" * 900 + "]" * 900 + "}", '{"format": ' + "9" * 5000 + "}"):
        for name in ("recipe.json", "surgery.json"):
            yield name, text.encode()


def _folder(place: Path) -> Path:
    return make_model(place)
