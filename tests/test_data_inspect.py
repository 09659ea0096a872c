"""`data check | show`: what they print, and what they refuse."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_inputs import comparison, prompt, write_rows

from rlhf_ray.data.inspect import check_table, show_table
from rlhf_ray.data.row_checks import SHOWN_PROBLEMS
from rlhf_ray.errors import UserError


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
