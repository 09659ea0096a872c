"""`rlhf-ray bench`: how fast rollout, scoring, training, weight sync and PPO iterations are (docs/performance.md)."""
