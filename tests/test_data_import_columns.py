"""`data import`: names of columns elsewhere, labels, system messages, and columns that nothing reads."""

import json
import math

import pytest
from test_data_importers import PAIR, answer, checked, user, write_lines

from rlhf_ray.data.import_columns import verdict
from rlhf_ray.data.importers import import_table

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [user("Which bird swims?"), answer("The duck.")]


@pytest.fixture
def imported(tmp_path):
    """Imports rows from a file of JSON lines: (table's rows, counts)."""

    def run(*rows, kind="demonstrations", **options):
        source = write_lines(tmp_path / "source.jsonl", rows)
        counts = import_table([source], tmp_path / "out.parquet", kind=kind, overwrite=True, **options)
        return checked(tmp_path / "out.parquet", kind), counts

    return run


SHAREGPT = [{"from": "human", "value": "Which bird swims?"}, {"from": "gpt", "value": "The duck."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"instruction": "Which bird swims?", "input": "", "output": "The duck."},
        {"question": "Which bird swims?", "answer": "The duck."},
        {"input": "Which bird swims?", "output": "The duck."},
        {"prompt": "Which bird swims?", "response": "The duck."},
        {"messages": json.dumps(CHAT)},
        {"messages": str(CHAT)},  # as a column of Python lists comes out of a CSV file
        {"messages": CHAT, "instruction": "Another?", "output": "No."},
        {"messages": [{"role": "User", "content": CHAT[0]["content"]}, CHAT[1]]},
    ],
)
def test_a_demonstration_under_other_names(imported, row):
    assert imported(row)[0] == [{"messages": CHAT, "kind": ""}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which bird swims?", "chosen": "The duck.", "rejected": "The hen."},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "The hen."}},
        {"prompt": json.dumps(CHAT[:1]), "chosen": json.dumps(CHAT[1:]), "rejected": json.dumps([answer("The hen.")])},
    ],
)
def test_a_comparison_under_other_names(imported, row):
    [found], _ = imported(row, kind="comparisons")
    assert (found["messages"], found["chosen"], found["rejected"]) == (CHAT[:1], "The duck.", "The hen.")


def test_the_input_of_an_instruction_stands_below_it(imported):
    [found], counts = imported({"instruction": "Name the bird.", "input": "It swims.", "output": "A duck."})
    assert found["messages"] == [user("Name the bird.\n\nIt swims."), answer("A duck.")]
    assert counts.unused == {}


def test_texts_that_only_look_like_messages(imported, capsys):
    text = '[{"role": "user", "content"'
    rows, counts = imported({"prompt": "Hi?", "completion": "Yes."}, {"prompt": "JSON?", "completion": text})
    assert (len(rows), counts.left_out) == (1, {"not JSON": 1})
    assert "looks like a list of messages and is none" in capsys.readouterr().err
    row = {"prompt": "JSON?", "chosen": json.dumps(CHAT), "rejected": "No."}
    [found], _ = imported(row, kind="comparisons", form="strings")
    assert found["chosen"] == json.dumps(CHAT)


# --- system messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("kind", ["comparisons", "demonstrations", "prompts"])
def test_a_system_column_is_the_system_message(imported, kind, name):
    row = {**PAIR, name: "Be brief."} if kind != "demonstrations" else {"messages": CHAT, name: "Be brief."}
    [found], counts = imported(row, kind=kind)
    assert found["messages"][:2] == [SYSTEM, CHAT[0]]
    assert name not in counts.unused


@pytest.mark.parametrize("content", ["", " \n", None])
def test_an_empty_system_message_is_none(imported, content):
    row = {"messages": [{"role": "system", "content": content}, *CHAT], "system": content}
    [found], counts = imported(row)
    assert (found["messages"], counts.unused) == (CHAT, {})
    sides = {side: [row["messages"][0], CHAT[0], answer(side)] for side in ("chosen", "rejected")}
    [found], _ = imported(sides, kind="comparisons")
    assert found["messages"] == CHAT[:1]


def test_two_system_messages(imported, capsys):
    same = {"messages": [SYSTEM, *CHAT], "system": "Be brief. "}
    rows, counts = imported(same, {**same, "system": "Be long."})
    assert [row["messages"] for row in rows] == [[SYSTEM, *CHAT]]
    assert counts.left_out == {"two system messages": 1}
    assert "system='Be long.' and the dialogue's own, 'Be brief.', differ; keep one" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["tool", "function", "developer"])
def test_roles_that_the_recipe_has_no_place_for_are_named(imported, capsys, role):
    _, counts = imported({"messages": CHAT}, {"messages": [*CHAT, {"role": role, "content": "42"}, answer("Yes.")]})
    assert counts.left_out == {"other role": 1}
    assert f"messages[2].role='{role}' must be system, user or assistant; rename it" in capsys.readouterr().err


