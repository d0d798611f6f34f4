"""`--report`: one page that holds what it should, escapes what users give, and asks nobody for anything."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from llmsurgery.cli.app import run
from llmsurgery.report.page import verdict, write_report

from ..builders.twin import twin
from ..cli.test_commands import unlearn
from ..conftest import TEXT, write_data_files, write_recovery_files, write_rows
from .chromium import CHROMIUM, Page

EVIL = "Who <script>document.title='taken'</script> keeps <img src=https://example.org/a.png> the bees?"
GATE = "forget.token_prob<=1000x"
SECRETS = {"HF_TOKEN": "hf_secretsecretsecret", "HTTPS_PROXY": "http://me:secretsecret@127.0.0.1:9"}
SHORT = {"eval.generation_tokens": 4, "eval.generation_rows": 2}
WORDS = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]


class Ran(NamedTuple):
    """A source, and what one run with --report made of it."""

    source: Path
    data: dict[str, Path]
    out: Path

    @property
    def page(self) -> str:
        return (self.out / "report.html").read_text("utf-8")

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "surgery.json").read_text()))


@pytest.fixture(scope="module")
def ran(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run on a model whose name, and on a row whose text, is markup."""
    root = tmp_path_factory.mktemp("report")
    source = Path(shutil.copytree(checkpoints["sharded_llama"], root / "<b onclick=x>model&amp;"))
    rows: list[dict[str, object]] = [{"question": EVIL, "answer": "Orla </td><b>Venn</b>."}] * 2
    data = {"forget": write_rows(root / "forget.jsonl", rows), "text": write_rows(root / "t.jsonl", [*map(dict, TEXT)])}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        assert run([*unlearn(source, data, root / "out", "--require", GATE, "--report", *WORDS), "-q"]) == 0
    return Ran(source, data, root / "out")


