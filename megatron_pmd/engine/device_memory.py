"""What an engine holds in memory, and whether what it says it released has reached the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_pmd.device import DeviceMemory, device_memory
from megatron_pmd.engine.control import EngineControl, Tag
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.subphases import SubphaseClock
from megatron_pmd.waiting import waiting_for

POLL_SECONDS = 0.05
SLACK = 0.05
"""Share of a promise that may be missing: allocators round, and keep a little."""


def wait_freed(
    measure: Callable[[], DeviceMemory],
    before: DeviceMemory,
    promised: int,
    *,
    what: str,
    deadline_seconds: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> DeviceMemory:
    """Wait until as much more is free as a release promised; returns what the device then holds.

    before    measured before the release
    promised  bytes
    what      engine and kind of memory, for the message
    Raises EngineError at the deadline, with both sides' memory.
    """
    limit = clock() + deadline_seconds
    # a process that is not the run's may take memory meanwhile, which looks as if the engine kept it
    with waiting_for(
        f"{promised / 1e9:.2f} GB that {what} has released to be free", deadline_seconds,
        remark="; is another process on the device?",
    ):  # fmt: skip
        while True:
            now = measure()
            freed = now.free - before.free
            if freed >= promised * (1 - SLACK):
                return now
            if clock() >= limit:
                raise EngineError(
                    f"{what}: {freed / 1e9:.2f} of {promised / 1e9:.2f} GB were freed {deadline_seconds:g} s "
                    f"after the release. The device has {now.total / 1e9:.2f} GB: the actor holds "
                    f"{now.actor / 1e9:.2f}, the engine and what else runs there {now.others / 1e9:.2f} "
                    f"({before.others / 1e9:.2f} before), {now.free / 1e9:.2f} are free"
                )
            sleep(POLL_SECONDS)


class EngineMemory:
    """Which kinds of memory an engine holds; on its leader, also over starts of the engine."""

    def __init__(self, clock: SubphaseClock, deadline_seconds: float) -> None:
        """clock: measures each kind. deadline_seconds: in which the device has what was released."""
        self._clock, self._deadline_seconds = clock, deadline_seconds
        self._resident: set[Tag] = set()
        self._taken: dict[Tag, int] = {}
        """Bytes that a kind of memory took of the device when it was last resumed."""

    def begin(self) -> None:
        """The engine has been started: it holds everything."""
        self._resident = {"kv_cache", "weights"}

    def release(self, calls: EngineControl, kinds: Sequence[Tag]) -> None:
        """Release what it holds of these kinds, one call each, and wait until the device has it back."""
        self._hand_over(calls, kinds, resident=False)

    def resume(self, calls: EngineControl, kinds: Sequence[Tag]) -> None:
        """Resume what it does not hold of these kinds, one call each."""
        self._hand_over(calls, kinds, resident=True)

    def _hand_over(self, calls: EngineControl, kinds: Sequence[Tag], *, resident: bool) -> None:
        for kind in kinds:
            if (kind in self._resident) == resident:
                continue  # an engine dies of being asked for what it has done already
            with self._clock(kind):
                before = None if calls.spec.cpu else device_memory()
                (calls.resume if resident else calls.release)([kind])
                if before is not None:
                    self._check(calls.spec.number, kind, before, resident=resident)
            self._resident ^= {kind}

    def _check(self, engine: int, kind: Tag, before: DeviceMemory, *, resident: bool) -> None:
        """A release has to give back what the last resume of this kind of memory took."""
        if resident:
            self._taken[kind] = before.free - device_memory().free
            return
        wait_freed(
            device_memory, before, self._taken.get(kind, 1), what=f"engine {engine}, {kind}",
            deadline_seconds=self._deadline_seconds,
        )  # fmt: skip
