"""Records of Parquet files and of `datasets`, each behind an extra."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmsurgery.errors import InputError, UnsupportedError

Records = Iterator[tuple[str, object]]
"""Origin of a record for messages, and the record."""


def _missing(what: str, package: str, extra: str) -> UnsupportedError:
    return UnsupportedError(
        f"{what} cannot be read",
        f"the package {package} is not installed",
        f"install the extra: pip install 'llmsurgery-toolkit[{extra}]'; or convert the data to JSON Lines",
    )


def _known(record: dict[str, object]) -> dict[str, object]:
    """Leave out empty cells: a table has every column in every row."""
    return {key: value for key, value in record.items() if value is not None}


def read_parquet(path: Path) -> Records:
    """Yield the records of a Parquet file.

    Raises:
        UnsupportedError: The extra `parquet` is not installed.
        InputError: Not a Parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(f"Parquet file {path}", "pyarrow", "parquet") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", _known(record)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a Parquet file", reason, "check the file") from error


def is_dataset(path: Path) -> bool:
    """Whether a path that is no file can name a data set: a directory, `DIRECTORY:SPLIT` or `NAME:SPLIT`."""
    return path.is_dir() or (not path.exists() and ":" in path.name)


def read_dataset(path: Path) -> Records:
    """Yield the records of a data set of the package `datasets`.

    Args:
        path: A directory, `DIRECTORY:SPLIT`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`. Names are looked up in the cache,
            and on the hub where the network is allowed (`HF_HUB_OFFLINE`).

    Raises:
        UnsupportedError: The extra `datasets` is not installed.
        InputError: There is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise _missing(f"data set {path}", "datasets", "datasets") from error
    name, config, split = _parts(path)
    try:
        saved = any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
        # A named split alone is prepared; a saved folder is mapped and costs nothing.
        loaded: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"data set {path} cannot be loaded", reason, "check the name; NAME:CONFIG:SPLIT") from error
    if isinstance(loaded, dict):
        if split is None and len(loaded) == 1:
            (split,) = loaded
        if split not in loaded:
            raise InputError(
                f"data set {path} has no split {split!r}" if split else f"data set {path} has several splits",
                f"its splits are {', '.join(map(str, loaded))}",
                f"write {name}:SPLIT",
            )
        loaded = loaded[split]
    for number, record in enumerate(loaded, start=1):
        yield f"{path}: row {number}", _known(record)


def _parts(path: Path) -> tuple[str, str | None, str | None]:
    """Split NAME:CONFIG:SPLIT; a directory of the whole name comes first."""
    text = str(path)
    if path.is_dir():
        return text, None, None
    name, _, split = text.rpartition(":")
    if Path(name).is_dir():
        return name, None, split
    base, colon, config = name.partition(":")
    return (base, config, split) if colon else (name, None, split)
