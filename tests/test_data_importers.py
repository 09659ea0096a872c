"""`data import`: every format, every reason to leave a row out, splits, files and directories, exit codes."""

import gzip
import json
import re
import sys
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_inputs import write_tokenizer

from rlhf_ray.cli import main as cli
from rlhf_ray.data.chat import encode_dialogue, load_tokenizer
from rlhf_ray.data.import_columns import BrokenRow, Columns
from rlhf_ray.data.import_formats import Guideline, read_dialogue
from rlhf_ray.data.importers import import_table
from rlhf_ray.data.schemas import GUIDELINES, SCHEMAS, check_rows, read_table
from rlhf_ray.data.shares import hash_share
from rlhf_ray.errors import SHOWN_PROBLEMS, UserError


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
DIALOGUE = [user("Which bird swims?"), answer("The duck."), user("Any other?")]
HH = "\n\nHuman: Which bird swims?\n\nAssistant: The duck.\n\nHuman: Any other?\n\nAssistant:"
PAIR = {"prompt": "Which bird swims?", "chosen": "The duck.", "rejected": "The hen."}


def write_lines(path, rows):
    """Rows as JSON lines; text stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def pair(number, **more):
    """A comparison of a prompt of its own."""
    return {"prompt": f"Name bird {number}.", "chosen": f"Duck {number}.", "rejected": "No.", **more}


def checked(path, kind="comparisons"):
    """The rows of a table that `data check` finds nothing wrong with."""
    table = read_table(path, SCHEMAS[kind])
    assert check_rows(kind, table) == []
    return table.to_pylist()


@pytest.fixture
def imported(tmp_path):
    """Imports rows from a file of JSON lines: (table's rows, counts)."""

    def run(*rows, kind="comparisons", **options):
        source = write_lines(tmp_path / "source.jsonl", rows)
        counts = import_table([source], tmp_path / "out.parquet", kind=kind, overwrite=True, **options)
        return checked(tmp_path / "out.parquet", kind), counts

    return run


# --- formats ---------------------------------------------------------------------------------------------------

MORE_PAIRS = {
    "hh": {"chosen": f"{HH} The swan.", "rejected": f"{HH} The hen.\n"},
    "hh prompt": {"prompt": HH, "chosen": " The swan.", "rejected": " The hen."},
    "hh beside its prompt": {"prompt": HH, "chosen": f"{HH} The swan.", "rejected": f"{HH} The hen."},
    "implicit prompt": {
        "chosen": [*DIALOGUE, answer("The swan.")],
        "rejected": [*DIALOGUE, answer("The hen.")],
    },
    "explicit prompt": {"prompt": DIALOGUE, "chosen": [answer("The swan.")], "rejected": [answer("The hen.")]},
    "whole dialogues beside their prompt": {
        "prompt": DIALOGUE,
        "chosen": [*DIALOGUE, answer("The swan.")],
        "rejected": [*DIALOGUE, answer("The hen.")],
    },
    "whole dialogues beside a text": {
        "prompt": "Which bird swims?",
        "chosen": [*DIALOGUE, answer("The swan.")],
        "rejected": [*DIALOGUE, answer("The hen.")],
    },
    "answers as text": {"prompt": DIALOGUE, "chosen": "The swan.", "rejected": "The hen."},
    "our own table": {"messages": DIALOGUE, "chosen": "The swan.", "rejected": "The hen."},
}


@pytest.mark.parametrize("row", MORE_PAIRS.values(), ids=MORE_PAIRS)
def test_a_comparison_is_the_same_in_every_format(imported, row):
    [found], _ = imported(row)
    assert (found["messages"], found["chosen"], found["rejected"]) == (DIALOGUE, "The swan.", "The hen.")


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (PAIR, "auto"),
        (PAIR, "strings"),
        ({**PAIR, "chosen": [answer("The duck.")], "rejected": [answer("The hen.")]}, "messages"),
        ({"chosen": "Which bird swims? The duck.", "rejected": "Which bird swims? The hen."}, "strings"),
    ],
)
def test_a_text_as_prompt_is_a_user_message(imported, row, form):
    if form == "strings" and "prompt" not in row:  # texts without a prompt: as far as they are equal, in whole words
        expected = ("Which bird swims? The", "duck.", "hen.")
    else:
        expected = ("Which bird swims?", "The duck.", "The hen.")
    [found], _ = imported(row, form=form)
    assert (found["messages"], found["chosen"], found["rejected"]) == ([user(expected[0])], *expected[1:])


