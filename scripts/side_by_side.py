"""Prints answers of a finished run by its SFT model and its last one as Markdown, unedited.

    python scripts/side_by_side.py RUN PROMPTS [--count 10] [--temperature 1]

RUN is the run's directory, PROMPTS the table of its test prompts. Half of the prompts shown are those tagged as safety,
and of each kind the first in the order of their ids, which are hashes: nobody chose them. The temperature is one of
`evaluate.temperatures`.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from rlhf_ray.data.schemas import PROMPTS, read_table
from rlhf_ray.evaluate.policies import temperature_suffix
from rlhf_ray.evaluate.seeds import find_answers, last_model


def quoted(text: str) -> str:
    """A text as it is, indented as a block of code."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def main() -> None:
    """Prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    suffix = temperature_suffix(options.temperature)
    rows = pq.read_table(find_answers(options.run)).to_pylist()
    answers = {(row["prompt_id"], row["model"]): row for row in rows}
    models = {"SFT": "Before", last_model(options.run): "After"}
    if not any(row["model"] == "SFT" + suffix for row in rows):
        raise SystemExit(
            f"error: {options.run}: was not evaluated at --temperature {options.temperature:g}; give one of its "
            f"evaluate.temperatures"
        )
    prompts = sorted(read_table(options.prompts, PROMPTS).to_pylist(), key=lambda row: row["prompt_id"])
    half = options.count // 2
    shown = [row for row in prompts if not row["is_safety"]][: options.count - half]
    shown += [row for row in prompts if row["is_safety"]][:half]
    for number, prompt in enumerate(shown, start=1):
        print(f"### {number}. {'safety' if prompt['is_safety'] else 'helpfulness'}\n")
        earlier = len(prompt["messages"]) - 1
        print(f"Prompt{f' (after {earlier} earlier messages)' if earlier else ''}:\n")
        print(quoted(prompt["messages"][-1]["content"]))
        for model, title in models.items():
            row = answers[prompt["prompt_id"], model + suffix]
            print(f"\n{title}{'' if row['finished'] else ' (cut at the length limit)'}:\n")
            print(quoted(row["answer"]))
        print()


if __name__ == "__main__":
    main()
