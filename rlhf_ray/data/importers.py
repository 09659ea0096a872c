"""`rlhf-ray data import`: other people's files as the recipe's tables."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_ray.data.import_columns import BrokenRow, Columns, short
from rlhf_ray.data.import_formats import Dialogue, Format, Guideline, ImportKind, TooLong, read_dialogue
from rlhf_ray.data.import_lengths import fit, length_limits
from rlhf_ray.data.import_sources import read_rows, source_files, split_name
from rlhf_ray.data.schemas import COMPARISONS, SCHEMAS, row_problems, write_table
from rlhf_ray.data.shares import hash_share
from rlhf_ray.errors import SHOWN_PROBLEMS, UserError

DUPLICATE, LONG = "duplicate", "too long"
"""Reasons to leave out a row that is not broken."""

# What stands in a comparisons table where the source has no such column; the source's own values go first.
_DEFAULTS: dict[str, Any] = {
    "chosen_finished": True,
    "rejected_finished": True,
    "chosen_model": "unknown",
    "rejected_model": "unknown",
    "chosen_temperature": None,
    "rejected_temperature": None,
    "strength": None,
    "safety_bin": None,
    "annotator": "human",
    "batch": 0,
    "time": "",
}


@dataclass
class Counts:
    """What became of the rows read."""

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows by reason."""
    shortened: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    """Columns that say something which the table does not, and in how many of its rows."""

    def reasons(self) -> str:
        """The reasons in one line, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())


def import_table(
    sources: Sequence[Path],
    target: Path,
    *,
    kind: ImportKind,
    form: Format = "auto",
    guideline: Guideline | None = None,
    max_chars: int | None = None,
    max_tokens: int | None = None,
    tokenizer: Path | None = None,
    too_long: TooLong = "skip",
    held_out: float = 0.0,
    split: str | None = None,
    overwrite: bool = False,
) -> Counts:
    """Turns files into one table of the recipe; tells broken rows on stderr and the counts on stdout.

    Args:
        sources: files (.jsonl, .json, either as .gz, .parquet), or directories that hold such files, at any depth.
        target: the Parquet file to write.
        kind: of the table.
        form: of the rows, see `import_formats`.
        guideline: overrides the source's guideline and is_safety; helpfulness where neither says anything.
        max_chars: most characters of a dialogue with its longest answer.
        max_tokens: most tokens of it, rendered, the answer's EOS included.
        tokenizer: directory of the one by which they are counted.
        too_long: of longer rows, "skip" leaves them out, "drop-turns" cuts the oldest pairs of turns until
            they fit, and leaves out those whose last user message and answer do not fit by themselves.
        held_out: share that goes to TARGET.held_out.parquet, by a hash of the first user message in the source:
            dialogues that begin alike stand on one side, shortened or not.
        split: of a directory with several splits, the one to read.
        overwrite: replace an existing target.
    Returns:
        The counts; rows written are those read less those left out.
    Raises:
        UserError: an option that fits neither kind nor sources, a source that is missing or unreadable, a
            target that exists or cannot be written, or a file that would have no rows.
    """
    if guideline is not None and kind == "demonstrations":
        raise UserError(f"--guideline {guideline}: demonstrations have no guideline; leave it out")
    if not 0 <= held_out < 1:
        raise UserError(f"--held-out {held_out:g}: must be at least 0 and less than 1; choose a share such as 0.05")
    limits = length_limits(max_chars, max_tokens, tokenizer)
    files = source_files(sources, split)
    rest = _check_targets(target, files, held_out=held_out > 0, overwrite=overwrite)

    counts, seen = Counts(), set[str]()
    rows: list[Mapping[str, Any]] = []
    openings: list[str] = []
    for place, found in (item for path in files for item in read_rows(path)):
        counts.read += 1
        try:
            if isinstance(found, BrokenRow):
                raise found
            source = Columns(found, lists=form in ("auto", "messages"))
            dialogue = read_dialogue(kind, source, form)
            fitting = fit(dialogue, limits, drop_turns=too_long == "drop-turns")
            if fitting is None:
                counts.left_out[LONG] += 1
                continue
            row = _table_row(kind, fitting, source, guideline)
        except BrokenRow as broken:
            counts.left_out[broken.reason] += 1
            _tell(f"{place}: {broken}", counts)
            continue
        if (identifier := _hash(fitting.context, *fitting.answers)) in seen:
            counts.left_out[DUPLICATE] += 1
            continue
        seen.add(identifier)
        counts.shortened += fitting is not dialogue
        counts.unused.update(source.unused())
        rows.append(row)
        # Before any cut, or parts of one dialogue could stand on both sides.
        openings.append(next(m["content"] for m in dialogue.context if m["role"] == "user"))
    _tell_rest(counts)
    parts = {target: rows}
    if held_out > 0:
        parts = dict(zip((target, rest), _split(rows, openings, held_out), strict=True))
    _check_parts(parts, counts, held_out)
    _write(parts, SCHEMAS[kind])
    _summarise(kind, parts, counts, files)
    return counts


def _check_targets(target: Path, files: Sequence[Path], *, held_out: bool, overwrite: bool) -> Path:
    """Refuses targets that must not be written; returns the path of the held-out part."""
    if target.suffix != ".parquet":
        raise UserError(f"--to {target}: must end in .parquet; rename it")
    rest = target.with_suffix(".held_out.parquet")
    for path in (target, rest):
        if path.resolve() in {file.resolve() for file in files}:
            raise UserError(f"--to {target}: {path} is one of the sources and must not be; choose another target")
    if rest.exists() and not held_out:
        raise UserError(
            f"--to {target}: {rest} is there, and beside a table with all rows its rows would no longer be held out; "
            "remove it, or give --held-out"
        )
    for path in (target, rest):
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"--to {target}: {path} exists; choose another target, or replace it with --overwrite")
    return rest


def _table_row(
    kind: ImportKind, dialogue: Dialogue, source: Mapping[str, Any], guideline: Guideline | None
) -> dict[str, Any]:
    """A row of the kind's table: the dialogue, and the source's own columns where the table has the same.

    Raises:
        BrokenRow: such a column has a value that the table must not hold.
    """
    messages = dialogue.context
    if kind == "demonstrations":
        return {"messages": [*messages, {"role": "assistant", "content": dialogue.answers[0]}], "kind": ""}
    row = {"prompt_id": f"p{_hash(messages)}", "messages": messages, **_guideline(source, guideline)}
    if kind == "prompts":
        del row["guideline"]
        return {**row, "kind": "", "truth": ""}
    chosen, rejected = dialogue.answers
    row |= {"comparison_id": f"c{_hash(messages, chosen, rejected)}", "chosen": chosen, "rejected": rejected}
    row |= {name: _column(source, name, default) for name, default in _DEFAULTS.items()}
    for problem in row_problems(kind, row):
        raise BrokenRow("wrong value", problem)
    return row


def _guideline(source: Mapping[str, Any], guideline: Guideline | None) -> dict[str, Any]:
    if guideline is not None:
        return {"guideline": guideline, "is_safety": guideline == "safety"}
    is_safety = _column(source, "is_safety", None)
    found = _column(source, "guideline", "safety" if is_safety else "helpfulness")
    return {"guideline": found, "is_safety": found == "safety" if is_safety is None else is_safety}


def _column(source: Mapping[str, Any], name: str, default: Any) -> Any:
    value = source.get(name)
    if value is None:
        return default
    kind = COMPARISONS.field(name).type
    try:
        # bool passes for int in Python, and Arrow turns numbers into text or bool nowhere.
        if isinstance(value, bool) and not pa.types.is_boolean(kind):
            raise TypeError
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise BrokenRow(
            "wrong value", f"{name}={short(value)} must be of type {kind}; convert, rename or drop the column"
        ) from error


def _split(rows: Sequence[Any], openings: Sequence[str], share: float) -> tuple[list[Any], list[Any]]:
    # What is hashed to hold rows out when training is never this text by itself, so that the shares held out
    # there are drawn anew from what stays here.
    sides = [hash_share(opening) < share for opening in openings]
    kept = [row for row, held in zip(rows, sides, strict=True) if not held]
    return kept, [row for row, held in zip(rows, sides, strict=True) if held]


def _check_parts(parts: Mapping[Path, Sequence[Any]], counts: Counts, held_out: float) -> None:
    sizes = [len(rows) for rows in parts.values()]
    if sum(sizes) == 0:
        why = f": left out {counts.reasons()}" if counts.read else ""
        raise UserError(f"{next(iter(parts))}: 0 of {counts.read} rows can be written{why}; nothing is written")
    if min(sizes) == 0:
        raise UserError(
            f"--held-out {held_out:g}: leaves {sizes[0]} rows and holds out {sizes[1]}, and both must have some; "
            "give more rows or another share"
        )


def _write(parts: Mapping[Path, Sequence[Mapping[str, Any]]], schema: pa.Schema) -> None:
    """All parts or none: they are renamed once all are on disk."""
    staged = {path: path.with_name(f".{path.name}.{os.getpid()}.import") for path in parts}
    try:
        with ExitStack() as stack:
            for path, rows in parts.items():
                stack.callback(staged[path].unlink, missing_ok=True)
                write_table(staged[path], rows, schema)
            for path, temporary in staged.items():
                temporary.replace(path)
    except OSError as error:
        raise UserError(f"--to {next(iter(parts))}: cannot be written ({error}); choose another place") from error


def _tell(line: str, counts: Counts) -> None:
    if _num_broken(counts) <= SHOWN_PROBLEMS:
        print(line, file=sys.stderr)


def _tell_rest(counts: Counts) -> None:
    if (more := _num_broken(counts) - SHOWN_PROBLEMS) > 0:
        print(f"{more} more broken rows, not shown", file=sys.stderr)


def _num_broken(counts: Counts) -> int:
    return sum(count for reason, count in counts.left_out.items() if reason not in (DUPLICATE, LONG))


def _summarise(kind: str, parts: Mapping[Path, Sequence[Any]], counts: Counts, files: Sequence[Path]) -> None:
    names = sorted({split_name(Path(file.name)) for file in files})  # files that were named may be of several splits
    print(
        f"read {_count(counts.read, 'row')} of {_count(len(files), 'file')}"
        + f": {', '.join(names)}" * (len(names) > 1)
    )
    for path, rows in parts.items():
        print(f"wrote {_count(len(rows), 'row')} of {kind} to {path}")
    if left_out := sum(counts.left_out.values()):
        print(f"left out {_count(left_out, 'row')}: {counts.reasons()}")
    if counts.shortened:
        print(f"shortened {_count(counts.shortened, 'row')} by their oldest turns")
    if counts.unused:
        told = (f"{name} ({_count(number, 'row')})" for name, number in counts.unused.most_common())
        print(f"columns that are not used: {', '.join(told)}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