def test_what_an_annotator_did_not_say_is_not_made_up(imported):
    [found], _ = imported(PAIR)
    identifier = found.pop("comparison_id"), found.pop("prompt_id")
    assert all(re.fullmatch("[cp][0-9a-f]{16}", name) for name in identifier)
    assert found == {
        "messages": [user("Which bird swims?")],
        "chosen": "The duck.",
        "rejected": "The hen.",
        "is_safety": False,
        "guideline": "helpfulness",
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


def test_columns_that_the_source_has_are_kept(imported):
    own = {"guideline": "safety", "is_safety": False, "strength": "slightly", "safety_bin": "both_safe"}
    own |= {"annotator": "ann", "batch": 3, "time": "2020-01-01T00:00:00+00:00", "chosen_model": "m"}
    own |= {"chosen_temperature": 0.5, "rejected_finished": False}
    [found], _ = imported({**PAIR, **own, "score": 9, "strength_of_will": "x"})
    assert {name: found[name] for name in own} == own
    assert (found["rejected_model"], found["rejected_temperature"]) == ("unknown", None)


@pytest.mark.parametrize(
    ("option", "row", "expected"),
    [
        (None, {}, ("helpfulness", False)),
        (None, {"is_safety": True}, ("safety", True)),
        (None, {"guideline": "safety"}, ("safety", True)),
        ("safety", {}, ("safety", True)),
        ("helpfulness", {"guideline": "safety", "is_safety": True}, ("helpfulness", False)),
    ],
)
def test_the_guideline(imported, option, row, expected):
    [found], _ = imported({**PAIR, **row}, guideline=option)
    assert (found["guideline"], found["is_safety"]) == expected
    if "guideline" not in row:
        [prompt], _ = imported({**PAIR, **row}, kind="prompts", guideline=option)
        assert prompt["is_safety"] == expected[1]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, *DIALOGUE, answer("The swan.")]},
        {"prompt": [SYSTEM, *DIALOGUE], "completion": [answer("The swan.")]},
        {"prompt": [SYSTEM, *DIALOGUE], "completion": "The swan."},
        {"chosen": [SYSTEM, *DIALOGUE, answer("The swan.")], "rejected": "of no interest"},
    ],
)
def test_demonstrations(imported, row):
    rows, _ = imported(row, kind="demonstrations")
    assert rows == [{"messages": [SYSTEM, *DIALOGUE, answer("The swan.")], "kind": ""}]


@pytest.mark.parametrize("row", [{"text": f"{HH} The swan."}, {"chosen": f"{HH} The swan."}])
def test_demonstrations_from_hh_texts(imported, row):
    rows, _ = imported(row, kind="demonstrations")
    assert rows == [{"messages": [*DIALOGUE, answer("The swan.")], "kind": ""}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HH},
        {"prompt": DIALOGUE},
        {"messages": DIALOGUE},
        {"messages": [*DIALOGUE, answer("The swan.")]},
        {"prompt": DIALOGUE, "completion": [answer("The swan.")]},
        {"text": HH},
        *MORE_PAIRS.values(),
    ],
)
def test_prompts(imported, row):
    [found], _ = imported(row, kind="prompts")
    assert (found["messages"], found["kind"], found["truth"]) == (DIALOGUE, "", "")


def test_a_prompt_has_one_id_in_every_table(imported):
    comparisons, _ = imported(pair(0), pair(0, chosen="Goose."), pair(1))
    prompts, counts = imported(pair(0), pair(0, chosen="Goose."), pair(1), kind="prompts")
    assert [row["prompt_id"] for row in comparisons] == [prompts[n]["prompt_id"] for n in (0, 0, 1)]
    assert len({row["comparison_id"] for row in comparisons}) == 3
    assert counts.left_out == {"duplicate": 1}


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("messages", PAIR),
        ("strings", {**PAIR, "chosen": [answer("The duck.")]}),
        ("hh", {"chosen": DIALOGUE, "rejected": DIALOGUE}),
    ],
)
def test_a_format_that_is_named_is_required(form, row):
    with pytest.raises(BrokenRow, match=r"wrong type: chosen=.* must be .*another --format"):
        read_dialogue("comparisons", Columns(row), form)


