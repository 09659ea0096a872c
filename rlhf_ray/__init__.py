"""rlhf_ray: the Llama 2-Chat recipe, from pretraining to PPO, on a Ray cluster.

Importing this package loads neither torch nor Ray, so that `--help` and the planner answer at once.
"""

__version__ = "0.1.0"
