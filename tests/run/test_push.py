"""`--push` against a stub of the hub on the loopback address: what is sent, what is not, and what is refused before."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmsurgery.cli.app import run
from llmsurgery.run.push import without_secrets

TOKEN = "hf_secretsecretsecret"
PUSH = """
import sys
from pathlib import Path
from llmsurgery.compute.progress import Silent
from llmsurgery.errors import SurgeryError
from llmsurgery.run.push import check_push, push_result
try:
    check_push(sys.argv[2])
    print(push_result(Path(sys.argv[1]), sys.argv[2], Silent()))
except SurgeryError as error:
    print(error.what, error.why, error.fix)
    sys.exit(error.exit_code)
"""


class Hub(ThreadingHTTPServer):
    """Answers as far as a small upload goes; remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, Any]] = []
        self.status = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in text.splitlines()]
        self.server.asked.append((self.path, lines))
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        answer: dict[str, Any] = {"url": f"{self.server.address}/somebody/result"}
        if self.path.endswith("preupload/main"):
            answer = {"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]]}
        elif self.path.endswith("commit/main"):
            answer = {
                "commitUrl": f"{self.server.address}/somebody/result/commit/1",
                "commitOid": "1",
                "hookOutput": "",
            }
        content = json.dumps(answer if self.server.status == 200 else {"error": f"no, {TOKEN}"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, None))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    place = tmp_path / "out"
    (place / ".llmsurgery").mkdir(parents=True)
    for name in ("README.md", "surgery.json", "report.html", "model.safetensors", ".llmsurgery/undo.bin"):
        (place / name).write_text(f"content of {name}")
    return place


def push(hub: Hub, out: Path, repository: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    given = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out.parent)}
    words = [sys.executable, "-c", PUSH, str(out), repository]
    return subprocess.run(words, env={**kept, **given, **environment}, capture_output=True, text=True, timeout=120)


def test_everything_but_undo_data_and_report_is_sent_to_a_private_repository(hub: Hub, out: Path) -> None:
    done = push(hub, out, "somebody/result")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/somebody/result/commit/1"
    asked = {path: lines for path, lines in hub.asked if lines is not None}
    made = asked["/api/repos/create"][0]
    assert made.get("visibility") == "private" or made.get("private") is True
    commit = next(lines for path, lines in asked.items() if path.endswith("commit/main"))
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]).decode() for line in commit[1:]}
    assert sent == {name: f"content of {name}" for name in ("README.md", "surgery.json", "model.safetensors")}


def test_a_failure_leaves_the_result_and_tells_no_token(hub: Hub, out: Path) -> None:
    hub.status = 403
    done = push(hub, out, "somebody/result")
    assert done.returncode == 7
    assert "the upload to somebody/result failed" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert (out / ".llmsurgery" / "undo.bin").is_file()
    assert without_secrets(f"http://me:word@host/x {TOKEN}") == "http://***@host/x ***"


def test_what_cannot_work_is_refused_before_any_work(
    checkpoints: dict[str, Path], data_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["unlearn", str(checkpoints["tied_llama"]), "--method", "flat", "--forget", str(data_files["forget"])]
    words += ["-o", str(tmp_path / "out")]
    # The tests run without a network.
    assert run([*words, "--push", "somebody/result"]) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert run([*words, "--push", f"https://me:{TOKEN}@example.org/result"]) == 2
    assert TOKEN not in capsys.readouterr().err
    assert run(["run", "unlearn-demo", "--push", "a/b/c", "-o", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out*"))
