"""`verify`: hashes, finite weights, stock loadability, and on request everything that must equal the base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from llmsurgery.arch.bundle import plain_config, require_trust
from llmsurgery.arch.detect import find_family
from llmsurgery.checkpoint import Checkpoint, file_digest, require_finite, tensor_digest
from llmsurgery.checkpoint.paths import inside_name
from llmsurgery.checkpoint.strict_json import read_object
from llmsurgery.compute.progress import Progress
from llmsurgery.compute.source import resolve_source
from llmsurgery.edits.patch import read_patch
from llmsurgery.edits.undo import NAME as UNDO
from llmsurgery.edits.undo import check_fit, read_undo
from llmsurgery.errors import DamagedError, InputError, UnsupportedError
from llmsurgery.run.forms import PATCH
from llmsurgery.run.manifest import NAME

_FIX = "restore it from a copy, or run the operation again"


def verify_result(
    path: str, base: str | None, trust_remote_code: bool, progress: Progress
) -> dict[str, object]:  # fmt: skip
    """Check a result; see `llmsurgery.api.verify`."""
    root = resolve_source(path)
    manifest = read_object(root / NAME, "manifest") if (root / NAME).is_file() else None
    if base is not None and manifest is None:
        raise InputError(
            f"{str(root)!r} has no {NAME}", "without it nobody knows what may differ from the base", "drop --base"
        )
    checks: list[dict[str, object]] = []
    if manifest is not None:
        checks.append(_check_files(root, manifest))
    if manifest is not None and (manifest.get("save", "full") != "full" or manifest.get("export") == "processor"):
        if (root / PATCH).is_file():
            patch = read_patch(root / PATCH)
            checks.append(_passed("patch", f"{len(patch.tensors)} tensors, every byte sealed"))
        return {"path": path, "save": manifest["save"], "checks": checks}
    checkpoint = Checkpoint.open(root)
    expected = _expected(manifest)
    checks += _check_tensors(checkpoint, expected, progress)
    checks.append(_check_loads(checkpoint, trust_remote_code))
    if (root / UNDO).is_file():
        undo = read_undo(root)
        check_fit(undo, checkpoint)
        checks.append(_passed("undo data", f"index of {len(undo.tensors)} tensors fits"))
    if base is not None and manifest is not None:
        checks.append(_check_base(checkpoint, Checkpoint.open(resolve_source(base)), manifest, progress))
    return {"path": path, "save": "full", "checks": checks}


def _passed(name: str, detail: str) -> dict[str, object]:
    return {"check": name, "passed": True, "detail": detail}


def _expected(manifest: dict[str, Any] | None) -> dict[str, str | None]:
    """Return the digest of every edited tensor, None for one that is gone."""
    if manifest is None:
        return {}
    try:
        return {name: record["sha256_after"] for name, record in manifest["tensors"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{NAME} is damaged", f"its record of tensors is incomplete: {error!r}", _FIX) from error


def _check_files(root: Path, manifest: dict[str, Any]) -> dict[str, object]:
    files = manifest.get("files", {})
    if not isinstance(files, dict):
        raise DamagedError(f"{NAME} is damaged", "its record of files is no object", _FIX)
    for name, digest in files.items():
        path = root / inside_name(name, NAME)
        if not path.is_file():
            raise DamagedError(f"{str(path)!r} is missing", f"{NAME} names it", _FIX)
        if file_digest(path) != digest:
            raise DamagedError(f"{str(path)!r} was changed", f"its SHA-256 is not the one in {NAME}", _FIX)
    return _passed("side files", f"{len(files)} files have the SHA-256 of {NAME}")


def _check_tensors(
    checkpoint: Checkpoint, expected: dict[str, str | None], progress: Progress
) -> list[dict[str, object]]:  # fmt: skip
    for name, after in expected.items():
        if after is not None:
            checkpoint.info(name)
        elif name in checkpoint.tensors:
            raise DamagedError(
                f"tensor {name!r} in {str(checkpoint.root)!r} is back", f"{NAME} says that it was dropped", _FIX
            )
    with progress.task("reading tensors", len(checkpoint.tensors)) as tick:
        for name, info in checkpoint.tensors.items():
            digest = hashlib.sha256() if name in expected else None
            for start, stop in checkpoint.row_blocks(name):
                raw = checkpoint.read(name, start, stop)
                require_finite(raw, info.dtype, name, start)
                if digest is not None:
                    digest.update(raw.reshape(-1).view(np.uint8).data)
            if digest is not None and digest.hexdigest() != expected[name]:
                raise DamagedError(
                    f"tensor {name!r} in {str(info.path)!r} was changed",
                    f"its SHA-256 is not the one in {NAME}",
                    _FIX,
                )
            tick()
    checks = [_passed("finite", f"{len(checkpoint.tensors)} tensors hold neither NaN nor Inf")]
    if expected:
        checks.insert(0, _passed("tensors", f"{_stored(expected)} edited tensors have the SHA-256 of {NAME}"))
    return checks


def _stored(expected: dict[str, str | None]) -> int:
    return sum(after is not None for after in expected.values())


def _check_loads(checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, object]:
    import transformers

    from llmsurgery.compute.load import check_loadable

    require_trust(checkpoint.config, checkpoint.root, trust_remote_code)
    try:
        buffers = find_family(plain_config(checkpoint.config)).buffers
    except UnsupportedError:
        buffers = ()
    name = check_loadable(checkpoint.root, trust_remote_code, buffers)
    return _passed("loads", f"transformers {transformers.__version__} takes every stored tensor ({name})")


def _check_base(
    checkpoint: Checkpoint, base: Checkpoint, manifest: dict[str, Any], progress: Progress
) -> dict[str, object]:  # fmt: skip
    records = manifest["tensors"]
    expected = {
        *(name for name in base.tensors if name not in records),
        *(name for name, record in records.items() if record["sha256_after"] is not None),
    }
    if checkpoint.tensors.keys() != expected:
        odd = sorted(checkpoint.tensors.keys() ^ expected)
        raise _unlike(checkpoint, base, f"{len(odd)} tensors are in one of them only, first {odd[0]!r}")
    if foreign := sorted(
        name for name, record in records.items() if (record["sha256_before"] is None) == (name in base.tensors)
    ):
        raise _unlike(checkpoint, base, f"tensor {foreign[0]!r} is not in the base, or was not when it was edited")
    with progress.task("comparing with the base", len(base.tensors)) as tick:
        for name, info in base.tensors.items():
            digest = tensor_digest(info.path, info.start, info.end)
            if name in records:
                same = digest == records[name]["sha256_before"]
            else:
                own = checkpoint.info(name)
                if (own.dtype, own.shape) != (info.dtype, info.shape):
                    raise _unlike(checkpoint, base, f"tensor {name!r} has another dtype or shape")
                same = digest == tensor_digest(own.path, own.start, own.end)
            if not same:
                what = "the base differs from the one that was edited" if name in records else "nothing edited it"
                raise _unlike(checkpoint, base, f"tensor {name!r} differs, and {what}")
            tick()
    if file_digest(base.root / "config.json") != manifest["source"]["config_sha256"]:
        raise _unlike(checkpoint, base, "config.json of the base is not the one in the manifest")
    rest = sum(name not in records for name in base.tensors)
    return _passed("base", f"{len(records)} edited tensors started from it, {rest} others are equal to it")


def _unlike(checkpoint: Checkpoint, base: Checkpoint, why: str) -> DamagedError:
    return DamagedError(f"{str(checkpoint.root)!r} does not follow from {str(base.root)!r}", why, "check both paths")