def test_plain_texts_are_not_taken_for_hh(imported):
    text = "Human: is a word.\n\nAssistant: is one too."
    [found], _ = imported({**PAIR, "prompt": text}, form="strings")
    assert found["messages"] == [user(text)]
    [found], _ = imported({**PAIR, "chosen": "Human: beings swim, too."})
    assert (found["messages"], found["chosen"]) == ([user(PAIR["prompt"])], "Human: beings swim, too.")


def test_the_options_are_those_of_the_tables():
    assert get_args(Guideline) == GUIDELINES


# --- rows left out ---------------------------------------------------------------------------------------------

BROKEN_PAIRS = [
    ("{not json", "not JSON", "must be one JSON object"),
    ('"text"', "not JSON", "'text' must be a JSON object"),
    ("[" * 100_000, "not JSON", "must be one JSON object"),
    ({"prompt": "Hi?", "chosen": "Yes."}, "missing key", "'rejected' must be there and not null"),
    ({**PAIR, "chosen": None}, "missing key", "'chosen' must be there and not null; there is 'prompt, rejected'"),
    ({**PAIR, "chosen": 5}, "wrong type", "chosen=5 must be text or a list of messages"),
    ({**PAIR, "prompt": 5}, "wrong type", "prompt=5 must be text"),
    ({**PAIR, "prompt": ["Hi?"]}, "wrong type", "prompt[0]='Hi?' must have role and content"),
    ({**PAIR, "prompt": [{"speaker": "human"}]}, "missing key", "prompt[0].role must be there and not null"),
    ({**PAIR, "prompt": [{"role": "user", "content": ["Hi?"]}]}, "wrong type", "prompt[0].content=['Hi?'] must be"),
    ('{"prompt": "a\\ud800", "chosen": "b", "rejected": "c"}', "wrong type", "prompt must be valid Unicode"),
    ({**PAIR, "chosen": " \n"}, "empty answer", "chosen: message 1 (assistant) must not be empty"),
    ({**PAIR, "rejected": ""}, "empty answer", "rejected: message 1 (assistant) must not be empty"),
    ({**PAIR, "prompt": ""}, "empty message", "chosen: message 0 (user) must not be empty"),
    ({**PAIR, "rejected": "The duck. "}, "equal answers", "rejected='The duck.' must differ from chosen"),
    (
        {"chosen": "Just text.", "rejected": f"{HH} The hen."},
        "no 'Assistant:'",
        "chosen='Just text.' must be HH text with 'Human:' and 'Assistant:' turns",
    ),
    (
        {"chosen": "\n\nHuman: Hi?", "rejected": f"{HH} The hen."},
        "no 'Assistant:'",
        "must be HH text with 'Human:' and 'Assistant:' turns",
    ),
    (
        {"chosen": f"Title{HH} The swan.", "rejected": f"Title{HH} The hen."},
        "turns out of order",
        "must begin with 'Human:'",
    ),
    (
        {"chosen": f"{HH} Swan.\n\nAssistant: Or not.", "rejected": f"{HH} Hen."},
        "turns out of order",
        "chosen: message 4 has role 'assistant' and must have 'user'",
    ),
    (
        {"chosen": f"{HH} Swan.\n\nHuman: Thanks.", "rejected": f"{HH} Hen."},
        "turns out of order",
        "chosen ends in 'user' and must end in 'assistant'",
    ),
    ({"chosen": [], "rejected": []}, "turns out of order", "chosen has no message and must end in assistant"),
    (
        {"prompt": [user("a"), user("b")], "chosen": "c", "rejected": "d"},
        "turns out of order",
        "chosen: message 1 has role 'user' and must have 'assistant'",
    ),
    (
        {"chosen": f"{HH} Swan.", "rejected": f"{HH} Hen.".replace("duck", "goose")},
        "dialogues differ",
        "chosen and rejected differ before their last answers, at message 1",
    ),
    (
        {"chosen": f"{HH} Swan.", "rejected": f"{HH} Hen.\n\nHuman: Sure?\n\nAssistant: Yes."},
        "dialogues differ",
        "which have 3 and 5 messages before them",
    ),
    ({**PAIR, "strength": "much"}, "wrong value", "strength='much' must be one of significantly, better"),
    ({**PAIR, "guideline": "honesty"}, "wrong value", "guideline='honesty' must be one of helpfulness, safety"),
    ({**PAIR, "annotator": 12}, "wrong value", "annotator=12 must be of type string"),
    ({**PAIR, "batch": True}, "wrong value", "batch=True must be of type int32"),
    ({**PAIR, "batch": 2**40}, "wrong value", "batch=1099511627776 must be of type int32"),
    ({**PAIR, "chosen_temperature": -1}, "wrong value", "chosen_temperature=-1.0 must be finite and not negative"),
    ({**PAIR, "is_safety": "yes"}, "wrong value", "is_safety='yes' must be of type bool"),
]


