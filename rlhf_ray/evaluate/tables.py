"""An evaluation.json as tables."""

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rlhf_ray.evaluate.win_rates import JUDGES, WinRates, decoding

COLUMNS = {
    "temperature": ("T", "g"),
    "true_helpfulness": ("true\nhelpfulness", ".3f"),
    "violation_rate": ("true\nviolations", ".3f"),
    "false_refusal_rate": ("false\nrefusals", ".3f"),
    "reward_combined": ("mean\nreward", ".3f"),
    "kl_per_sequence": ("KL to\nSFT", ".3f"),
    "response_tokens": ("tokens", ".1f"),
    "self_bleu": ("self-BLEU", ".3f"),
}
"""Figure -> its name and format in the table."""


def print_evaluation(path: Path) -> None:
    """Prints an evaluation.json as tables on stdout."""
    report = json.loads(path.read_text(encoding="utf-8"))
    title = f"{report['prompts']} held-out prompts"
    if report["testbed"]:
        title += f", testbed {report['testbed']}"
    screen = Console(width=110)
    screen.print(results_table(report["models"], title=title))
    if report.get("win_rates"):
        screen.print(wins_table(report["win_rates"]))


def results_table(results: Mapping[str, Mapping[str, float]], *, title: str) -> Table:
    """The models as rows, the figures that matter as columns."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in results.values())}
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for name, _ in columns.values():
        table.add_column(name, justify="right")
    for label, row in results.items():
        table.add_row(label, *(f"{row[key]:{form}}" if key in row else "-" for key, (_, form) in columns.items()))
    return table


def wins_table(win_rates: WinRates) -> Table:
    """How often each model beats the first one, which decodes alike; the judges as columns."""
    judges = [judge for judge in JUDGES if any(judge in found for found in win_rates.values())]
    first = next(iter(next(iter(next(iter(win_rates.values())).values()))))
    table = Table(title=f"wins against {first}, decoded alike, by judge; ties half")
    table.add_column("model", no_wrap=True)
    for judge in judges:
        table.add_column(judge, justify="right")
    for name, found in win_rates.items():
        models = list(next(iter(found.values())))
        for model in models[1:]:
            label = model if name == decoding("") else f"{model} {name}"
            table.add_row(label, *(f"{found[judge][model][first]:.3f}" if judge in found else "-" for judge in judges))
    return table
