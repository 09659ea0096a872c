"""Rejection sampling: which answers are chosen, and from which tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from rlhf_ray.config import Config, RejectionSamplingSection, config_with
from rlhf_ray.data.schemas import SAMPLES, join_tables, read_groups, read_table, write_table
from rlhf_ray.data.shares import part_of_round
from rlhf_ray.recipe import rejection_sampling as stage
from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.rejection_sampling import best_of_k_curve, best_temperature, by_prompt, powers, select
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.records import PromptBatch
from rlhf_ray.run_state import RunDir

SCORED_BY = {"helpfulness": "h", "safety": "s"}


def sample(prompt: str, number: int, *, helpfulness: float, safety: float = 3.0, **columns: Any) -> dict[str, Any]:
    is_safety = columns.get("is_safety", False)
    return {
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": f"say {prompt}"}],
        "is_safety": is_safety,
        "sample": number,
        "tokens": [7, number, 2],
        "text": f"{prompt} {number}",
        "finished": True,
        "model": "m",
        "temperature": 1.0,
        "helpfulness": helpfulness,
        "safety": safety,
        "combined": safety if is_safety or safety < -1.7346 else helpfulness,
        "scope": "v1",
        **columns,
    }


@pytest.fixture
def selected(tmp_path: Path) -> Any:
    """What `select` chooses from some tables, by name of the input."""

    def choose(settings: Mapping[str, object], **tables: list[dict[str, Any]]) -> list[tuple[str, int]]:
        config = config_with(Config(), {"run.device": "cpu", "run.precision": "fp32", "cluster.address": "local"})
        context = Context(config_with(config, settings), RunDir(tmp_path / "run"))
        step = context.run.step("select@v2", {"settings": dict(settings), "tables": str(tables)})
        inputs = {name: Artefact(name, tmp_path / name, key, name) for name, key in SCORED_BY.items()}
        for name, rows in tables.items():
            path = tmp_path / f"{name}.parquet"
            write_table(path, rows, SAMPLES)
            inputs[name.replace("_", ".")] = Artefact("samples", path, name, name, parents=SCORED_BY)
        facts = select(context, step, inputs)
        found = read_table(step.partial / "selections.parquet", SAMPLES).to_pylist()
        assert facts["selected"] == len(found)
        return [(row["text"], row["tokens"][1]) for row in found]

    return choose


def test_the_best_answer_of_each_prompt_is_chosen_and_keeps_its_tokens(selected: Any) -> None:
    rows = [
        *(sample("a", n, helpfulness=h, safety=s) for n, (h, s) in enumerate([(0.0, 3.0), (9.0, -4.0), (1.0, 3.0)])),
        *(sample("b", n, helpfulness=h, safety=s, is_safety=True) for n, (h, s) in enumerate([(5.0, 0.0), (0.0, 1.0)])),
    ]
    assert selected({}, samples=rows) == [("a 2", 2), ("b 1", 1)]
    assert selected({"select.per_prompt": 2}, samples=rows) == [("a 2", 2), ("a 0", 0), ("b 1", 1), ("b 0", 0)]


def test_answers_of_earlier_rounds_compete_with_those_of_this_one(selected: Any) -> None:
    now = [sample("a", 0, helpfulness=1.0, scope="v2"), sample("b", 1, helpfulness=1.0, scope="v2")]
    before = [sample("b", 2, helpfulness=2.0), sample("c", 3, helpfulness=-9.0)]
    assert selected({}, samples=now, samples_v1=before) == [("a 0", 0), ("b 2", 2), ("c 3", 3)]


def test_the_random_choice_looks_at_no_score_and_is_the_same_again(selected: Any) -> None:
    rows = [sample(f"p{p}", n, helpfulness=float(n)) for p in range(40) for n in range(4)]
    chosen = selected({"select.choice": "random"}, samples=rows)
    assert len(chosen) == 40 and {number for _, number in chosen} == {0, 1, 2, 3}
    assert chosen == selected({"select.choice": "random"}, samples=rows)
    assert {number for _, number in selected({}, samples=rows)} == {3}
    # Each of the eight answers to a prompt has the same chance, whichever round it is from: half are of either.
    now, before = (
        [sample(f"p{p}", n, helpfulness=0.0, scope=scope, text=scope) for p in range(200) for n in range(4)]
        for scope in ("v2", "v1")
    )
    chosen = selected({"select.choice": "random"}, samples=now, samples_v1=before)
    assert 80 < sum(text == "v1" for text, _ in chosen) < 120  # 200 draws: 100, and 7 a standard deviation


def test_the_curve_is_of_the_best_by_order_and_has_mean_and_median_beside_it() -> None:
    rows = [
        *(sample("a", n, helpfulness=h) for n, h in enumerate([1.0, 4.0, 3.0])),
        *(sample("b", n, helpfulness=h, safety=s) for n, (h, s) in enumerate([(8.0, -2.0), (-3.0, 5.0), (0.0, -9.0)])),
    ]
    curve = best_of_k_curve(by_prompt(iter([rows[:2], rows[2:]])), -1.7346)
    assert list(curve) == [1, 2, 3]
    # a: 4, 3, 1; b: -3 (the only one that looks safe), then -2 and -9.
    assert curve[3]["best"] == pytest.approx((4 - 3) / 2)
    assert curve[2]["best"] == pytest.approx(((4 + 4 + 3) / 3 + (-3 - 3 - 2) / 3) / 2)
    assert curve[1]["best"] == pytest.approx(curve[1]["mean"]) == pytest.approx((8 / 3 - 14 / 3) / 2)
    assert curve[3]["median"] == pytest.approx((3 - 3) / 2)


def test_answers_to_a_prompt_stay_together_across_groups() -> None:
    rows = [sample(prompt, 0, helpfulness=0.0) for prompt in "aabbbc"]
    found = [[row["prompt_id"] for row in part] for part in by_prompt(iter([rows[:3], rows[3:4], [], rows[4:]]))]
    assert found == [["a", "a"], ["b", "b", "b"], ["c"]]


def test_powers() -> None:
    assert [powers(limit) for limit in (1, 2, 3, 8, 20)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 16, 20]]


def test_the_temperature_is_that_of_the_best_of_k_not_of_the_best_answer() -> None:
    section = RejectionSamplingSection(temperatures=(0.5, 1.0, 1.5), samples_per_prompt=4, sweep_samples=8)
    sweep = {  # the more answers, the better does variety pay
        "0.5": {1: {"best": 3.0}, 2: {"best": 3.1}, 4: {"best": 3.2}, 8: {"best": 3.2}},
        "1": {1: {"best": 2.0}, 2: {"best": 3.0}, 4: {"best": 4.0}, 8: {"best": 4.5}},
        "1.5": {1: {"best": 0.0}, 2: {"best": 1.0}, 4: {"best": 3.0}, 8: {"best": 5.0}},
    }
    assert best_temperature(sweep, section) == 1.0
    assert best_temperature(sweep, section.model_copy(update={"samples_per_prompt": 1})) == 0.5
    assert best_temperature(sweep, section.model_copy(update={"samples_per_prompt": 100})) == 1.5
    assert best_temperature({}, section.model_copy(update={"temperatures": (0.7,)})) == 0.7


@pytest.fixture
def rejection_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the stage on ten prompts in groups of a size, and dies after so many groups; what it made of samples."""
    names = [f"p{number}" for number in range(10)]
    prompts = PromptBatch(
        ids=tuple(names),
        tokens=tuple([number] for number in range(10)),
        messages=tuple([{"role": "user", "content": name}] for name in names),
        is_safety=(False,) * 10,
    )
    for name in ("start_engines", "load_frozen", "collect"):
        monkeypatch.setattr(stage, name, lambda *args, **options: None)
    monkeypatch.setattr(stage, "read_prompts", lambda *args, **options: prompts)
    sampled: list[str] = []

    def run(group_size: int, *, dies_after: int | None = None) -> tuple[list[tuple[str, int]], list[str]]:
        def sample_groups(sampling: Any, groups: Any) -> Any:
            for number, group in enumerate(groups):
                if number == dies_after:
                    raise KeyboardInterrupt
                sampled.extend(group.ids)
                yield [sample(name, n, helpfulness=float(n)) for name in group.ids for n in range(sampling.samples)]

        monkeypatch.setattr(stage, "sample_groups", sample_groups)
        sampled.clear()
        settings = {"rejection_sampling.group_size": group_size, "rejection_sampling.temperatures": (0.9,)}
        settings |= {"run.device": "cpu", "run.precision": "fp32", "rejection_sampling.samples_per_prompt": 2}
        context = Context(config_with(Config(), settings), RunDir(tmp_path / "run"))
        context._roles = MagicMock()
        step = context.run.step("rejection-sample@v1", {})
        stage.rejection_sample(context, step, {"chat": Artefact("chat", tmp_path / "chat", "c", "sft")} | REST)
        rows = read_table(step.partial / "samples.parquet", SAMPLES).to_pylist()
        return [(row["prompt_id"], row["sample"]) for row in rows], list(sampled)

    return run