@pytest.mark.parametrize(("broken", "reason", "line"), BROKEN_PAIRS)
def test_a_broken_comparison_is_told_with_its_line(imported, capsys, broken, reason, line):
    rows, counts = imported(pair(0), "", broken, pair(1))
    assert [row["chosen"] for row in rows] == ["Duck 0.", "Duck 1."]
    assert (counts.read, counts.left_out) == (3, {reason: 1})
    out, err = capsys.readouterr()
    [told] = err.splitlines()
    assert re.match(rf".*/source\.jsonl line 3: {re.escape(reason)}: ", told) and line in told
    assert out.splitlines()[0] == "read 3 rows of 1 file"
    assert out.splitlines()[-1] == f"left out 1 row: 1 {reason}"


@pytest.mark.parametrize(
    ("kind", "broken", "reason"),
    [
        ("demonstrations", {"messages": DIALOGUE}, "turns out of order"),
        ("demonstrations", {"prompt": "Hi?"}, "missing key"),
        ("demonstrations", {"prompt": "Hi?", "completion": ""}, "empty answer"),
        ("demonstrations", {"prompt": "Hi?", "completion": "No!", "label": False}, "labelled bad"),
        ("demonstrations", {"text": "Once upon a time."}, "no 'Assistant:'"),
        ("prompts", {"messages": [answer("Yes.")]}, "turns out of order"),
        ("prompts", {"messages": [SYSTEM]}, "turns out of order"),
        ("prompts", {"prompt": " "}, "empty message"),
        ("prompts", {"subject": "Hi?"}, "missing key"),
        ("prompts", {"prompt": 5}, "wrong type"),
    ],
)
def test_broken_demonstrations_and_prompts(imported, kind, broken, reason):
    rows, counts = imported({"prompt": "Hi?", "completion": "Hello.", "label": True}, broken, kind=kind)
    assert (len(rows), counts.left_out) == (1, {reason: 1})


def test_the_first_broken_rows_are_shown_and_all_are_counted(imported, capsys):
    broken = [pair(n, chosen="") for n in range(SHOWN_PROBLEMS + 5)]
    rows, counts = imported(pair(0), *broken, pair(0), pair(0), "{")
    out, err = capsys.readouterr()
    assert len(rows) == 1 and counts.read == SHOWN_PROBLEMS + 9
    assert err.splitlines()[SHOWN_PROBLEMS:] == ["6 more broken rows, not shown"]
    assert err.splitlines()[SHOWN_PROBLEMS - 1].partition(": ")[0].endswith(f"line {SHOWN_PROBLEMS + 1}")
    assert out.splitlines()[-1] == f"left out {SHOWN_PROBLEMS + 8} rows: 15 empty answer, 2 duplicate, 1 not JSON"


# --- long rows -------------------------------------------------------------------------------------------------

# Messages of 10 characters each; a comparison of n user messages has 10 x (2n - 1) and an answer of 10.
LONG = [user("question 1"), answer("response 1"), user("question 2"), answer("response 2"), user("question 3")]
LONG_PAIR = {"prompt": LONG, "chosen": "0123456789", "rejected": "short"}


@pytest.mark.parametrize(
    ("max_chars", "kept"), [(60, LONG), (59, LONG[2:]), (40, LONG[2:]), (39, LONG[4:]), (20, LONG[4:]), (19, None)]
)
def test_long_comparisons_lose_their_oldest_pairs_of_turns(imported, max_chars, kept):
    rows, counts = imported(pair(0, prompt="?"), LONG_PAIR, max_chars=max_chars, too_long="drop-turns")
    assert [row["messages"] for row in rows[1:]] == ([] if kept is None else [kept])
    assert [(row["chosen"], row["rejected"]) for row in rows[1:]] == [("0123456789", "short")] * len(rows[1:])
    assert counts.left_out == ({"too long": 1} if kept is None else {})
    assert counts.shortened == (kept is not None and kept != LONG)


