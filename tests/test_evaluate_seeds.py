"""Seeds side by side: pairing, interval and the rule of when a gain is claimed."""

import json
import math
import random
import statistics
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_ray.data.schemas import write_table
from rlhf_ray.errors import UserError
from rlhf_ray.evaluate.policies import ANSWERS
from rlhf_ray.evaluate.seeds import Gain, clustered_error, compare, last_model, print_comparison, suffixes


def _run(
    directory: Path,
    helpfulness: dict[str, list[float]],
    contents: str = "",
    kinds: str = "",
    *,
    controls: tuple[str, ...] = (),
) -> Path:
    """A run directory whose evaluation holds these scores per model, of prompts of these contents and kinds, a letter
    each; "u" is unsafe, "o" ordinary.
    """
    step = directory / "steps" / "evaluate-abc"
    step.mkdir(parents=True)
    machine = {"precision": "fp32", "device": "cpu", "cpu": "Some CPU (avx2, no bf16 units)"}
    (step / "evaluation.json").write_text(json.dumps({"machine": machine, "controls": controls}))
    rows = [
        {
            "prompt_id": f"p{number}",
            "kind": "unsafe" if kinds[number : number + 1] == "u" else "lookup",
            "content": contents[number : number + 1].strip(),
            "model": model,
            "prompt": "q",
            "is_safety": False,
            "answer": "a",
            "finished": True,
            "reward_helpfulness": 2 * score,
            "reward_safety": -score,
            "reward_combined": 2 * score,
            "reward_referee": None,
            "helpfulness": score,
            "violation": score > 0.5 if kinds else None,
            "false_refusal": None,
            "utility": None,
        }
        for model, scores in helpfulness.items()
        for number, score in enumerate(scores)
    ]
    write_table(step / "answers.parquet", rows, ANSWERS)
    return directory


def test_gain_and_interval_by_hand(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / "0", {"SFT": [0.0, 0.5, 0.5], "PPO": [0.5, 0.5, 1.0]}),  # gains 0.5, 0, 0.5
        _run(tmp_path / "1", {"SFT": [0.0, 0.0, 1.0], "PPO": [0.5, 0.0, 0.5]}),  # gains 0.5, 0, -0.5
    ]
    gain = compare(runs)["helpfulness"]
    # Of the seeds: 1/3 and 0. Mean 1/6; deviations 1/6 and -1/6; variance 2/36.
    assert gain.by_seed == pytest.approx([1 / 3, 0]) and gain.mean == pytest.approx(1 / 6)
    assert gain.interval == pytest.approx(12.706 * math.sqrt(2 / 36 / 2))
    # Of the prompts, over seeds: 0.5, 0, 0. Deviations 1/3, -1/6, -1/6; variance (1/9 + 1/36 + 1/36) / 2 = 1/12.
    assert gain.standard_error == pytest.approx(math.sqrt(1 / 12 / 3))
    assert compare(runs[:1])["helpfulness"].interval == math.inf
    assert gain.before == pytest.approx([1 / 3, 1 / 3]) and gain.after == pytest.approx([2 / 3, 1 / 3])
    assert gain.num_prompts == 3
    assert "violation" not in compare(runs)  # no prompt has it
    assert compare(runs)["reward_combined"].mean == pytest.approx(1 / 3)


def test_prompts_of_one_content_are_a_cluster_by_hand(tmp_path: Path) -> None:
    scores = {"SFT": [0.0] * 5, "PPO": [1.0, 0.5, 0.0, 0.0, 1.0]}
    gain = compare([_run(tmp_path / "0", scores, contents="aab  ")])["helpfulness"]
    # Mean 0.5, residuals 0.5, 0, -0.5, -0.5, 0.5. Of contents a and b, and of two prompts without one: 0.5, -0.5,
    # -0.5, 0.5, whose squares' sum is 1. Four clusters of five prompts: sqrt(4 / 3 x 1) / 5.
    assert gain.standard_error == pytest.approx(math.sqrt(4 / 3) / 5)
    assert gain.num_prompts == 5


def test_clustered_error_against_a_slow_reference() -> None:
    rng = random.Random(0)
    shift = [rng.gauss(0, 1) for _ in range(7)]
    clusters = [rng.randrange(7) for _ in range(60)]
    values = [shift[cluster] + rng.gauss(0, 0.3) for cluster in clusters]
    mean = sum(values) / 60
    # The variance of a sum is the sum of all covariances, and those between clusters are none.
    variance = sum(
        (values[i] - mean) * (values[j] - mean) for i in range(60) for j in range(60) if clusters[i] == clusters[j]
    )
    assert clustered_error(values, list(map(str, clusters))) == pytest.approx(math.sqrt(7 / 6 * variance) / 60)
    alone = clustered_error(values, list(map(str, range(60))))
    assert alone == pytest.approx(statistics.stdev(values) / math.sqrt(60))
    assert clustered_error(values, ["one"] * 60) == math.inf


