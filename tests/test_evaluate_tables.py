"""What is printed at the end of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.evaluate.tables import print_evaluation

FIGURES = {
    "temperature": 0.7,
    "true_helpfulness": 0.5,
    "violation_rate": 0.25,
    "false_refusal_rate": 0.125,
    "reward_combined": -1.5,
    "kl_per_sequence": 2.5,
    "response_tokens": 20.25,
    "self_bleu": 0.375,
}


def printed(report: dict[str, Any], directory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the tables."""
    path = directory / "evaluation.json"
    path.write_text(json.dumps({"testbed": None, "prompts": 7, **report}))
    print_evaluation(path)
    return capsys.readouterr().out.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.mark.parametrize(
    ("testbed", "title"), [("abc123", "7 held-out prompts, testbed abc123"), (None, "7 held-out prompts")]
)
def test_the_table_names_the_testbed_only_where_it_judged(testbed, title, tmp_path: Path, capsys) -> None:
    lines = printed({"testbed": testbed, "models": {"SFT": {"reward_combined": 0.25}}}, tmp_path, capsys)
    assert " ".join("\n".join(lines).partition("┏")[0].split()) == title
    assert not any("wins" in line for line in lines)  # an older version's evaluation has none


def test_all_figures_of_versions_fit_and_a_figure_that_a_model_lacks_is_a_dash(tmp_path: Path, capsys) -> None:
    greedy = {key: value for key, value in FIGURES.items() if key not in ("kl_per_sequence", "self_bleu")}
    models = {"SFT own": FIGURES, "RLHF V5 + PPO greedy": {**greedy, "temperature": 0.0}}
    lines = printed({"models": models}, tmp_path, capsys)
    assert max(map(len, lines)) <= 110 and not any("…" in line for line in lines)
    rows = [cells(line) for line in lines if line.startswith("│")]
    assert rows == [
        ["SFT own", "0.7", "0.500", "0.250", "0.125", "-1.500", "2.500", "20.2", "0.375"],
        ["RLHF V5 + PPO greedy", "0", "0.500", "0.250", "0.125", "-1.500", "-", "20.2", "-"],
    ]


def test_wins_against_the_first_model_stand_in_a_table_of_their_own(tmp_path: Path, capsys) -> None:
    def matrix(share: float) -> dict[str, dict[str, float]]:
        return {"SFT": {"V1": 1 - share}, "V1": {"SFT": share}}

    wins = {"T=1": {"truth": matrix(0.75), "safety": matrix(0.5)}, "greedy": {"safety": matrix(0.25)}}
    lines = printed({"models": {"SFT": FIGURES}, "win_rates": wins}, tmp_path, capsys)
    start = next(place for place, line in enumerate(lines) if "wins against SFT" in line)
    assert [cells(line) for line in lines[start:] if line.startswith("│")] == [
        ["V1", "0.750", "0.500"],
        ["V1 greedy", "-", "0.250"],
    ]