def test_long_rows_are_left_out_unless_asked_otherwise(imported, capsys):
    many = SHOWN_PROBLEMS + 1
    rows, counts = imported(pair(0, prompt="?"), *[LONG_PAIR] * many, max_chars=59)
    assert (len(rows), counts.left_out, counts.shortened) == (1, {"too long": many}, 0)
    assert capsys.readouterr().err == ""  # they are not broken


def test_shortened_rows_keep_their_system_message_and_are_counted(imported, capsys):
    row = {"messages": [SYSTEM, *LONG, answer("response 3")]}
    [found], counts = imported(row, row, kind="demonstrations", max_chars=9 + 40, too_long="drop-turns")
    assert found["messages"] == [SYSTEM, *LONG[2:], answer("response 3")]
    assert (counts.shortened, counts.left_out) == (1, {"duplicate": 1})
    assert capsys.readouterr().out.splitlines()[-1] == "shortened 1 row by their oldest turns"


# Tokens of a dialogue are those that training sees: rendered, the longer answer's EOS included.
@pytest.mark.parametrize(("spare", "kept"), [(0, LONG), (-1, LONG[2:])])
def test_lengths_in_tokens_are_those_of_training(imported, tmp_path, spare, kept):
    directory = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(directory)
    whole = max(len(encode_dialogue(tokenizer, [*LONG, answer(LONG_PAIR[side])])[0]) for side in ("chosen", "rejected"))
    [row], counts = imported(LONG_PAIR, max_tokens=whole + spare, tokenizer=directory, too_long="drop-turns")
    assert (row["messages"], counts.shortened) == (kept, kept != LONG)


def test_rows_that_cannot_be_rendered_are_told(imported, tmp_path, capsys):
    directory = write_tokenizer(tmp_path / "tokenizer")
    [row], counts = imported(pair(0), pair(1, chosen="A </s> B"), max_tokens=100, tokenizer=directory)
    assert (row["chosen"], counts.left_out) == ("Duck 0.", {"no tokens": 1})
    assert (
        "source.jsonl line 2: no tokens: messages[1].content holds the special token '</s>'" in capsys.readouterr().err
    )


def test_dialogues_that_the_template_refuses_are_told(imported, tmp_path, capsys):
    directory = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(directory)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(directory)
    [row], counts = imported(pair(0), pair(1, prompt=[SYSTEM, *DIALOGUE]), max_tokens=100, tokenizer=directory)
    assert (row["chosen"], counts.left_out) == ("Duck 0.", {"no tokens": 1})
    assert "line 2: no tokens: the chat template cannot be rendered (no system role)" in capsys.readouterr().err


def test_a_limit_in_tokens_and_its_tokenizer_need_each_other(imported, tmp_path):
    with pytest.raises(UserError, match=r"--max-tokens 9: needs a tokenizer to count with; give --tokenizer DIR"):
        imported(pair(0), max_tokens=9)
    with pytest.raises(UserError, match=r"--tokenizer .*: has no limit to count for; give --max-tokens, or leave it"):
        imported(pair(0), tokenizer=tmp_path)
    with pytest.raises(UserError, match="no tokenizer can be read there"):
        imported(pair(0), max_tokens=9, tokenizer=tmp_path)


def test_long_prompts(imported):
    [found], _ = imported({"prompt": LONG}, kind="prompts", max_chars=30, too_long="drop-turns")
    assert found["messages"] == LONG[2:]


# --- the held-out part -----------------------------------------------------------------------------------------


def many_pairs():
    """60 openings, each with three comparisons and a dialogue that goes on."""
    rows = [pair(n, chosen=f"Duck {m}.") for m in range(3) for n in range(60)]
    return rows + [pair(n, prompt=[user(f"Name bird {n}."), answer("Why?"), user("So.")]) for n in range(60)]


def openings(rows):
    return {row["messages"][0]["content"] for row in rows}