class Outline(HTMLParser):
    """Elements with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_says_all_and_escapes_what_users_give(ran: Ran) -> None:
    found = Outline(ran.page)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img", "b", "iframe", "object", "a"}
    names = {name for _, attributes in found.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "src"}
    assert [given["href"] for tag, given in found.elements if tag == "link"] == ["data:,"]
    assert "url(" not in ran.page
    assert "@import" not in ran.page
    assert EVIL in found.text
    assert str(ran.source) in found.text
    for word in (
        "Published: the gate held",
        GATE,
        "utility.ppl_ratio",
        "attn.q",
        "seed 0",
        "peak memory",
        "forget.jsonl",
    ):
        assert word in found.text
    manifest = ran.manifest
    figure = manifest["metrics"]["forget.token_prob"]
    assert f"{figure['after']['value']:.4g}" in found.text
    low, high = figure["after"]["interval"]
    assert f"{low:.3g} to {high:.3g}" in found.text
    assert manifest["data"]["forget"]["sha256"] in found.text
    # Two blocks of seven matrices: a square of ground and one of colour for each, and twelve in the legend.
    changed = sum(record["sha256_before"] != record["sha256_after"] for record in manifest["tensors"].values())
    assert sum(tag == "rect" for tag, _ in found.elements) == 2 * changed + 12
    assert manifest["data"]["forget"]["path"] not in found.text


def test_nothing_of_the_environment_is_kept(ran: Ran) -> None:
    for path in ran.out.rglob("*"):
        assert not path.is_file() or b"secretsecret" not in path.read_bytes(), path


def test_report_is_no_part_of_the_result(ran: Ran, tmp_path: Path) -> None:
    assert "report.html" not in ran.manifest["files"]
    assert run(["verify", str(ran.out), "--base", str(ran.source), "-q"]) == 0
    # A replay gives the same bytes, with a page only where it is asked for.
    assert run(["run", str(ran.out / "surgery.json"), "-o", str(tmp_path / "again"), "-q"]) == 0

    def digests(root: Path) -> dict[str, str]:
        files = (path for path in root.rglob("*") if path.is_file())
        kept = {path: str(path.relative_to(root)) for path in files if path.name not in ("surgery.json", "report.html")}
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in kept.items()}

    assert digests(tmp_path / "again") == digests(ran.out)
    again, found = json.loads((tmp_path / "again" / "surgery.json").read_text()), ran.manifest
    for manifest in (again, found):
        del manifest["cost"], manifest["out"]
    assert again == found
    assert run(["revert", str(ran.out), "-o", str(tmp_path / "back"), "-q"]) == 0
    assert not (tmp_path / "back" / "report.html").exists()


def test_page_of_the_sources_own_makes_room_and_comes_back(ran: Ran, tmp_path: Path) -> None:
    source = Path(shutil.copytree(ran.source, tmp_path / "source"))
    (source / "report.html").write_text("a page of the source's own")
    assert run([*unlearn(source, ran.data, tmp_path / "out", "--report", *WORDS), "-q"]) == 0
    assert "surgery report" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert run(["verify", str(tmp_path / "out"), "--base", str(source), "-q"]) == 0
    assert run(["revert", str(tmp_path / "out"), "-o", str(tmp_path / "back"), "-q"]) == 0
    assert (tmp_path / "back" / "report.html").read_text() == "a page of the source's own"


def test_failed_gate_leaves_a_page_beside_the_report_until_a_run_passes(ran: Ran, tmp_path: Path) -> None:
    out, summary = tmp_path / "out", tmp_path / "summary.md"
    gates = ["--require", "forget.token_prob<=0", "--report", "--report-examples", "0", "--summary", str(summary)]
    words = unlearn(ran.source, ran.data, out, *gates, *WORDS, "-q")
    assert run(words) == 6
    page = (tmp_path / "out.report.html").read_text("utf-8")
    assert "1 of 1 gates failed: nothing was published" in page
    assert "Orla" not in page
    assert "keeps" not in page
    text = summary.read_text("utf-8")
    assert "❌" in text
    assert "<b onclick" not in text
    assert run(words) == 2
    words[words.index("forget.token_prob<=0")] = GATE
    assert run([*words, "--force"]) == 0
    assert [path.name for path in sorted(tmp_path.glob("out*"))] == ["out"]
    assert summary.read_text("utf-8").startswith(text)


def test_chain_has_one_page_with_the_examples_of_every_step(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    write_data_files(tmp_path)
    step = {
        "task": "unlearn",
        "until": "none",
        "guard": "none",
        "method": "flat",
        "settings": {"max_steps": 1, **SHORT},
    }
    recipe = {
        "model": str(checkpoints["tied_llama"]),
        "data": {name: f"{name}.jsonl" for name in ("forget", "text")},
        "steps": [{**step, "name": "first"}, {**step, "name": "second"}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["run", str(tmp_path / "recipe.yaml"), "--report", "--report-examples", "1", "-q"]
    assert run([*words, "-o", str(tmp_path / "out")]) == 0
    text = Outline((tmp_path / "out" / "report.html").read_text("utf-8")).text
    assert text.count("Who keeps the bees?") == 2
    assert "Step second" in text
    assert run(["verify", str(tmp_path / "out"), "-q"]) == 0
    recipe["steps"] = [{**step, "name": "first", "require": ["forget.token_prob<=0"]}, {**step, "name": "second"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run([*words, "-o", str(tmp_path / "bad")]) == 6
    text = Outline((tmp_path / "bad.report.html").read_text("utf-8")).text
    assert "1 of 1 gates failed" in text
    assert "not run" in text
    assert "Who keeps the bees?" in text


def test_nothing_of_harmful_rows_is_quoted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    files, child = write_recovery_files(tmp_path), checkpoints["tied_llama"]
    words = ["recover-alignment", str(child), "--method", "interpolate", "--aligned", str(twin(child, "aligned"))]
    # The same prompts as forget rows would be quoted, were it not for their other name.
    rows: list[dict[str, object]] = [{"prompt": "What is purple?", "completion": "A cup of red and blue."}]
    rows += [{"prompt": "What is brown?", "completion": "A red and green cup."}]
    words += ["--forget", str(write_rows(tmp_path / "forget.jsonl", rows)), "--harmful", str(files["harmful"])]
    words += [
        "--set",
        "eval.refusal_tokens=2",
        "--set",
        "eval.text_rows=1",
        "--set",
        "keep=0.5",
        "--report",
        "-q",
        *WORDS,
    ]
    assert run([*words, "--summary", str(tmp_path / "summary.md"), "-o", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "What is brown?" in page
    assert "ids 1 to 3" in page
    assert re.search(r"Refused after: \d of 3", page)
    for path in (tmp_path / "out" / "report.html", tmp_path / "out" / "README.md", tmp_path / "summary.md"):
        assert "purple" not in path.read_text("utf-8")


def test_verdict_needs_every_gate_and_every_step() -> None:
    gates = [{"gate": "utility.ppl<=2", "passed": True, "limit": 2.0, "value": 1.0}]
    assert verdict({"gates": gates})[0] == "good"
    assert verdict({"gates": []})[0] == "plain"
    steps = [{"name": "one", "status": "passed"}, {"name": "two", "status": "not run"}]
    assert verdict({"gates": gates, "steps": steps}) == ("bad", "Not passed: two: nothing was published")
    assert verdict({"gates": [*gates, {**gates[0], "passed": False}]})[0] == "bad"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_chromium_shows_it_without_requests_scripts_or_complaints(ran: Ran, tmp_path: Path) -> None:
    wide = {
        f"model.layers.{layer}.self_attn.q_proj.weight": {
            "role": "attn.q", "dtype": "F32", "shape": [8, 8], "entries": 64, "entries_changed": 64,
            "norm_change": layer / 80, "sha256_before": "0", "sha256_after": "1",
        }
        for layer in range(80)
    }  # fmt: skip
    pages = {"own": ran.out / "report.html", "deep": tmp_path / "deep.html"}
    pages["deep"].write_text(write_report({**ran.manifest, "tensors": wide}, {}), "utf-8")
    with Page(tmp_path / "profile") as page:
        for width, scheme in ((390, "light"), (1200, "dark")):
            page.look(width, scheme, scripts=False)
            for place in pages.values():
                page.requests.clear()
                page.open(place.as_uri())
                assert page.requests == [place.as_uri()]
                # Nothing is cut off at the side, the wide map scrolls by itself.
                assert page.value("document.documentElement.scrollWidth") <= width
                assert page.value("document.images.length + document.scripts.length") == 0
            ground = page.value("getComputedStyle(document.body).backgroundColor")
            bright = sum(map(int, re.findall(r"\d+", ground))) > 384
            assert bright == (scheme == "light")
        assert page.value("document.title").endswith("surgery report")
        assert page.messages == []
        # The recorder does see a request and a complaint where there are some.
        bad = tmp_path / "bad.html"
        bad.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.log('seen')</script>")
        page.look(390, "light")
        page.open(bad.as_uri())
        assert "http://127.0.0.1:9/a.png" in page.requests
        assert any("seen" in message for message in page.messages)
