"""A transport on whose way something happens to a bucket, or to who takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_pmd.weight_sync.bucket import Bucket
from megatron_pmd.weight_sync.transport import Transport

Fault = Callable[[Bucket, Sequence[dict[str, Any]]], object]


class FaultyTransport:
    """Another transport, but for one fault: before its `at_bucket`th bucket (from 1) is loaded, once."""

    def __init__(self, transport: Transport, fault: Fault, *, at_bucket: int) -> None:
        self._transport, self._fault, self._at_bucket = transport, fault, at_bucket
        self._buckets = 0
        self.read_by = transport.read_by
        self.begin = transport.begin
        self.end, self.close = transport.end, transport.close

    def load(self, bucket: Bucket | None, descriptions: Sequence[dict[str, Any]]) -> None:
        self._buckets += 1
        if self._buckets == self._at_bucket and bucket is not None:
            self._fault(bucket, descriptions)
        self._transport.load(bucket, descriptions)