def test_dialogues_that_begin_alike_stand_on_one_side(imported, tmp_path, capsys):
    train, counts = imported(*many_pairs(), held_out=0.3)
    rest = checked(tmp_path / "out.held_out.parquet")
    assert len(train) + len(rest) == counts.read == 240
    assert openings(train) & openings(rest) == set()
    assert len(train) == 4 * len(openings(train)) and len(rest) == 4 * len(openings(rest))
    assert 8 <= len(openings(rest)) <= 28  # 18 expected of 60, three deviations to each side
    assert f"wrote {len(rest)} rows of comparisons to {tmp_path / 'out.held_out.parquet'}" in capsys.readouterr().out


def test_dropped_turns_do_not_part_a_dialogue(imported, tmp_path):
    # All begin alike; the longer ones lose that beginning. By what is left they would part.
    longer = [
        [*LONG[:-1], user(f"question {n}"), answer("response"), user(f"another {m}")]
        for n in range(20)
        for m in range(2)
    ]
    rows = [pair(0, prompt=LONG[:1]), *[pair(n, prompt=prompt) for n, prompt in enumerate(longer)]]
    others = [pair(n, prompt=f"Name bird {n}.") for n in range(20)]
    train, counts = imported(*rows, *others, held_out=0.3, max_chars=40, too_long="drop-turns")
    rest = checked(tmp_path / "out.held_out.parquet")
    assert counts.shortened == len(longer)
    sides = [{"bird" not in row["messages"][0]["content"] for row in part} for part in (train, rest)]
    assert sides in ([{True, False}, {False}], [{False}, {True, False}])


def test_every_kind_of_table_is_split_alike(imported, tmp_path):
    sides = []
    for kind in ("comparisons", "demonstrations", "prompts"):
        train, _ = imported(*many_pairs(), kind=kind, held_out=0.3)
        sides.append((openings(train), openings(checked(tmp_path / "out.held_out.parquet", kind))))
    assert sides[0] == sides[1] == sides[2]


def test_training_can_hold_out_of_what_stays(imported):
    # As reward_pairs does. With the same hash, the rows it would hold out were all gone.
    train, _ = imported(*many_pairs(), held_out=0.3)
    again = [row for row in train if hash_share(str(row["messages"])) < 0.3]
    assert 0 < len(again) < len(train)


def test_a_split_that_leaves_nothing_is_refused(imported, tmp_path):
    with pytest.raises(UserError, match=r"--held-out 0\.5: leaves [01] rows and holds out [01], and both must"):
        imported(pair(0), held_out=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]


# --- sources and targets ---------------------------------------------------------------------------------------


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_an_import_says_the_same_each_time(tmp_path):
    source = write_lines(tmp_path / "source.jsonl", many_pairs())
    contents = []
    for _ in range(2):
        import_table([source], tmp_path / "out.parquet", kind="comparisons", held_out=0.3, overwrite=True)
        contents.append([(tmp_path / name).read_bytes() for name in ("out.parquet", "out.held_out.parquet")])
    assert contents[0] == contents[1]
    assert names(tmp_path) == ["out.held_out.parquet", "out.parquet", "source.jsonl"]


def test_compressed_lines_and_parquet_say_the_same(tmp_path):
    rows = [{"chosen": [*turns, answer("a")], "rejected": [*turns, answer("b")]} for turns in (DIALOGUE, LONG)]
    sources = [write_lines(tmp_path / "plain.jsonl", rows), write_lines(tmp_path / "zipped.jsonl.gz", rows)]
    sources.append(tmp_path / "table.parquet")
    pq.write_table(pa.Table.from_pylist(rows), sources[-1])
    tables = []
    for source in sources:
        import_table([source], tmp_path / "out.parquet", kind="comparisons", overwrite=True)
        tables.append(checked(tmp_path / "out.parquet"))
    assert tables[0] == tables[1] == tables[2]
    assert [len(row["messages"]) for row in tables[0]] == [3, 5]


def test_broken_rows_of_parquet_are_numbered_as_data_show_does(tmp_path, capsys):
    pq.write_table(pa.Table.from_pylist([pair(0), pair(1, chosen=None)]), tmp_path / "t.parquet")
    import_table([tmp_path / "t.parquet"], tmp_path / "out.parquet", kind="comparisons")
    assert capsys.readouterr().err.startswith(f"{tmp_path / 't.parquet'} row 1: missing key: 'chosen'")


