"""`data import`: encodings and shapes of JSON files, and the splits that a folder's names tell."""

import codecs
import gzip
import json
import re

import pytest
from test_data_importers import PAIR, checked, pair, write_lines

from rlhf_ray.data.import_sources import read_rows, source_files, split_name
from rlhf_ray.data.importers import import_table
from rlhf_ray.errors import UserError

ROWS = [{**PAIR, "prompt": "Ein Vögel\u2028chen 🦆?"}, {**PAIR, "prompt": "a\r\nb"}]
LINES = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
ENCODED = {
    "crlf": LINES.encode(),
    "cr": LINES.replace("\r\n", "\r").encode(),
    "bom": codecs.BOM_UTF8 + LINES.encode(),
    "utf-16-le": codecs.BOM_UTF16_LE + LINES.encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "utf-16 without a mark": LINES.encode("utf-16-le"),
    "array": codecs.BOM_UTF8 + json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode(),
    "array in utf-16": codecs.BOM_UTF16_LE + json.dumps(ROWS, indent=1).encode("utf-16-le"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
@pytest.mark.parametrize("content", ENCODED.values(), ids=ENCODED)
def test_texts_of_windows_are_read_as_any_other(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert [row for _, row in read_rows(path)] == ROWS


def test_hh_turns_with_the_line_ends_of_windows(tmp_path):
    text = "\r\n\r\nHuman: Which bird\r\nswims?\r\n\r\nAssistant: The "
    row = {"chosen": text + "duck.", "rejected": text + "hen."}
    import_table([write_lines(tmp_path / "hh.jsonl", [row])], tmp_path / "out.parquet", kind="comparisons")
    [found] = checked(tmp_path / "out.parquet")
    assert (found["messages"][0]["content"], found["chosen"]) == ("Which bird\nswims?", "The duck.")


def test_latin_1_is_told_with_its_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        "\n".join(json.dumps(pair(n, chosen="é"[: n - 1]), ensure_ascii=False) for n in (2, 1)).encode("latin-1")
    )
    path.write_bytes(path.read_bytes() + b"\n" + json.dumps(pair(3)).encode())
    counts = import_table([path], tmp_path / "out.parquet", kind="comparisons")
    assert counts.left_out == {"not UTF-8": 1, "empty answer": 1}
    assert re.search(
        r"rows\.jsonl line 1: not UTF-8: byte 0xe9 at \d+; save the file as UTF-8", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"data": [{}], "version": 1}', "is one object; write what its 'data' holds as an array"),
        ("a.json", '[{"a": 1},\n{"a": ', "is not JSON in UTF-8 .*; write it again as one array"),
        ("a.jsonl", '[{"a": "é"}]'.encode("latin-1"), "is not JSON in UTF-8 .*0xe9.*; write it again"),
        ("a.jsonl", codecs.BOM_UTF16_LE + b"{", "cannot be read as utf-16 .*; save it as UTF-8"),
    ],
)
def test_files_that_are_neither_lines_nor_an_array(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.jsonl", "train"),
        ("train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("data/train_sft-00002-of-00003-a1b2c3d4e5f60718.parquet", "train_sft"),
        ("train-00000-of-00001-0123456789abcdef.parquet", "train"),
        ("data/test_gen-00000-of-00001.parquet", "test_gen"),
        ("validation_matched-00000-of-00001.parquet", "validation_matched"),
        ("train/0000.parquet", "train"),
        ("default/train/0000.parquet", "train"),
        ("mnli/validation_matched/0000.parquet", "mnli/validation_matched"),
        ("helpful-base/train.jsonl.gz", "helpful-base/train"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/train"),
        ("test/part-00000-6e5d4c3b-aaaa-bbbb-cccc-0123456789ab-c000.snappy.parquet", "test"),
        ("train/data-00000-of-00004.json", "train"),
        ("train_0001.jsonl", "train"),
        ("train-part-3.jsonl", "train"),
        ("0000.parquet", "all"),
        ("dolly-15k.jsonl", "dolly-15k"),
    ],
)
def test_the_split_that_a_path_tells(tmp_path, path, split):
    assert split_name((tmp_path / path).relative_to(tmp_path)) == split


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


@pytest.mark.parametrize(
    "paths",
    [
        ("train_prefs.jsonl", "train_sft.jsonl"),
        ("helpful-base/train.jsonl.gz", "harmless-base/train.jsonl.gz"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("en/train/0000.parquet", "de/train/0000.parquet"),
        ("good.jsonl", "bad.jsonl"),
    ],
)
def test_splits_are_never_mixed(tmp_path, paths):
    touch(tmp_path, *paths)
    names = sorted(split_name((tmp_path / path).relative_to(tmp_path)) for path in paths)
    with pytest.raises(UserError, match=f"has the splits {', '.join(names)}, which must not be mixed; choose one with"):
        source_files([tmp_path])
    assert source_files([tmp_path], split=names[0]) == [tmp_path / sorted(paths)[0]]


def test_shards_of_one_split_are_read_together(tmp_path):
    paths = ["default/train/0000.parquet", "default/train/0001.parquet"]
    root = touch(tmp_path, *paths, "README.md", "dataset_info.json", ".cache/x.jsonl")
    assert source_files([root]) == [root / path for path in paths]


def test_splits_of_several_folders_are_never_mixed(tmp_path):
    touch(tmp_path, "a/train.jsonl", "b/test.jsonl", "b/train.jsonl")
    with pytest.raises(UserError, match="has the splits test, train"):
        source_files([tmp_path / "a", tmp_path / "b"])
    assert len(source_files([tmp_path / "a", tmp_path / "b"], split="train")) == 2


def test_files_that_are_named_are_read_and_their_splits_told(tmp_path, capsys):
    sources = [write_lines(tmp_path / f"{name}.jsonl", [pair(n)]) for n, name in enumerate(("train", "test"))]
    import_table(sources, tmp_path / "out.parquet", kind="comparisons")
    assert capsys.readouterr().out.splitlines()[0] == "read 2 rows of 2 files: test, train"
