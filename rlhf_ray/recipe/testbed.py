"""The testbed as the first step of a run."""

from pathlib import Path

from rlhf_ray.recipe.context import Context
from rlhf_ray.run_state import code_version
from rlhf_ray.testbed.generate import TestbedSizes, write_testbed
from rlhf_ray.testbed.version import TESTBED_VERSION


def make_testbed(context: Context) -> Path:
    """Generates the data; returns the directory of Parquet files."""
    section = context.config.testbed
    # Not filed under run.seed: the seeds of a comparison share the test prompts.
    code = code_version("rlhf_ray.testbed", "rlhf_ray.data.schemas")
    step = context.run.step("testbed", {"config": section.model_dump(), "code": code})
    if not context.skip(step):
        sizes = {name.removeprefix("num_"): size for name, size in section.model_dump().items() if name != "seed"}
        write_testbed(step.begin(), seed=section.seed, sizes=TestbedSizes(**sizes))
        step.finish(version=TESTBED_VERSION)
    return step.path