def test_our_own_tables_can_be_imported(imported, tmp_path):
    first, _ = imported(pair(0), pair(1, annotator="ann", strength="better"))
    import_table([tmp_path / "out.parquet"], tmp_path / "again.parquet", kind="comparisons")
    assert checked(tmp_path / "again.parquet") == first
    import_table([tmp_path / "out.parquet"], tmp_path / "prompts.parquet", kind="prompts")
    prompts = checked(tmp_path / "prompts.parquet", "prompts")
    assert [row["prompt_id"] for row in prompts] == [row["prompt_id"] for row in first]


def test_a_directory_of_the_hub(tmp_path):
    pq.write_table(pa.Table.from_pylist([pair(1)]), (tmp_path / "b.parquet"))
    hub = tmp_path / "hub"
    write_lines(hub / "train.jsonl.gz", [pair(9)])
    for name, number in (("train-00000-of-00002", 0), ("train-00001-of-00002", 1), ("test-00000-of-00001", 2)):
        (hub / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([pair(number)]), hub / "data" / f"{name}.parquet")
    for name in ("README.md", ".hidden.jsonl"):
        (hub / name).write_text("no rows")
    target = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="hub: has the splits test, train, which must not be mixed; choose one with"):
        import_table([hub], target, kind="comparisons")
    with pytest.raises(UserError, match=r"--split trian: .* has no such split; did you mean train\?"):
        import_table([hub], target, kind="comparisons", split="trian")
    import_table([hub], target, kind="comparisons", split="train")
    assert [row["chosen"] for row in checked(target)] == ["Duck 0.", "Duck 1.", "Duck 9."]
    import_table([hub], target, kind="comparisons", split="test", overwrite=True)
    assert [row["chosen"] for row in checked(target)] == ["Duck 2."]


def test_subsets_of_a_split_are_told_apart(tmp_path):
    for name, number in (("train_prefs", 0), ("train_sft", 1)):
        pq.write_table(pa.Table.from_pylist([pair(number)]), tmp_path / f"{name}-00000-of-00001.parquet")
    target = tmp_path / "made" / "out.parquet"
    with pytest.raises(UserError, match="has the splits train_prefs, train_sft"):
        import_table([tmp_path], target, kind="comparisons", split=None)
    import_table([tmp_path], target, kind="comparisons", split="train_prefs")
    assert [row["chosen"] for row in checked(target)] == ["Duck 0."]


def test_several_sources_are_read_in_their_order(tmp_path):
    write_lines(tmp_path / "folder" / "a-2.jsonl", [pair(2)])
    write_lines(tmp_path / "folder" / "a-1.jsonl", [pair(1)])
    last = write_lines(tmp_path / "z.jsonl", [pair(0), pair(1)])
    counts = import_table([last, tmp_path / "folder"], tmp_path / "out.parquet", kind="comparisons")
    assert [row["chosen"] for row in checked(tmp_path / "out.parquet")] == ["Duck 0.", "Duck 1.", "Duck 2."]
    assert (counts.read, counts.left_out) == (4, {"duplicate": 1})


