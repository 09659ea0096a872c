"""The mathematics of the recipe as pure functions of tensors.

    masked    means over a mask, with a named denominator
    kl        the three estimators of the KL divergence per token
    gae       advantages and returns
    losses    policy, value and next-token losses, importance weights
    whiten    whitening with moments that can be merged over ranks
    ranking   the reward models' losses: margin ranking and auxiliary safety
    reward    two reward models combined, the score and the KL penalty per token

Nothing here knows of configs, files, processes or devices. Every loss returns `(loss, metrics)`: the
caller owns backward, reduction over ranks and logging. Every metric is a detached 0-dim float32 tensor
with the same denominator as its loss, so the metrics of micro-batches add up to those of the batch.

Letters in shape comments: B rows, T tokens of a row.
"""
