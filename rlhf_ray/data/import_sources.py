"""The files of a source, and their rows."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_ray.config_errors import similar
from rlhf_ray.data.import_formats import BrokenRow, short
from rlhf_ray.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_SHARD = re.compile(r"-\d+-of-\d+$")


def source_files(sources: Sequence[Path], split: str | None = None) -> list[Path]:
    """The files to read: those named, and those of directories in order of their names.

    Raises:
        UserError: a source is missing or not of a known type, a directory has no such files, or several
            splits and none or another is asked for.
    """
    if split is not None and not any(source.is_dir() for source in sources):
        raise UserError(f"--split {split}: chooses among the files of a directory, and no source is one; leave it out")
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files += _directory_files(source, split)
        elif not source.is_file():
            raise UserError(f"SOURCE={source}: no such file or directory; give the path of {', '.join(SUFFIXES)}")
        elif not source.name.endswith(SUFFIXES):
            raise UserError(f"SOURCE={source}: must end in {', '.join(SUFFIXES)}; convert it to one of these")
        else:
            files.append(source)
    return files


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRow]]:
    """(file and line, row) of a file; lines are counted from 1, rows of Parquet from 0, blank lines are no rows.

    Raises:
        UserError: the file cannot be read to its end.
    """
    try:
        if path.suffix == ".parquet":
            number = 0
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        yield f"{path} row {number}", row
                        number += 1
            return
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path} line {number}", _parse(line)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: cannot be read ({reason}); is it whole? Fetch or write it again") from error


def _parse(line: bytes) -> Mapping[str, Any] | BrokenRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow("not JSON", f"{error}; a line must be one JSON object")
    if not isinstance(row, dict):
        return BrokenRow("not JSON", f"{short(row)} must be a JSON object")
    return row


def _directory_files(directory: Path, split: str | None) -> list[Path]:
    splits: dict[str, list[Path]] = {}
    for folder in (directory, directory / "data"):
        for path in sorted(folder.glob("*")):
            if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."):
                splits.setdefault(_split_name(path.name), []).append(path)
    if not splits:
        raise UserError(f"SOURCE={directory}: has no {', '.join(SUFFIXES)} file, nor has its data/; name the files")
    if split is None and len(splits) > 1:
        found = ", ".join(sorted(splits))
        raise UserError(
            f"SOURCE={directory}: has the splits {found}, which must not be mixed; "
            "choose one with --split, or name the files"
        )
    if split is not None and split not in splits:
        raise UserError(f"--split {split}: {directory} has no such split; {similar(split, sorted(splits))}")
    return next(iter(splits.values())) if split is None else splits[split]


def _split_name(name: str) -> str:
    """The split a file's name tells: the part before -00000-of-00001, or a word such as train; else "all"."""
    stem = name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
    if _SHARD.search(stem):
        return _SHARD.sub("", stem)
    return next((word for word in re.split(r"[^a-z]+", stem.lower()) if word in _SPLIT_WORDS), "all")
