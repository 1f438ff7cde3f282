"""From the actor's shards to the engines: Hugging Face names, flattened buckets, no disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_pmd.errors import ModelError, PmdError
from megatron_pmd.weight_sync.bucket import SharedBucket, padded

if TYPE_CHECKING:  # importing Megatron takes seconds, and the launcher needs only shared_memory_key
    from megatron_pmd.actor.parallel import Control
    from megatron_pmd.config import RunConfig
    from megatron_pmd.rollout.fleet import Fleet


@dataclass(frozen=True)
class PushReport:
    tensors: int
    bytes: int
    buckets: int


def shared_memory_key(folder: Path) -> str:
    """Names a run's buckets: always the same for one run folder, so that a killed run's can be found."""
    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()


class WeightPush:
    """Two buckets in the machine's shared memory, written by the driver and read by all engines.

    While the engines load one bucket the next is gathered and filled; a bucket is filled again only after
    every engine has answered for it.
    """

    def __init__(self, config: RunConfig, control: Control, fleet: Fleet, run_key: str) -> None:
        self._control, self._fleet = control, fleet
        self._key, self._capacity = run_key, config.sync.bucket_megabytes * 2**20
        self._buckets: list[SharedBucket] = []
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-push")

    def push(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int) -> PushReport:
        """Send every tensor to every engine and confirm the version.

        Collective; the weights' memory must be resident.
        tensors: the same sequence of names and shapes on every rank; the driver's values are sent.
        Raises EngineError for a bucket that an engine refuses, StaleWeights for a version that it does not
        confirm.
        """
        self._fleet.on_leaders(lambda _: self._fleet.calls.begin_update())
        loading: list[Future[None] | None] = [None, None]
        count = total = sent = used = 0
        turn = 0
        for name, tensor in tensors:
            size = padded(tensor.nbytes)
            if size > self._capacity:
                raise ModelError(
                    f"tensor {name} has {tensor.nbytes} bytes: it does not fit a weight bucket of "
                    f"sync.bucket_megabytes={self._capacity // 2**20}; raise that to {-(-size // 2**20)}"
                )
            if used + size > self._capacity:
                loading[turn] = self._send(turn)
                sent, turn, used = sent + 1, 1 - turn, 0
            if not used:
                self._settle(loading[turn])
                self._clear(turn)
            if self._control.is_driver:
                self._buckets[turn].place(name, tensor)
            used += size
            count, total = count + 1, total + tensor.nbytes
        loading[turn] = self._send(turn)
        for future in loading:
            self._settle(future)
        self._fleet.on_leaders(lambda _: self._fleet.calls.end_update(version))
        return PushReport(tensors=count, bytes=total, buckets=sent + 1)

    def _clear(self, turn: int) -> None:
        """Make the bucket empty; the first time, make it."""
        if not self._control.is_driver:
            return
        if turn < len(self._buckets):
            self._buckets[turn].clear()
            return
        self._buckets.append(SharedBucket(f"{self._key}-{turn}", self._capacity))

    def _send(self, turn: int) -> Future[None] | None:
        """Describe the filled bucket to the leaders, whose engines begin to load it."""
        description = self._buckets[turn].description() if self._control.is_driver else None
        description = self._control.from_driver(description)
        if not self._fleet.leads:
            return None
        return self._loader.submit(self._fleet.calls.load_bucket, description)

    def _settle(self, loading: Future[None] | None) -> None:
        """Wait until every engine has answered for a bucket; then it may be filled again."""
        failure: PmdError | None = None
        if loading is not None:
            try:
                loading.result()
            except PmdError as error:
                failure = error
        for failed in self._control.all_gather(failure):
            if failed is not None:
                raise failed

    def close(self) -> None:
        """Remove the buckets from shared memory."""
        self._loader.shutdown(wait=False, cancel_futures=True)
        for bucket in self._buckets:
            bucket.close()
