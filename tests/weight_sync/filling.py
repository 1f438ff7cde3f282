"""Tensors in a bucket, as one rank alone would write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_pmd.weight_sync.bucket import Bucket
from megatron_pmd.weight_sync.bucket_layout import BucketLayout


def fill(bucket: Bucket, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write these tensors, and nothing else, into the bucket; what an engine is told of it."""
    layout = BucketLayout(bucket.capacity)
    for name, tensor in tensors.items():
        layout.add(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    bucket.begin(layout)
    for name, entry in layout.entries.items():
        bucket.tensor(entry).copy_(tensors[name])
    return bucket.description()
