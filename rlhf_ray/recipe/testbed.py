"""The testbed's data, where a run has none of its own."""

from collections.abc import Mapping
from typing import Any

from rlhf_ray.recipe.context import Context
from rlhf_ray.recipe.stages import Artefact
from rlhf_ray.run_state import Step
from rlhf_ray.testbed.generate import TestbedSizes, write_testbed
from rlhf_ray.testbed.version import TESTBED_VERSION


def make_testbed(context: Context, step: Step, inputs: Mapping[str, Artefact]) -> dict[str, Any]:
    """Generates the tables."""
    section = context.config.testbed
    sizes = {name[len("num_") :]: size for name, size in section.model_dump().items() if name.startswith("num_")}
    write_testbed(step.begin(), seed=section.seed, sizes=TestbedSizes(**sizes), evaluate_on=section.evaluate_on)
    return {"testbed": TESTBED_VERSION}