def test_sources_that_cannot_be_read(tmp_path):
    whole = write_lines(tmp_path / "whole.jsonl.gz", [pair(n) for n in range(500)]).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "broken.parquet").write_text("no table")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing", "no such file or directory"),
        ("rows.csv", r"must end in \.jsonl, \.jsonl\.gz, \.json, .*\.parquet; .* read_csv"),
        ("empty", "has no .jsonl, .jsonl.gz, .json, .json.gz, .parquet file"),
        ("cut.jsonl.gz", "cannot be read .*is it whole"),
        ("plain.jsonl.gz", "cannot be read .*is it whole"),
        ("broken.parquet", "cannot be read .*is it whole"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            import_table([tmp_path / name], tmp_path / "out.parquet", kind="comparisons")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not any("out" in name for name in names(tmp_path))


def test_targets_that_must_not_be_written(tmp_path, imported):
    first, _ = imported(pair(0))
    source, target, rest = (tmp_path / name for name in ("source.jsonl", "out.parquet", "out.held_out.parquet"))

    def refused(message, to=target, sources=(source,), **options):
        with pytest.raises(UserError, match=message):
            import_table(list(sources), to, kind="comparisons", **options)

    refused(r"out\.parquet exists; choose another target, or replace it with --overwrite")
    refused(r"must end in \.parquet", to=tmp_path / "out.csv")
    refused(r"out\.parquet is one of the sources", sources=(target,), overwrite=True)
    refused("cannot be written", to=source / "x.parquet")
    rest.write_text("an earlier one")
    refused(r"held_out\.parquet is there, and beside a table with all rows", overwrite=True)
    target.rename(tmp_path / "moved")
    refused(r"held_out\.parquet exists", held_out=0.5)
    (tmp_path / "moved").rename(target)
    refused(r"held_out\.parquet is one of the sources", sources=(source, rest), held_out=0.5, overwrite=True)
    assert checked(target) == first and rest.read_text() == "an earlier one"
    assert names(tmp_path) == ["out.held_out.parquet", "out.parquet", "source.jsonl"]


def test_a_failed_write_leaves_both_old_tables(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "source.jsonl", many_pairs())
    target = tmp_path / "out.parquet"
    import_table([source], target, kind="comparisons", held_out=0.3)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    written = []

    def failing(path, rows, schema):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.write_text("half")

    monkeypatch.setattr("rlhf_ray.data.importers.write_table", failing)
    with pytest.raises(UserError, match=r"cannot be written .*No space left"):
        import_table([source], target, kind="comparisons", held_out=0.5, overwrite=True)
    assert len(written) == 1
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    """The entry point in this process: (code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhf-ray", "data", "import", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_passes_its_options_on(call, tmp_path):
    source = write_lines(tmp_path / "in" / "train.jsonl", [*many_pairs(), LONG_PAIR, {**PAIR, "prompt": "?" * 99}])
    target = tmp_path / "out.parquet"
    options = ["--guideline", "safety", "--format", "auto", "--max-chars", 50, "--too-long", "drop-turns"]
    options += ["--held-out", "0.3", "--split", "train", "--overwrite"]
    code, out, err = call(source.parent, "--to", target, "--kind", "comparisons", *options)
    rows, rest = checked(target), checked(tmp_path / "out.held_out.parquet")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "read 242 rows of 1 file",
        f"wrote {len(rows)} rows of comparisons to {target}",
        f"wrote {len(rest)} rows of comparisons to {tmp_path / 'out.held_out.parquet'}",
        "left out 1 row: 1 too long",
        "shortened 1 row by their oldest turns",
    ]
    assert len(rows) + len(rest) == 241 and all(row["is_safety"] for row in rows + rest)


def test_bad_calls_end_with_one_line_and_code_2(call, tmp_path):
    source = write_lines(tmp_path / "source.jsonl", [pair(0)])
    good = write_lines(tmp_path / "good.jsonl", [pair(0)])
    broken = write_lines(tmp_path / "broken.jsonl", [pair(0, chosen=""), "{"])
    write_lines(tmp_path / "nothing.jsonl", [])
    target = tmp_path / "out.parquet"
    for arguments, message in (
        ([tmp_path / "missing", "--kind", "prompts"], "missing: no such file or directory"),
        ([source, "--kind", "prompt"], "'prompt' is not one of 'comparisons', 'demonstrations', 'prompts'"),
        ([source, "--kind", "prompts", "--format", "csv"], "'csv' is not one of 'auto', 'hh', 'messages', 'strings'"),
        ([source, "--kind", "prompts", "--held-out", "1"], "--held-out 1: must be at least 0 and less than 1"),
        ([source, "--kind", "prompts", "--split", "train"], "--split train: chooses among the files of a directory"),
        ([source, "--kind", "prompts", "--max-chars", "0"], "--max-chars"),
        ([source, "--kind", "demonstrations", "--guideline", "safety"], "demonstrations have no guideline"),
        ([source], "Missing option '--kind'"),
        ([tmp_path / "nothing.jsonl", "--kind", "prompts"], "0 of 0 rows can be written; nothing is written"),
    ):
        code, out, err = call(*arguments, "--to", target)
        assert (code, out) == (2, ""), arguments
        [line] = err.splitlines()
        assert line.startswith("error: ") and message in line
    code, out, err = call(broken, "--to", target, "--kind", "comparisons")
    assert (code, out, len(err.splitlines())) == (2, "", 3)
    assert err.splitlines()[-1] == (
        f"error: {target}: 0 of 2 rows can be written: left out 1 empty answer, 1 not JSON; nothing is written"
    )
    assert not target.exists()
    assert call(good, "--to", target, "--kind", "comparisons")[0] == 0
    assert call(good, "--to", target, "--kind", "comparisons")[0] == 2
    assert call(good, "--to", target, "--kind", "comparisons", "--overwrite")[0] == 0
