"""Writes the testbed's data sets as Parquet."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.schemas import CORPUS, DEMONSTRATIONS, PROMPTS, write_table
from rlhf_ray.errors import UserError
from rlhf_ray.testbed.corpus import write_document
from rlhf_ray.testbed.demonstrator import demonstrate
from rlhf_ray.testbed.tasks import ORDINARY_KINDS, TASKS, Prompt, draw_mixed

# Asking for more distinct texts than a split holds would otherwise search for ever.
_MAX_DRAWS_PER_PROMPT = 50
# Kinds that take turns: of the prompts of evaluation half are ordinary, a quarter unsafe, a quarter borderline.
_EVALUATION_TURNS = (("unsafe",), ("borderline",), ORDINARY_KINDS, ORDINARY_KINDS)


@dataclass(frozen=True, kw_only=True)
class TestbedSizes:
    """How many rows each file holds."""

    __test__ = False  # the name begins like a test class's

    corpus: int = 40_000
    demonstrations: int = 8_000
    prompts_train: int = 4_000
    prompts_early_stop: int = 200
    prompts_test: int = 600
    prompts_annotation: int = 4_000


def write_testbed(
    directory: Path | str, *, seed: int, sizes: TestbedSizes | None = None, evaluate_on: str = "test"
) -> None:
    """Write corpus, demonstrations and four sets of prompts.

    Files: corpus.parquet, demonstrations.parquet, prompts_train.parquet, prompts_annotation.parquet (prompts
    on which preferences are collected; of the train split, like demonstrations and corpus),
    prompts_early_stop.parquet and prompts_test.parquet (distinct texts; of the split `evaluate_on`). The world
    and its splits are fixed: the seed moves only which rows are drawn and how the demonstrator errs.

    Raises:
        UserError: a split holds fewer distinct prompts than asked for.
    """
    directory = Path(directory)
    sizes = sizes or TestbedSizes()
    directory.mkdir(parents=True, exist_ok=True)
    write_table(directory / "corpus.parquet", list(_corpus_rows(seed, sizes.corpus)), CORPUS)
    write_table(
        directory / "demonstrations.parquet",
        list(_demonstration_rows(seed, sizes.demonstrations)),
        DEMONSTRATIONS,
    )
    for table, split, size in (
        ("prompts_train", "train", sizes.prompts_train),
        ("prompts_annotation", "train", sizes.prompts_annotation),
        ("prompts_early_stop", "early_stop", sizes.prompts_early_stop),
        ("prompts_test", evaluate_on, sizes.prompts_test),
    ):
        # Each has its own stream: resizing one leaves the others alone. Ids tell development prompts from test ones.
        name = f"prompts_{evaluate_on}" if table == "prompts_test" else table
        rng = random.Random(f"{name}/{seed}")
        turns = _EVALUATION_TURNS if table == "prompts_test" else (tuple(TASKS),)
        prompts = _draw_prompts(split, size, rng, turns=turns, is_distinct=split != "train")
        if len(prompts) < size:
            raise UserError(
                f"{table}={size} is more than the {len(prompts)} distinct prompts found in the {split} split; "
                "ask for fewer"
            )
        rows = [prompt_row(prompt, f"{name}-{seed}-{index:05d}") for index, prompt in enumerate(prompts)]
        write_table(directory / f"{table}.parquet", rows, PROMPTS)


def prompt_row(prompt: Prompt, prompt_id: str) -> dict[str, Any]:
    """The prompt as a row of the PROMPTS schema."""
    return {
        "prompt_id": prompt_id,
        "messages": prompt.messages,
        "is_safety": prompt.is_safety,
        "kind": prompt.kind,
        "truth": json.dumps(prompt.truth, sort_keys=True),
    }


def _corpus_rows(seed: int, size: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"corpus/{seed}")
    for _ in range(size):
        yield {"text": write_document(rng)}


def _demonstration_rows(seed: int, size: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"demonstrations/{seed}")
    for _ in range(size):
        prompt = draw_mixed("train", rng)
        answer = {"role": "assistant", "content": demonstrate(prompt, rng)}
        yield {"messages": [*prompt.messages, answer], "kind": prompt.kind}


def _draw_prompts(
    split: str, size: int, rng: random.Random, *, turns: Sequence[Sequence[str]], is_distinct: bool
) -> list[Prompt]:
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for _ in range(_MAX_DRAWS_PER_PROMPT * size):
        if len(prompts) == size:
            break
        prompt = draw_mixed(split, rng, turns[len(prompts) % len(turns)])
        if is_distinct and prompt.text in seen:
            continue
        seen.add(prompt.text)
        prompts.append(prompt)
    return prompts
