"""`data check | show`: what they print, and what they refuse."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_inputs import comparison, prompt, write_rows, write_tokenizer

from rlhf_ray.data.chat import encode_dialogue, load_tokenizer
from rlhf_ray.data.inspect import check_table, show_table
from rlhf_ray.errors import SHOWN_PROBLEMS, UserError


def test_a_sound_table_is_one_line(tmp_path, capsys):
    path = tmp_path / "p.parquet"
    write_rows(path, "prompts", [prompt(0), prompt(1)])
    check_table("prompts", path)
    assert (
        capsys.readouterr().out == f"{path}: 2 rows of prompts, all well; --tokenizer DIR checks their tokens as well\n"
    )


def test_every_broken_row_is_told_up_to_a_number(tmp_path, capsys):
    path = tmp_path / "c.parquet"
    write_rows(path, "comparisons", [comparison(0)] + [comparison(n, chosen="") for n in range(1, 31)])
    with pytest.raises(UserError, match=r"c.parquet comparisons row 1: chosen='' .*the first of 30 .* 20 of"):
        check_table("comparisons", path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == SHOWN_PROBLEMS
    assert lines[0].startswith("comparisons row 1: chosen='' must not be empty")


def demonstration(text):
    return {"messages": [{"role": "user", "content": "which?"}, {"role": "assistant", "content": text}], "kind": ""}


def test_what_a_tokenizer_says_against_rows(tmp_path, capsys):
    directory = write_tokenizer(tmp_path / "tokenizer")
    long, most = demonstration("carp " * 30), 40
    rows = [demonstration("carp"), demonstration("a </s> b"), long, demonstration("<s>"), demonstration(" ")]
    path = tmp_path / "d.parquet"
    write_rows(path, "demonstrations", rows)
    with pytest.raises(UserError, match=r"d\.parquet demonstrations row 4: .* \(the first of 4 problems in 5 rows\)"):
        check_table("demonstrations", path, tokenizer=directory, max_tokens=most)
    size = len(encode_dialogue(load_tokenizer(directory), long["messages"])[0])
    assert capsys.readouterr().err.splitlines() == [
        "demonstrations row 4: messages[1].content=' ' must not be empty; fill it or drop the row",
        "row 1 holds the special token '</s>', which would end or fake a turn; remove it",
        f"row 2: has {size} tokens, at most 40 fit: --max-tokens 40; shorten the row",
        "row 3 holds the special token '<s>', which would end or fake a turn; remove it",
    ]
    write_rows(path, "demonstrations", [rows[0], long])
    check_table("demonstrations", path, tokenizer=directory, max_tokens=size)
    assert capsys.readouterr().out == f"{path}: 2 rows of demonstrations, all well\n"
    with pytest.raises(UserError, match=rf"d\.parquet row 1: has {size} tokens, at most {size - 1} fit"):
        check_table("demonstrations", path, tokenizer=directory, max_tokens=size - 1)


def test_options_of_a_check_that_do_not_fit(tmp_path):
    write_rows(tmp_path / "c.parquet", "corpus", [{"text": "a"}])
    with pytest.raises(UserError, match=r"--max-tokens 9: needs a tokenizer to count with; give --tokenizer DIR"):
        check_table("corpus", tmp_path / "c.parquet", max_tokens=9)
    with pytest.raises(UserError, match=r"--tokenizer .*: texts of a corpus are cut to rows"):
        check_table("corpus", tmp_path / "c.parquet", tokenizer=tmp_path)
    write_rows(tmp_path / "p.parquet", "prompts", [prompt(0)])
    with pytest.raises(UserError, match=r"--tokenizer .*: has no tokenizer\.json"):
        check_table("prompts", tmp_path / "p.parquet", tokenizer=tmp_path)


def test_columns_without_a_place_are_told(tmp_path, capsys):
    turns = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b", "weight": 0}]
    row = {"messages": turns, "kind": "", "system": "Be brief."}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    check_table("demonstrations", tmp_path / "d.parquet")
    assert capsys.readouterr().out.splitlines()[1] == "columns that are not used: system, messages[].weight"


def test_a_mistyped_kind(tmp_path):
    with pytest.raises(UserError, match=r"KIND=promts is no kind of table; did you mean prompts\?"):
        check_table("promts", tmp_path)


def test_rows_are_shown_with_their_dialogue(tmp_path, capsys):
    path = tmp_path / "p.parquet"
    write_rows(path, "prompts", [prompt(n, f"[bold]question[/] {n}") for n in range(5)])
    show_table(path, rows=2, start=1)
    shown = capsys.readouterr().out
    assert "rows 1 to 2 of 5" in " ".join(shown.split())  # wherever the path before it makes the line break
    assert "user: [bold]question[/] 1" in shown and "question[/] 2" in shown  # marks are text, not markup
    assert "question[/] 0" not in shown and "question[/] 3" not in shown


def test_empty_and_null_look_different(tmp_path, capsys):
    path = tmp_path / "c.parquet"
    write_rows(path, "comparisons", [comparison(0, rejected="", strength=None)])
    show_table(path, rows=1, start=0)
    lines = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert (lines["rejected"], lines["strength"], lines["chosen_temperature"]) == ('""', "null", "1")


def test_messages_of_other_tables_are_shown_as_they_are(tmp_path, capsys):
    for messages in ('[{"role": "user"}]', [{"speaker": "a"}], [None]):
        pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "t.parquet")
        show_table(tmp_path / "t.parquet", rows=1, start=0)
        assert str(messages) in capsys.readouterr().out


def test_what_cannot_be_shown(tmp_path):
    (tmp_path / "text").write_text("no table")
    write_rows(tmp_path / "p.parquet", "prompts", [prompt(0)])
    for name, start, message in (
        ("missing", 0, "no such file"),
        ("text", 0, "cannot be read as Parquet"),
        ("p.parquet", 1, "--start 1: must be less than 1"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            show_table(tmp_path / name, rows=1, start=start)
        assert "\n" not in str(caught.value)