REST = {name: Artefact(name, Path(name), name, name) for name in ("tokenizer", "helpfulness", "safety")}
EVERY_SAMPLE = [(f"p{number}", n) for number in range(10) for n in range(2)]


def test_a_stopped_round_goes_on_behind_its_last_group(rejection_sampled: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        rejection_sampled(4, dies_after=1)
    rows, asked = rejection_sampled(4)
    assert rows == EVERY_SAMPLE and asked == [f"p{number}" for number in range(4, 10)]


def test_a_stopped_round_may_go_on_in_groups_of_another_size(rejection_sampled: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        rejection_sampled(4, dies_after=2)
    assert rejection_sampled(3)[0] == EVERY_SAMPLE


def test_rounds_take_the_next_rows_and_begin_again_at_the_end() -> None:
    rounds = [part_of_round(10, 4, number=number, seed=1) for number in range(5)]
    assert sorted(rounds[0] + rounds[1] + rounds[2][:2]) == list(range(10))
    assert rounds[2][2:] == rounds[0][:2] and rounds[0] != sorted(rounds[0])
    assert rounds == [part_of_round(10, 4, number=number, seed=1) for number in range(5)]
    assert part_of_round(10, 4, number=0, seed=2) != rounds[0]
    assert part_of_round(3, None, number=7, seed=0) == part_of_round(3, 5, number=1, seed=0) == [0, 1, 2]


def test_tables_are_joined_in_order_and_read_in_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"{name}.parquet" for name in "ab"]
    for place, part in enumerate(parts):
        write_table(part, [sample(f"{place}", n, helpfulness=1.0) for n in range(3)], SAMPLES)
    join_tables(parts, tmp_path / "all.parquet", SAMPLES)
    groups = list(read_groups(tmp_path / "all.parquet", SAMPLES, rows=4))
    assert [[(row["prompt_id"], row["sample"]) for row in group] for group in groups] == [
        [("0", 0), ("0", 1), ("0", 2), ("1", 0)],
        [("1", 1), ("1", 2)],
    ]
    assert read_table(tmp_path / "all.parquet", SAMPLES).num_rows == 6
