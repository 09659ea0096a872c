"""The files of a source, and their rows."""

import codecs
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
from rlhf_ray.data.import_columns import BrokenRow, short
from rlhf_ray.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
"""Files of a dataset's folder that describe it."""
_SHARD = re.compile(r"[-_.]\d+-of-\d+(-[0-9a-f]+)?$|[-_.](part|shard|chunk)?[-_.]?\d+$")
_ONLY_SHARD = re.compile(r"(data|part|shard|chunk|file)?[-_.]?\d+(-of-\d+|[-_.][-0-9a-z.]*)?$")
_PLAIN_FOLDERS = ("data", "default")


def source_files(sources: Sequence[Path], split: str | None = None) -> list[Path]:
    """The files to read: those named, and those of directories in order of their paths.

    Raises:
        UserError: a source is missing or not of a known type, a directory has no such files, or directories have
            several splits and none or another is asked for.
    """
    folders = {source: _splits(source) for source in sources if source.is_dir()}
    if split is not None and not folders:
        raise UserError(f"--split {split}: chooses among the files of a directory, and no source is one; leave it out")
    if split is None and len({name for splits in folders.values() for name in splits}) > 1:
        found = ", ".join(sorted({name for splits in folders.values() for name in splits}))
        raise UserError(
            f"SOURCE={' '.join(map(str, folders))}: has the splits {found}, which must not be mixed; "
            "choose one with --split, or name the files"
        )
    files: list[Path] = []
    for source in sources:
        if source in folders:
            splits = folders[source]
            if split is not None and split not in splits:
                raise UserError(f"--split {split}: {source} has no such split; {similar(split, sorted(splits))}")
            files += next(iter(splits.values())) if split is None else splits[split]
        elif not source.is_file():
            raise UserError(f"SOURCE={source}: no such file or directory; give the path of {', '.join(SUFFIXES)}")
        elif not _is_known(source):
            how = (
                ", for example with pandas: read_csv(...).to_parquet(...)" if source.suffix in (".csv", ".tsv") else ""
            )
            raise UserError(f"SOURCE={source}: must end in {', '.join(SUFFIXES)}; convert it to one of these{how}")
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
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
        yield from _json_rows(path, content)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: cannot be read ({reason}); is it whole? Fetch or write it again") from error


def _json_rows(path: Path, content: bytes) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRow]]:
    """The objects of JSON lines, or of one JSON array, in UTF-8 or in UTF-16 or 32 as Windows writes them."""
    if not (found := json.detect_encoding(content[:4])).startswith("utf-8"):
        try:
            content = content.decode(found).encode()
        except UnicodeError as error:
            raise UserError(f"{path}: cannot be read as {found} ({error}); save it as UTF-8") from error
    content = content.removeprefix(codecs.BOM_UTF8)
    for number, row in enumerate(whole := _whole_json(path, content) or ()):
        yield f"{path} row {number}", _object(row)
    if whole:
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield f"{path} line {number}", _parse(line)


def _whole_json(path: Path, content: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON value; None where it is one of lines.

    Raises:
        UserError: it is neither, or an object around the rows.
    """
    if not (path.name.endswith((".json", ".json.gz")) or content.lstrip().startswith(b"[")):
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not isinstance(_parse(content.lstrip().splitlines()[0]), BrokenRow):
            return None
        raise UserError(f"{path}: is not JSON in UTF-8 ({error}); write it again as one array of objects") from error
    around = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
    if around and not {"messages", "conversations", "chosen", "prompt"} & set(value):
        raise UserError(f"{path}: is one object; write what its {short(around[0])} holds as an array of objects")
    return value if isinstance(value, list) else [value]


def _parse(line: bytes) -> Mapping[str, Any] | BrokenRow:
    try:
        return _object(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        found = f"byte {line[error.start]:#x} at {error.start}"
        return BrokenRow("not UTF-8", f"{found}; save the file as UTF-8, for example with iconv -f latin1 -t utf-8")
    except (ValueError, RecursionError) as error:
        return BrokenRow("not JSON", f"{error}; a line must be one JSON object")


def _object(row: Any) -> Mapping[str, Any] | BrokenRow:
    return row if isinstance(row, dict) else BrokenRow("not JSON", f"{short(row)} must be a JSON object")


def _is_known(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.name not in _NOT_DATA


def _splits(directory: Path) -> dict[str, list[Path]]:
    """The files in a directory and below, by split.

    Raises:
        UserError: there are none.
    """
    splits: dict[str, list[Path]] = {}
    for path in sorted(directory.rglob("*")):
        inner = path.relative_to(directory)
        if _is_known(path) and path.is_file() and not any(part.startswith(".") for part in inner.parts):
            splits.setdefault(split_name(inner), []).append(path)
    if not splits:
        raise UserError(f"SOURCE={directory}: has no {', '.join(SUFFIXES)} file; name the files")
    return splits


def split_name(path: Path) -> str:
    """The split that a path tells: its folders and its name, less the number of a shard, or "all".

    data/train-00000-of-00002.parquet and train/0000.parquet are both of train, helpful-base/train.jsonl.gz is of
    helpful-base/train; names that differ otherwise are of different splits.
    """
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    stem = [] if _ONLY_SHARD.match(name) else [_SHARD.sub("", name)]
    return "/".join([*(part for part in path.parts[:-1] if part not in _PLAIN_FOLDERS), *stem]) or "all"
