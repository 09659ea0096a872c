"""How batches divide into minibatches, chunks and ranks."""

from collections.abc import Sequence

from rlhf_ray.config import Config
from rlhf_ray.errors import UserError


def check_batches(config: Config, running: Sequence[str]) -> None:
    """Batches divide into minibatches, chunks and ranks, and PPO has iterations in which the policy learns."""
    roles = config.roles
    values = {
        "pretrain.batch_size": config.pretrain.batch_size,
        "sft.batch_size": config.sft.batch_size,
        "ppo.batch_size": config.ppo.batch_size,
        "ppo.minibatch_size": config.ppo.minibatch_size,
        "ppo.num_chunks": config.ppo.num_chunks,
        "roles.policy.num_ranks": roles.policy.num_ranks,
        "roles.value.num_ranks": roles.value.num_ranks,
        "roles.rollout.num_engines": roles.rollout.num_engines,
    }
    rules = (
        ("pretrain.batch_size", "roles.policy.num_ranks"),
        ("sft.batch_size", "roles.policy.num_ranks"),
        ("ppo.batch_size", "ppo.minibatch_size"),
        ("ppo.batch_size", "ppo.num_chunks"),
        ("ppo.num_chunks", "roles.policy.num_ranks"),
        ("ppo.num_chunks", "roles.value.num_ranks"),
        ("ppo.num_chunks", "roles.rollout.num_engines"),
        ("ppo.minibatch_size", "roles.policy.num_ranks"),
        ("ppo.minibatch_size", "roles.value.num_ranks"),
    )
    for field, divisor in rules:
        value, by = values[field], values[divisor]
        if field.split(".")[0] in running and value % by:
            nearest = max(by, value // by * by)
            raise UserError(
                f"{field}={value} must be divisible by {divisor}={by}; change one of them, for example "
                f"{field}={nearest}"
            )
    if "ppo" in running and config.ppo.value_warmup_steps >= config.ppo.num_steps:
        raise UserError(
            f"ppo.value_warmup_steps={config.ppo.value_warmup_steps} must be less than ppo.num_steps="
            f"{config.ppo.num_steps}: the policy learns only after them; lower it, or raise ppo.num_steps"
        )
