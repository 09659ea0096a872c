"""The written data: disjoint splits, learnable facts, determinism, sizes, the demonstrator's rates."""

import json
import random
import re

import pytest

from rlhf_ray.data.schemas import CORPUS, DEMONSTRATIONS, PROMPTS, check_rows, read_table
from rlhf_ray.errors import UserError
from rlhf_ray.recipe.tokenizer import train_tokenizer
from rlhf_ray.testbed import demonstrator, tasks, world
from rlhf_ray.testbed.corpus import spoil_answer
from rlhf_ray.testbed.generate import TestbedSizes, prompt_row, write_testbed
from rlhf_ray.testbed.judge import UNSAFE_WORDS, evaluate_answers, judge
from rlhf_ray.testbed.version import TESTBED_VERSION

PROMPT_FILES = ("prompts_train", "prompts_annotation", "prompts_early_stop", "prompts_test")
SIZES = TestbedSizes(
    corpus=6000,
    demonstrations=3000,
    prompts_train=2000,
    prompts_annotation=1000,
    prompts_early_stop=128,
    prompts_test=2000,
)
FEW = {"corpus": 1, "demonstrations": 1, "prompts_train": 1, "prompts_annotation": 1, "prompts_early_stop": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("testbed")
    write_testbed(path, seed=0, sizes=SIZES)
    return path


def read_prompts(directory, name):
    return read_table(directory / f"{name}.parquet", PROMPTS).to_pylist()


def content_of(row):
    # Look-ups and yes/no questions divide their contents alike.
    return (tasks.TASKS[row["kind"]].group, *json.loads(row["truth"])["content"])


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_splits_divide_every_kind(kind):
    parts = [set(tasks.contents(kind, split)) for split in tasks.SPLITS]
    assert all(parts)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == len(set(tasks.TASKS[kind].contents()))


def test_written_splits_share_no_content_and_no_text(directory):
    rows = {name: read_prompts(directory, name) for name in PROMPT_FILES}
    contents = {name: {content_of(row) for row in rows[name]} for name in rows}
    train = contents["prompts_train"] | contents["prompts_annotation"]
    assert not train & contents["prompts_test"]
    assert not train & contents["prompts_early_stop"]
    assert not contents["prompts_early_stop"] & contents["prompts_test"]

    test_texts = {row["messages"][0]["content"] for row in rows["prompts_test"]}
    demonstrations = read_table(directory / "demonstrations.parquet", DEMONSTRATIONS).to_pylist()
    asked = {row["messages"][0]["content"] for row in demonstrations}
    corpus = " ".join(read_table(directory / "corpus.parquet", CORPUS)["text"].to_pylist())
    asked |= set(re.findall(r"(?:ask|quiz): (.*?) say: ", corpus))
    assert len(asked) > 1000
    assert not asked & test_texts


@pytest.mark.parametrize("kind", [kind for kind in tasks.TASKS if kind != "unsafe"])
def test_spoilt_answers_are_worth_less_than_right_ones(kind):
    rng = random.Random(0)
    for _ in range(50):
        prompt = tasks.draw(kind, "train", rng)
        right = tasks.core_answer(prompt.truth, rng)
        wrong = spoil_answer(prompt, right, rng)
        scores = [judge(kind, json.dumps(prompt.truth), f"{answer}.", True).helpfulness for answer in (right, wrong)]
        assert scores[0] == pytest.approx(0.7) and scores[1] < 0.7
        # One word differs.
        assert sum(a != b for a, b in zip(re.findall(r"\w+", right), re.findall(r"\w+", wrong), strict=True)) == 1


def test_facts_of_held_out_questions_stand_in_the_corpus(directory):
    corpus = " ".join(read_table(directory / "corpus.parquet", CORPUS)["text"].to_pylist())
    for kind in ("lookup", "arithmetic", "borderline"):
        for row in read_prompts(directory, "prompts_test"):
            if row["kind"] == kind:
                assert json.loads(row["truth"])["full"] + "." in corpus
    for word, foreign in world.DICTIONARY.items():
        assert f"{word} in zorn is {foreign}." in corpus


def test_prompts_test_is_large_enough_to_measure_on(directory):
    rows = read_prompts(directory, "prompts_test")
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == 2000
    count = {kind: sum(row["kind"] == kind for row in rows) for kind in tasks.TASKS}
    for kind in ("unsafe", "borderline"):
        assert count[kind] == 500
        assert len({content_of(row) for row in rows if row["kind"] == kind}) >= 100
    assert min(count.values()) >= 10
    assert all(row["is_safety"] == (row["kind"] == "unsafe") for row in rows)


def test_rows_obey_the_schemas_rules(directory):
    for name in PROMPT_FILES:
        assert check_rows("prompts", read_table(directory / f"{name}.parquet", PROMPTS)) == []
    assert check_rows("demonstrations", read_table(directory / "demonstrations.parquet", DEMONSTRATIONS)) == []
    assert check_rows("corpus", read_table(directory / "corpus.parquet", CORPUS)) == []


def test_same_seed_same_files(tmp_path):
    sizes = TestbedSizes(
        corpus=50,
        demonstrations=50,
        prompts_train=50,
        prompts_early_stop=20,
        prompts_test=50,
        prompts_annotation=50,
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_testbed(tmp_path / name, seed=seed, sizes=sizes)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(f"{name}.parquet" for name in ("corpus", "demonstrations", *PROMPT_FILES))
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


@pytest.mark.parametrize(
    ("sizes", "evaluate_on", "message"),
    [
        ({"prompts_early_stop": 5000}, "test", r"prompts_early_stop=5000 .* the early_stop split"),
        # 42 contents in six forms are 252 unsafe prompts, and 4 x 252 = 1008.
        ({"prompts_test": 1200}, "development", r"prompts_test=1200 .* 1008 distinct .* the development split"),
    ],
)
def test_a_split_that_is_too_small_is_named(sizes, evaluate_on, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_testbed(tmp_path, seed=0, sizes=TestbedSizes(**FEW | sizes), evaluate_on=evaluate_on)


def test_development_prompts_stand_in_for_the_test_without_its_contents(directory, tmp_path):
    write_testbed(tmp_path, seed=0, sizes=TestbedSizes(**FEW, prompts_test=1000), evaluate_on="development")
    rows = read_prompts(tmp_path, "prompts_test")
    assert len({row["messages"][0]["content"] for row in rows}) == 1000
    assert sum(row["kind"] == "unsafe" for row in rows) == sum(row["kind"] == "borderline" for row in rows) == 250
    development = {content_of(row) for row in rows}
    for name in PROMPT_FILES:
        assert not development & {content_of(row) for row in read_prompts(directory, name)}
    test_ids = {row["prompt_id"] for row in read_prompts(directory, "prompts_test")}
    assert not test_ids & {row["prompt_id"] for row in rows}


def test_words_are_few_and_texts_short(directory):
    rows = [row for name in PROMPT_FILES for row in read_prompts(directory, name)]
    prompts = [row["messages"][0]["content"] for row in rows]
    ideals = [tasks.ideal_answer(json.loads(row["truth"])) for row in rows]
    demonstrations = read_table(directory / "demonstrations.parquet", DEMONSTRATIONS).to_pylist()
    answers = [row["messages"][-1]["content"] for row in demonstrations]
    corpus = read_table(directory / "corpus.parquet", CORPUS)["text"].to_pylist()
    assert len(set(re.findall("[a-z]+", " ".join(prompts + ideals + answers + corpus)))) <= 160
    # Words and punctuation marks, what a token at least is.
    assert max(len(re.findall(r"\w+|[^\w\s]", text)) for text in prompts) <= 40
    assert max(len(re.findall(r"\w+|[^\w\s]", text)) for text in ideals + answers) <= 24


def test_texts_are_short_in_tokens_of_a_small_vocabulary(directory):
    tokenizer = train_tokenizer(read_table(directory / "corpus.parquet", CORPUS)["text"].to_pylist(), vocab_size=512)

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    rows = read_prompts(directory, "prompts_test")
    assert max(count(row["messages"][0]["content"]) for row in rows) <= 40
    assert max(count(tasks.ideal_answer(json.loads(row["truth"]))) + 1 for row in rows) <= 24  # with EOS
    demonstrations = read_table(directory / "demonstrations.parquet", DEMONSTRATIONS).to_pylist()
    too_long = sum(count(row["messages"][-1]["content"]) + 1 > 24 for row in demonstrations)
    assert too_long / len(demonstrations) < 0.01


def test_ordinary_truths_hold_no_unsafe_word():
    rng = random.Random(0)
    for kind in tasks.TASKS:
        for _ in range(100):
            prompt = tasks.draw(kind, "train", rng)
            said = set(tasks.core_answer(prompt.truth).replace(",", "").split())
            assert bool(said & UNSAFE_WORDS) == (kind == "unsafe")


def test_deeds_look_alike_but_recipes_differ():
    unsafe = {content[2] for content in tasks.TASKS["unsafe"].contents()}
    harmless = {content[3] for content in tasks.TASKS["borderline"].contents() if content[0] == "deed"}
    assert unsafe == harmless
    assert len(set(world.RECIPES.values())) == len(world.RECIPES) == 60


def test_demonstrator_errs_at_its_rates():
    rng = random.Random(0)
    prompts = [tasks.draw_mixed("train", rng) for _ in range(4000)]
    rows = [prompt_row(prompt, str(index)) for index, prompt in enumerate(prompts)]
    answers = [demonstrator.demonstrate(prompt, rng) for prompt in prompts]
    result = evaluate_answers(rows, answers, [True] * len(rows))
    # Over the train contents' verbs; (0.6 + 0.5 + 0.4 + 0.3 + 0.15) / 5 = 0.39 if they were equally many.
    verbs = [content[0] for content in tasks.contents("unsafe", "train")]
    expected = sum(demonstrator.UNSAFE_COMPLIANCE[verb] for verb in verbs) / len(verbs)
    assert expected == pytest.approx(0.39, abs=0.03)
    # Four standard errors over about 1,000 are 0.063.
    assert result["violation_rate"] == pytest.approx(expected, abs=0.063)
    assert result["false_refusal_rate"] == pytest.approx(0.15, abs=0.06)
    assert 0.55 < result["true_helpfulness"] < 0.75
    answered = [a for p, a in zip(prompts, answers, strict=True) if p.kind in tasks.ORDINARY_KINDS]
    assert sum(a.startswith("sure:") for a in answered) / len(answered) == pytest.approx(0.5, abs=0.045)
    assert sum(a.endswith("thanks.") for a in answered) / len(answered) == pytest.approx(0.5, abs=0.045)
    insults = sum(not set(world.RUDE_WORDS).isdisjoint(re.findall("[a-z]+", a)) for a in answered)
    assert insults / len(answered) == pytest.approx(0.03, abs=0.015)


def test_wrong_content_is_seldom():
    rng = random.Random(0)
    prompts = [tasks.draw("lookup", "train", rng) for _ in range(2000)]
    wrong = sum(
        judge("lookup", json.dumps(prompt.truth), demonstrator.demonstrate(prompt, rng), True).helpfulness == 0
        for prompt in prompts
    )
    # 5% of the answers are another question's, of which a few (same fact, or same bare value) are right.
    assert wrong / len(prompts) == pytest.approx(0.05, abs=0.02)


def test_version_is_a_short_hash():
    assert re.fullmatch("[0-9a-f]{12}", TESTBED_VERSION)
