"""Engines that decode, event by event: each runs so many requests at one time, the others wait in its queue.

All running requests of an engine gain tokens at one speed, which depends on how many they are. So an engine
needs one number, the tokens that any of them has gained so far, and a request ends when this reaches a mark.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence

from megatron_pmd.simulator.groups import Response


class _Engine:
    __slots__ = ("changes", "down", "gained", "queue", "running", "since")

    def __init__(self) -> None:
        self.gained = 0.0
        """Tokens that a request which always ran would have gained."""
        self.since = 0.0
        """Time at which `gained` held."""
        self.running: list[tuple[float, int, Response]] = []
        """A heap: what `gained` will be at the end of a request, its number, and it."""
        self.queue: deque[Response] = deque()
        self.changes = 0
        """Counts what made an earlier forecast of its next end void."""
        self.down = False


class Engines:
    """A fleet of equal engines behind a router that deals requests out in turn."""

    def __init__(self, count: int, step_seconds: Sequence[float]) -> None:
        """step_seconds: of one decoding step, by the number of running requests, from 1; it has one entry for
        each of an engine's slots."""
        self._engines = [_Engine() for _ in range(count)]
        self._step_seconds = (math.inf, *step_seconds)
        self._slots = len(step_seconds)
        self._forecasts: list[tuple[float, int, int]] = []
        """A heap: when an engine's next request ends, which engine, and its `changes` at the forecast."""
        self._numbers, self._turns = itertools.count(), itertools.cycle(range(count))
        self._unplaced: list[Response] = []
        """While no engine is up."""
        self._now = 0.0
        self.version, self.paused, self.open = 0, False, 0
        self.decoded = 0.0
        """Tokens."""
        self.working_seconds = 0.0
        """Of all engines, with at least one request running."""
        self.slot_seconds = 0.0
        """Of all slots that were in use."""

    def submit(self, now: float, responses: Iterable[Response]) -> None:
        """Deal out responses; each is decoded up to its goal."""
        touched = set()
        for response in responses:
            self.open += 1
            touched |= self._place(response)
        for number in touched:
            self._begin_waiting(number, now)

    def _place(self, response: Response) -> set[int]:
        for number in itertools.islice(self._turns, len(self._engines)):
            if not self._engines[number].down:
                self._engines[number].queue.append(response)
                return {number}
        self._unplaced.append(response)
        return set()

    def _begin_waiting(self, number: int, now: float) -> None:
        """Let requests of the queue into free slots, and forecast the engine's next end."""
        engine = self._engines[number]
        self._progress(engine, now)
        while engine.queue and len(engine.running) < self._slots and not self.paused:
            response = engine.queue.popleft()
            if response.done == 0:
                response.version = self.version
            end = engine.gained + response.goal - response.done
            heapq.heappush(engine.running, (end, next(self._numbers), response))
        engine.changes += 1
        if engine.running and not self.paused:
            left = (engine.running[0][0] - engine.gained) * self._step_seconds[len(engine.running)]
            heapq.heappush(self._forecasts, (now + left, number, engine.changes))

    def _progress(self, engine: _Engine, now: float) -> None:
        seconds, running = now - engine.since, len(engine.running)
        engine.since = now
        if running and not self.paused:
            gained = seconds / self._step_seconds[running]
            engine.gained += gained
            self.decoded += gained * running
            self.working_seconds += seconds
            self.slot_seconds += seconds * running

    @property
    def next_end(self) -> float:
        """When the next request ends; infinity if none runs."""
        while self._forecasts:
            when, number, changes = self._forecasts[0]
            if self._engines[number].changes == changes:
                return when
            heapq.heappop(self._forecasts)
        return math.inf

    def take_ended(self) -> list[Response]:
        """The requests that end at next_end, which is now; what waits takes their slots."""
        when, number, _ = heapq.heappop(self._forecasts)
        engine, ended = self._engines[number], []
        self._progress(engine, when)
        engine.gained = engine.running[0][0]  # but for rounding it is this already
        while engine.running and engine.running[0][0] <= engine.gained:
            _, _, response = heapq.heappop(engine.running)
            response.done = response.goal
            ended.append(response)
        self.open -= len(ended)
        self._begin_waiting(number, when)
        return ended

    def pause(self, now: float) -> None:
        """Nothing is decoded until resume(); what runs keeps its slot and its tokens."""
        for engine in self._engines:
            self._progress(engine, now)
        self.paused = True
        self._forecasts.clear()

    def resume(self, now: float, version: int) -> None:
        for engine in self._engines:
            self._progress(engine, now)
        self.paused, self.version = False, version
        for number in range(len(self._engines)):
            self._begin_waiting(number, now)

    def note_progress(self, now: float) -> None:
        """Enter in every running response what has been decoded of it."""
        for engine in self._engines:
            self._progress(engine, now)
            for end, _, response in engine.running:
                response.done = max(0.0, response.goal - (end - engine.gained))

    def stop(self, now: float) -> None:
        """End every request as it is; the responses keep what was decoded."""
        self.note_progress(now)
        for engine in self._engines:
            engine.running.clear()
            engine.queue.clear()
            engine.changes += 1
        self._unplaced.clear()
        self._forecasts.clear()
        self.open = 0

    def lose(self, number: int, now: float) -> float:
        """An engine fails: its requests begin anew on the others. Returns the tokens that are lost."""
        self.note_progress(now)
        engine = self._engines[number]
        running = [response for _, _, response in sorted(engine.running)]
        lost = sum(response.done for response in running)
        for response in running:
            response.done = 0.0
        homeless = [*running, *engine.queue]
        engine.running.clear()
        engine.queue.clear()
        engine.changes += 1
        engine.down = True
        self.open -= len(homeless)
        self.submit(now, homeless)
        return lost

    def mend(self, number: int, now: float) -> None:
        """A lost engine is there again, empty."""
        self._engines[number].down = False
        self._engines[number].since = now
        unplaced, self._unplaced = self._unplaced, []
        self.open -= len(unplaced)
        self.submit(now, unplaced)

    def is_down(self, number: int) -> bool:
        return self._engines[number].down

    def __len__(self) -> int:
        return len(self._engines)
