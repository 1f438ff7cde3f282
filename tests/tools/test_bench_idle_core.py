"""The clock of tools/bench/episodes.py: what computes takes its time, what sleeps is not waited for."""

import asyncio
import threading
import time

import pytest

from tools.bench.idle_core import IdleCoreLoop


def compute(seconds: float) -> None:
    """For so much processor time."""
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass


def test_sleeps_are_counted_and_not_slept_and_computing_delays_what_comes_behind():
    async def three() -> list[float]:
        clock = asyncio.get_running_loop().time
        begun, woken = clock(), []

        async def sleeper(seconds: float) -> None:
            await asyncio.sleep(seconds)
            woken.append(clock() - begun)
            compute(0.2)

        await asyncio.gather(sleeper(1000), sleeper(3000), sleeper(1000))
        return woken

    begun = time.monotonic()
    with asyncio.Runner(loop_factory=lambda: IdleCoreLoop(lambda: False)) as runner:
        woken = runner.run(three())
    assert time.monotonic() - begun < 500
    assert woken == pytest.approx([1000, 1000.2, 3000], abs=0.1)


def test_an_answer_that_another_process_owes_takes_no_time_and_no_later_sleep_ends_before_it():
    owed = True

    async def answered() -> tuple[float, bool]:
        loop = asyncio.get_running_loop()
        answer, tool = loop.create_future(), asyncio.ensure_future(asyncio.sleep(10))

        def give() -> None:
            nonlocal owed
            owed = False
            answer.set_result(None)

        begun = loop.time()
        threading.Timer(0.5, loop.call_soon_threadsafe, [give]).start()
        await answer
        seconds, slept = loop.time() - begun, tool.done()
        await tool
        return seconds, slept

    with asyncio.Runner(loop_factory=lambda: IdleCoreLoop(lambda: owed)) as runner:
        seconds, slept = runner.run(answered())
    assert seconds < 0.4 and not slept
