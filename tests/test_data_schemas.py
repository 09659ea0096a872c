"""Parquet tables: round trips, and one clear line for everything that can be wrong with a file or a row."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_ray.algo.ranking import MARGINS
from rlhf_ray.algo.ranking import SAFETY_BINS as LABELS_OF_BINS
from rlhf_ray.data.schemas import (
    COMPARISONS,
    CORPUS,
    DEMONSTRATIONS,
    PROMPTS,
    SAFETY_BINS,
    SCHEMAS,
    STRENGTHS,
    check_rows,
    read_table,
    write_table,
)
from rlhf_ray.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
PROMPT = {"prompt_id": "p0", "messages": [USER], "is_safety": False, "kind": "greeting", "truth": ""}
COMPARISON = {
    "comparison_id": "c0",
    "prompt_id": "p0",
    "messages": [SYSTEM, USER, ANSWER, USER],
    "is_safety": True,
    "guideline": "safety",
    "chosen": "Good day.",
    "rejected": "Go away.",
    "chosen_finished": True,
    "rejected_finished": False,
    "chosen_model": "v1",
    "rejected_model": "v0",
    "chosen_temperature": 0.5,
    "rejected_temperature": 1.25,
    "strength": "better",
    "safety_bin": None,
    "annotator": "a",
    "batch": 3,
    "time": "2023-07-18T00:00:00+00:00",
}
PAIR = {
    "pair_id": "q0",
    "prompt_id": "p0",
    "messages": [SYSTEM, USER],
    "is_safety": False,
    "guideline": "helpfulness",
    "first": "",  # a model may stop at once
    "second": "Good day.",
    "first_finished": True,
    "second_finished": False,
    "first_model": "v1",
    "second_model": "v0",
    "first_temperature": 0.5,
    "second_temperature": 1.25,
    "batch": 3,
}
SAMPLE = {
    "prompt_id": "p0",
    "messages": [SYSTEM, USER],
    "is_safety": False,
    "sample": 2,
    "tokens": [5, 7, 2],
    "text": "Good day.",
    "finished": True,
    "model": "sft-1a2b/model",
    "temperature": 1.25,
    "helpfulness": -0.5,
    "safety": 2.5,
    "combined": None,
    "scope": "v2",
}
ROWS = {
    "samples": SAMPLE,
    "prompts": PROMPT,
    "pairs": PAIR,
    "demonstrations": {"messages": [USER, ANSWER], "kind": "greeting", "finished": False, "learnt": [True]},
    "corpus": {"text": "Once."},
    "comparisons": COMPARISON,
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_rows_come_back_as_they_were_written(tmp_path, kind):
    path = tmp_path / "made" / "rows.parquet"
    rows = [ROWS[kind]] * 2
    write_table(path, rows, SCHEMAS[kind])
    table = read_table(path, SCHEMAS[kind])
    assert table.to_pylist() == rows
    assert table.schema == SCHEMAS[kind]
    assert [p.name for p in path.parent.iterdir()] == ["rows.parquet"]


def test_only_asked_columns_are_read_in_schema_order(tmp_path):
    write_table(tmp_path / "p", [PROMPT], PROMPTS)
    table = read_table(tmp_path / "p", PROMPTS, columns=["is_safety", "messages"])
    assert table.to_pylist() == [{"messages": [USER], "is_safety": False}]
    assert table.column_names == ["messages", "is_safety"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "corpus.parquet"
    write_table(path, [{"text": "old"}], CORPUS)
    for broken in ({"text": 5}, {"text": None}, {}, {"text": "new", "txt": "typo"}):
        with pytest.raises(ValueError, match=r"corpus\.parquet"):
            write_table(path, [broken], CORPUS)
    assert read_table(path, CORPUS).to_pylist() == [{"text": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.parquet"]


def test_an_unknown_column_is_named_on_writing(tmp_path):
    with pytest.raises(ValueError, match="row 1 has unknown column 'txt'; the schema has text"):
        write_table(tmp_path / "x", [{"text": "a"}, {"text": "a", "txt": "b"}], CORPUS)


def test_files_of_other_writers_are_read(tmp_path):
    # Other libraries write wider types, nullable and more columns, and null type where every value is null.
    messages = pa.array(
        [[USER]], pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    )
    columns = {name: [value] for name, value in COMPARISON.items()}
    columns |= {"messages": messages, "batch": pa.array([3], pa.int64()), "extra": [1]}
    columns |= {"chosen_temperature": pa.array([0.5], pa.float64()), "strength": pa.nulls(1)}
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    table = read_table(tmp_path / "c.parquet", COMPARISONS)
    assert table.schema == COMPARISONS
    assert table.to_pylist() == [COMPARISON | {"messages": [USER], "strength": None}]


def test_unreadable_files_are_told_in_one_line(tmp_path):
    write_table(tmp_path / "whole", [{"text": "x" * 5000}], CORPUS)
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("not parquet at all")
    (tmp_path / "empty").write_bytes(b"")
    damaged = bytearray(content)
    damaged[10:60] = b"\xff" * 50
    (tmp_path / "damaged").write_bytes(damaged)
    for name in ("cut", "text", "empty", "damaged"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as Parquet .*Write it again") as caught:
            read_table(tmp_path / name, CORPUS)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read_table(missing, CORPUS)


def write_raw(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_wrong_columns_are_named(tmp_path):
    path = write_raw(tmp_path / "a", txt=["x"])
    with pytest.raises(UserError, match=r"column 'text' \(string\) is missing, the file has txt; add it"):
        read_table(path, CORPUS)
    path = write_raw(tmp_path / "b", text=[5])
    with pytest.raises(UserError, match="column 'text' has type int64 and must have string"):
        read_table(path, CORPUS)
    path = write_raw(tmp_path / "c", messages=["Hi?"], kind=["x"])
    with pytest.raises(UserError, match="column 'messages' has type string and must have list<"):
        read_table(path, DEMONSTRATIONS)
    path = write_raw(tmp_path / "d", messages=[[{"from": "user", "value": "x"}]], kind=["x"])
    with pytest.raises(UserError, match=r"column 'messages' has type list<.*from"):
        read_table(path, DEMONSTRATIONS)


def test_no_rows_and_nulls_are_named(tmp_path):
    path = write_raw(tmp_path / "a", text=pa.array([], pa.string()))
    with pytest.raises(UserError, match="has 0 rows and must have at least one"):
        read_table(path, CORPUS)
    path = write_raw(tmp_path / "b", text=["x", None])
    with pytest.raises(UserError, match="row 1 has no text, which must not be null"):
        read_table(path, CORPUS)


def test_a_value_too_large_for_its_column_is_refused(tmp_path):
    columns = {name: [value] for name, value in COMPARISON.items()} | {"batch": [2**40]}
    pq.write_table(pa.table(columns), tmp_path / "c")
    with pytest.raises(UserError, match="does not fit its schema"):
        read_table(tmp_path / "c", COMPARISONS)


def problems(kind, *rows):
    return check_rows(kind, pa.Table.from_pylist(list(rows), schema=SCHEMAS[kind]))


@pytest.mark.parametrize("kind", SCHEMAS)
def test_sound_rows_have_no_problems(kind):
    assert problems(kind, ROWS[kind]) == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages=[] must hold at least one message"),
        ([USER, ANSWER], "messages[-1].role='assistant' must be 'user'"),
        ([SYSTEM], "messages[-1].role='system' must be 'user'"),
        ([ANSWER, USER], "messages[0].role='assistant' must be 'user'"),
        ([USER, USER], "messages[1].role='user' must be 'assistant'"),
        ([USER, SYSTEM, USER], "messages[1].role='system' must be 'assistant'"),
        ([SYSTEM, SYSTEM, USER], "messages[1].role='system' must be 'user'"),
        ([{"role": "human", "content": "Hi?"}], "messages[0].role='human' must be 'user'"),
        ([{"role": "user", "content": " \n"}], "messages[0].content=' \\n' must not be empty"),
        ([{"role": "user", "content": None}], "messages[0].content=None must not be empty"),
        ([USER, None, USER], "messages[1] must not be null"),
    ],
)
def test_broken_dialogues_are_named(messages, message):
    [found] = problems("prompts", PROMPT | {"messages": messages})
    assert found.startswith(f"prompts row 0: {message}")
    assert any(message in problem for problem in problems("comparisons", COMPARISON | {"messages": messages}))


def test_what_is_learnt_is_said_of_each_answer():
    row = {"messages": [USER, ANSWER, USER, ANSWER], "kind": "x", "finished": None}
    for learnt in (None, [True, False], [True, True]):
        assert problems("demonstrations", {**row, "learnt": learnt}) == []
    for learnt in ([True], [True, None], [True] * 3):
        [found] = problems("demonstrations", {**row, "learnt": learnt})
        assert found.startswith(
            f"demonstrations row 0: learnt={learnt} must be true or false for each of the 2 answers"
        )
    [found] = problems("demonstrations", {**row, "learnt": [False, False]})
    assert found == "demonstrations row 0: learnt=[False, False] leaves nothing to learn; drop the row"


def test_optional_columns_are_written_where_a_row_has_them_and_read_where_they_are_asked_for(tmp_path):
    row = {"messages": [USER, ANSWER], "kind": "x"}
    for rows, written in (([row], []), ([row, {**row, "finished": False}], ["finished"])):
        write_table(tmp_path / "t", rows, DEMONSTRATIONS)
        assert pq.read_schema(tmp_path / "t").names == ["messages", "kind", *written]
        assert read_table(tmp_path / "t", DEMONSTRATIONS).column_names == ["messages", "kind", *written]
        asked = read_table(tmp_path / "t", DEMONSTRATIONS, columns=["finished", "learnt"]).to_pylist()
        assert asked == [{"finished": row.get("finished"), "learnt": None} for row in rows]


def test_demonstrations_end_in_an_answer():
    [found] = problems("demonstrations", {"messages": [USER], "kind": "x"})
    assert found.startswith("demonstrations row 0: messages[-1].role='user' must be 'assistant'")


def test_corpus_texts_are_not_empty():
    assert problems("corpus", {"text": "a"}, {"text": " "}) == [
        "corpus row 1: text=' ' must not be empty; drop the row"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": ""}, "chosen='' must not be empty; give the chosen answer or drop the row"),
        (
            {"rejected": "Good day.", "rejected_finished": True},
            "rejected='Good day.' must differ from chosen",
        ),
        ({"guideline": "honesty"}, "guideline='honesty' must be one of helpfulness, safety; correct it"),
        (
            {"strength": "much"},
            "strength='much' must be one of significantly, better, slightly, negligibly, or null",
        ),
        (
            {"safety_bin": "rejected_safe"},
            "safety_bin='rejected_safe' must be one of chosen_safe, both_safe,",
        ),
        ({"chosen_temperature": -1.0}, "chosen_temperature=-1.0 must be finite and not negative"),
        ({"rejected_temperature": float("nan")}, "rejected_temperature=nan must be finite and not negative"),
    ],
)
def test_broken_comparisons_are_named(change, message):
    [found] = problems("comparisons", COMPARISON | {"comparison_id": "first"}, COMPARISON | change)
    assert found.startswith(f"comparisons row 1: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [USER, ANSWER]}, "messages[-1].role='assistant' must be 'user'"),
        ({"first": "Good day.", "first_finished": False}, "second='Good day.' must differ from first; drop the row"),
        ({"guideline": "honesty"}, "guideline='honesty' must be one of helpfulness, safety; correct it"),
        ({"first_temperature": float("inf")}, "first_temperature=inf must be finite and not negative"),
        ({"second_temperature": -1.0}, "second_temperature=-1.0 must be finite and not negative"),
        ({"pair_id": "first"}, "pair_id='first' is that of row 0 too; make it unique"),
    ],
)
def test_broken_pairs_are_named(change, message):
    [found] = problems("pairs", PAIR | {"pair_id": "first"}, PAIR | change)
    assert found.startswith(f"pairs row 1: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [USER, ANSWER]}, "messages[-1].role='assistant' must be 'user'"),
        ({"sample": -1}, "sample=-1 must not be negative; number the answers to a prompt from 0"),
        ({"tokens": []}, "tokens=[] must hold the answer's token ids; drop the row"),
        ({"tokens": [3, -1]}, "tokens=[3, -1] must be token ids, none of them null or negative; correct it"),
        ({"tokens": [3, None]}, "tokens=[3, None] must be token ids"),
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and not negative"),
        ({"safety": float("nan")}, "safety=nan must be finite, or null; score the answer again"),
        (
            {"sample": 0},
            "scope='v2', model='sft-1a2b/model', temperature=1.25, prompt_id='p0', sample=0 is that of row 0 too",
        ),
    ],
)
def test_broken_samples_are_named(change, message):
    [found] = problems("samples", SAMPLE | {"sample": 0}, SAMPLE | change)
    assert found.startswith(f"samples row 1: {message}")


def test_samples_of_another_round_model_or_temperature_may_have_the_same_number():
    for change in ({"scope": "v3"}, {"model": "x"}, {"temperature": 1.0}, {"prompt_id": "p1"}):
        assert problems("samples", SAMPLE, SAMPLE | change) == []


def test_an_answer_cut_off_differs_from_the_same_text_finished_and_may_be_empty_if_rejected():
    assert problems("comparisons", COMPARISON | {"rejected": "Good day."}) == []
    assert problems("comparisons", COMPARISON | {"rejected": ""}) == []
    assert problems("pairs", PAIR | {"first": "Good day."}) == []


def test_temperatures_may_be_unknown(tmp_path):
    row = COMPARISON | {"chosen_temperature": None, "rejected_temperature": None}
    write_table(tmp_path / "c", [row], COMPARISONS)
    assert read_table(tmp_path / "c", COMPARISONS).to_pylist() == [row]
    assert problems("comparisons", row) == []


def test_repeated_identifiers_are_named():
    [found] = problems("prompts", PROMPT, PROMPT | {"prompt_id": "p1"}, PROMPT)
    assert found == "prompts row 2: prompt_id='p0' is that of row 0 too; make it unique"


def test_the_losses_know_exactly_these_labels():
    assert set(MARGINS["small"]) == set(MARGINS["large"]) == set(STRENGTHS)
    assert set(LABELS_OF_BINS) == set(SAFETY_BINS)


_TURN = [("role", pa.string()), ("content", pa.string())]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_list(pa.struct(_TURN)),
        pa.list_view(pa.struct(_TURN)),
        pa.large_list_view(pa.struct(_TURN)),
        pa.list_(pa.struct(_TURN), 2),
        pa.list_(pa.struct(_TURN[::-1])),
        pa.list_(pa.struct([*_TURN, ("weight", pa.int64())])),
        pa.list_(pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.large_string())])),
        pa.list_view(pa.struct([("content", pa.large_string()), ("role", pa.string())])),
    ],
)
def test_every_layout_of_messages_says_the_same(tmp_path, kind):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    dialogues = [turns, [{**turn, "content": turn["content"] * 2} for turn in turns]]
    columns = {"messages": pa.array(dialogues, kind), "kind": pa.array(["x", "x"]).dictionary_encode()}
    pq.write_table(pa.table(columns), tmp_path / "t")
    found = read_table(tmp_path / "t", DEMONSTRATIONS)
    assert found.schema == pa.schema([DEMONSTRATIONS.field(name) for name in columns])
    assert found.to_pylist() == [{"messages": dialogue, "kind": "x"} for dialogue in dialogues]