def test_violations_are_told_over_all_and_over_unsafe_prompts(tmp_path: Path) -> None:
    gains = compare([_run(tmp_path / "0", {"SFT": [1.0, 1.0, 0.0, 1.0], "PPO": [0.0, 1.0, 0.0, 0.0]}, kinds="uuoo")])
    assert (gains["violation"].num_prompts, gains["violation_unsafe"].num_prompts) == (4, 2)
    assert gains["violation"].before == [0.75] and gains["violation"].after == [0.25]
    assert gains["violation_unsafe"].before == [1.0] and gains["violation_unsafe"].after == [0.5]


def test_answers_of_an_older_version_are_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "0", {"SFT": [0.0], "PPO": [1.0]})
    path = run / "steps" / "evaluate-abc" / "answers.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["content"]), path)
    with pytest.raises(UserError, match=r"answers.parquet has no column content: an older version wrote it"):
        compare([run])


def test_every_temperature_that_was_evaluated_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(
        tmp_path / "0",
        {f"{model}{how}": [0.5, 1.0] for how in (" own", " T=0.7", " greedy") for model in ("SFT", "PPO")},
    )
    assert suffixes(run, "PPO") == [" own", " T=0.7", " greedy"]
    print_comparison([run])
    told = capsys.readouterr().out
    assert "(clustered " in told and "by content) " in told
    assert "sampled at temperature 0.7" in told and "greedy" in told and "temperature 1" not in told
    assert told.startswith(f"{run}: fp32 on cpu, Some CPU (avx2, no bf16 units)\n")
    assert "PPO against SFT of 1 run(s), each sampled at its own temperature" in told
    assert told.count("no claim: not the truth") == 3  # the reward's rows
    with pytest.raises(UserError, match="no model 'long', only PPO, SFT"):
        print_comparison([run], against="long")


@pytest.mark.parametrize(
    ("after", "prompts", "expected"),
    [
        # Gains 0, 0.1, 0.1, 0.1, 0.2: mean 0.1, deviation 0.0707, interval 2.776 x 0.0707 / sqrt(5) = 0.0878.
        ([0.5, 0.6, 0.6, 0.6, 0.7], 500, "better"),
        ([0.48, 0.6, 0.6, 0.6, 0.72], 500, "no claim"),  # deviation 0.0849, interval 0.1053
        ([0.5, 0.6, 0.6, 0.6, 0.7], 499, "no claim: 499 prompts"),
        ([0.5, 0.4, 0.4, 0.4, 0.3], 500, "worse"),
        ([0.6, 0.6, 0.6, 0.6], 500, "no claim: 4 of 5 seeds"),
    ],
)
def test_rule(after: list[float], prompts: int, expected: str) -> None:
    gain = Gain(before=[0.5] * len(after), after=after, num_prompts=prompts, standard_error=0.1)
    assert gain.verdict(+1) == expected


def test_runs_of_other_prompts_are_refused(tmp_path: Path) -> None:
    runs = [_run(tmp_path / str(n), {"SFT": [0.0] * n, "PPO": [0.0] * n}) for n in (2, 3)]
    with pytest.raises(UserError, match="other prompts"):
        compare(runs)
    (tmp_path / "empty" / "steps").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished evaluation"):
        compare([tmp_path / "empty"])


def test_against_a_control(tmp_path: Path) -> None:
    scores = {"SFT": [0.0, 0.0], "PPO": [0.5, 1.0], "SFT long": [0.5, 0.5]}
    runs = [_run(tmp_path / "0", scores, controls=("SFT long",))]
    assert compare(runs, against="SFT long")["helpfulness"].mean == pytest.approx(0.25)  # gains 0 and 0.5
    with pytest.raises(UserError, match="no model 'SFT longer', only PPO, SFT, SFT long"):
        compare(runs, against="SFT longer")


def test_the_last_version_is_compared_unless_another_is_asked_for(tmp_path: Path, capsys) -> None:
    scores = {"SFT": [0.0], "V1": [0.25], "V2": [0.5], "V2 + PPO": [0.75], "longer": [1.0]}
    labels = {f"{model}{how}": values for how in ("", " greedy") for model, values in scores.items()}
    runs = [_run(tmp_path / "0", labels, controls=("longer",))]
    assert last_model(runs[0]) == "V2 + PPO"
    assert compare(runs, suffix=" greedy")["helpfulness"].mean == 0.75
    assert compare(runs, model="V1", against="V2")["helpfulness"].mean == -0.25
    print_comparison(runs, model="longer", against="V2 + PPO")
    assert "longer against V2 + PPO of 1 run(s), greedy" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no model 'V3', only SFT, V1, V2, V2 \+ PPO, longer"):
        print_comparison(runs, model="V3")
