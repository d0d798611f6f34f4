"""`--push`: upload a finished result to a hub repository. The one place that sends anything over a network."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import cast

from llmsurgery.compute.progress import Progress
from llmsurgery.errors import ResourceError, UnsupportedError, UsageError
from llmsurgery.run.pages import REPORT

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_LEFT_OUT = [".llmsurgery/*", REPORT]
"""Undo data bring back what was forgotten, and a report quotes it."""


def check_push(repository: str) -> None:
    """Refuse an upload that could not work, before any other work.

    Args:
        repository: `NAME` or `OWNER/NAME`.

    Raises:
        UsageError: No name of a repository, no network allowed, or no token.
        UnsupportedError: huggingface_hub is not installed.
    """
    if not _REPOSITORY.match(repository):
        # It is not repeated: an address may hold a token.
        raise UsageError("--push takes no such repository", "it is not NAME or OWNER/NAME", "--push OWNER/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UnsupportedError(
            "--push needs huggingface_hub", "it is not installed", "pip install 'llmsurgery-toolkit[hub]'"
        )
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            "--push needs the network", "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", "unset it, or drop --push"
        )
    if get_token() is None:
        raise UsageError("--push needs a token", "none is set or stored", "set HF_TOKEN, or run `hf auth login`")


def push_result(out: Path, repository: str, progress: Progress) -> str:
    """Upload a result to a repository, which is made, private, if it does not exist.

    Undo data and the report stay here.

    Args:
        out: The directory of a finished result.
        repository: `NAME` or `OWNER/NAME`.
        progress: Told where it went.

    Returns:
        The address of the upload.

    Raises:
        ResourceError: The upload failed; the result is complete and stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(library_name="llmsurgery")
    # Errors of the connection are those of the HTTP library below, of which there has been more than one; ValueError
    # and RuntimeError are answers that make no sense.
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError))
    try:
        target = hub.create_repo(repository, private=True, exist_ok=True)
        upload = hub.upload_folder(
            repo_id=target.repo_id,
            folder_path=out,
            commit_message="Result of llmsurgery",
            ignore_patterns=_LEFT_OUT,
        )
    except failures as error:
        raise ResourceError(
            f"the upload to {repository} failed",
            without_secrets(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__),
            f"the result is complete in {out}; `hf upload {repository} {out} --exclude '.llmsurgery/*'` sends it again",
        ) from None
    address = without_secrets(str(upload.commit_url))
    progress.notice(f"uploaded to {address}, without undo data and report")
    return address


def without_secrets(text: str) -> str:
    """Return a text without the tokens of this process and without names and passwords in addresses."""
    from huggingface_hub import get_token

    known = {get_token(), *(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))}
    for secret in filter(None, known):
        text = text.replace(secret, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "***", re.sub(r"://[^/@\s]+@", "://***@", text))