# --- labels --------------------------------------------------------------------------------------------------------

BAD = [False, 0, -1, 0.0, "False", "false", "0", "-1", "bad", "Bad", "rejected", "undesirable", "no", "thumbs down"]
GOOD = [True, 1, 1.0, "True", "1", "good", "chosen", "desirable", "YES", "thumbs_up"]


def test_spellings_of_a_verdict():
    assert [verdict(value) for value in BAD] == [False] * len(BAD)
    assert [verdict(value) for value in GOOD] == [True] * len(GOOD)
    assert [verdict(value) for value in (None, "", "maybe", 2, 0.5, [True])] == [None] * 6


@pytest.mark.parametrize(
    "mark",
    [
        *({"label": value} for value in BAD),
        {"is_chosen": False},
        {"accepted": "no"},
        {"rating": "bad"},
        {"is_bad": True},
        {"rejected": True},
        {"kto_tag": False},
    ],
)
def test_a_labelled_bad_answer_is_not_learnt(imported, capsys, mark):
    [name] = mark
    good = {name: not mark[name]} if isinstance(mark[name], bool) else {name: "good"}
    rows, counts = imported({"prompt": "Hi?", "completion": "Hello.", **good}, {"messages": CHAT, **mark})
    assert (len(rows), counts.left_out, counts.unused) == (1, {"labelled bad": 1}, {})
    assert f"{name}={mark[name]!r} marks an answer not to be learnt from" in capsys.readouterr().err


def test_a_label_that_says_neither(imported, capsys):
    _, counts = imported({"messages": CHAT, "label": math.nan, "score": math.nan})
    assert (counts.left_out, counts.unused) == ({}, {})
    _, counts = imported({"messages": CHAT}, {"prompt": "Hi?", "completion": "Hello.", "label": "maybe"})
    assert counts.left_out == {"unknown label": 1}
    assert "label='maybe' must say true or false; map it to these, or drop the column" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "bad", "good"), [("weight", 0, 1), ("train", False, True), ("loss", "false", "true")])
def test_answers_that_are_not_to_be_learnt(imported, capsys, key, bad, good):
    turns = [*CHAT, user("More?"), {**answer("No."), key: good}]
    rows, counts = imported({"messages": turns}, {"messages": [CHAT[0], {**CHAT[1], key: bad}, *turns[2:]]})
    assert (len(rows), counts.left_out, counts.unused) == (1, {"labelled bad": 1}, {})
    assert f"messages[1].{key}={bad!r} marks an answer not to be learnt from" in capsys.readouterr().err


def test_answers_of_a_prompt_are_learnt_too(imported):
    bad = {"prompt": [CHAT[0], {**CHAT[1], "weight": 0}, user("More?")], "completion": "No."}
    assert imported({"messages": CHAT}, bad)[1].left_out == {"labelled bad": 1}


# --- columns that nothing reads --------------------------------------------------------------------------------------


def test_every_column_that_is_not_used_is_told_once_with_its_rows(imported, capsys):
    first = {
        "id": 7,
        "score_chosen": 8.0,
        "margin": 0,
        "tools": [{"name": "f"}],
        "images": [],
        "note": "",
        "label": False,
    }
    _, counts = imported({**PAIR, **first}, {**PAIR, "prompt": "?", "id": 8, "rating": 2}, kind="comparisons")
    assert counts.unused == {"id": 2, "score_chosen": 1, "margin": 1, "tools": 1, "label": 1, "rating": 1}
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("columns")]
    assert line.startswith("columns that are not used: id (2 rows), ") and "score_chosen (1 row)" in line


def test_what_messages_say_besides_is_told_too(imported):
    turns = [{**CHAT[0], "name": "Ann", "weight": 1}, {**CHAT[1], "weight": 0.5, "tool_calls": [{}], "refusal": None}]
    _, counts = imported({"conversations": turns})
    assert counts.unused == {f"conversations[].{key}": 1 for key in ("name", "weight", "tool_calls")}


def test_a_prompt_beside_the_messages_that_hold_it_is_told(imported):
    _, counts = imported({"messages": CHAT, "prompt": "Which bird swims?", "prompt_id": "a"})
    assert counts.unused == {"prompt": 1, "prompt_id": 1}


def test_numbers_of_an_unknown_scale_are_told(imported):
    rows, counts = imported({"messages": CHAT, "rating": 0, "score": "-3.5"})
    assert (len(rows), counts.unused) == (1, {"rating": 1, "score": 1})
