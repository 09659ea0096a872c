"""The weight channel: versioned buckets of parameters through Ray's object store.

Each bucket is one object, so that a sync is a handful of transfers, not one a parameter.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from rlhf_ray.records import WeightBucket

BUCKET_BYTES = 256 * 2**20


def fill_buckets(
    weights: Iterable[tuple[str, Tensor]], *, version: int, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[WeightBucket]:
    """Packs named parameters into buckets of about `bucket_bytes`, in order; a larger parameter has its own."""
    batch: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        if batch and size + num_bytes > bucket_bytes:
            yield _bucket(batch, version)
            batch, size = [], 0
        batch.append((name, tensor))
        size += num_bytes
    if batch:
        yield _bucket(batch, version)


def _bucket(batch: list[tuple[str, Tensor]], version: int) -> WeightBucket:
    flat = torch.cat([tensor.detach().reshape(-1).cpu() for _, tensor in batch])
    return WeightBucket(
        version=version,
        names=tuple(name for name, _ in batch),
        shapes=tuple(tuple(tensor.shape) for _, tensor in batch),
        dtype=flat.dtype,
        data=flat.view(torch.uint8).numpy(),
    )


def read_buckets(buckets: Iterable[WeightBucket]) -> Iterator[tuple[str, Tensor]]:
    """The named parameters of some buckets, as views of their buffers."""
    for bucket in buckets:
        start, buffer = 0, bucket.buffer
        for name, shape in zip(bucket.names, bucket.shapes, strict=True):
            size = torch.Size(shape).numel()
            yield name, buffer[start : start + size].view(shape)
            start += size
