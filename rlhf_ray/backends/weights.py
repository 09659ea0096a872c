"""The weight channel: versioned buckets of parameters through Ray's object store.

Each bucket is one object, so that a sync is a handful of transfers, not one a parameter.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rlhf_ray.records import WeightBucket, WeightVersion

BUCKET_BYTES = 256 * 2**20


def fill_buckets(
    weights: Iterable[tuple[str, Tensor]], *, version: WeightVersion, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[WeightBucket]:
    """Groups named parameters of one dtype into buckets of about `bucket_bytes`, in order; a larger one has its own.

    On CPU a bucket's arrays are the parameters' own memory: it is to be put into the store before they change.
    """
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if batch and (size + num_bytes > bucket_bytes or tensor.dtype != batch[0][1].dtype):
            yield _bucket(batch, version)
            batch, size = [], 0
        batch.append((name, tensor))
        size += num_bytes
    if batch:
        yield _bucket(batch, version)


def _bucket(batch: list[tuple[str, Tensor]], version: WeightVersion) -> WeightBucket:
    return WeightBucket(
        version=version,
        names=tuple(name for name, _ in batch),
        shapes=tuple(tuple(tensor.shape) for _, tensor in batch),
        dtype=batch[0][1].dtype,
        data=tuple(tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy() for _, tensor in batch),
    )
