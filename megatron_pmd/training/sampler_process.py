"""The process that samples ahead: beside the driver, whose interpreter is then free to train.

It holds a Production, and does what the driver asks for over a pipe: `publish`, `take`, `draw`, `ahead`. The
driver asks for one thing at a time; an answer is its result, or the PmdError that it ended with.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import EngineError, PmdError, RolloutError, SamplerLost
from megatron_pmd.processes import allow_many_files, become_helper, connections_possible, quiet
from megatron_pmd.rollout.generate_client import Endpoint

if TYPE_CHECKING:
    from megatron_pmd.data.prompts import PromptOrder
    from megatron_pmd.rollout.groups import RolloutGroups
    from megatron_pmd.training.flow import Flow
    from megatron_pmd.training.production import Ahead, Production

TITLE = "megatron-pmd sampler"
"""What `ps` calls the process."""
POLL_SECONDS = 0.5
START_SECONDS = 300.0
"""For its imports, the tokenizer and the first reward worker; slow on a busy network file system."""
ENDING_SECONDS = 10.0
READY = "ready"
INTERRUPT = "interrupt"


@dataclass(frozen=True)
class Setup:
    """What the process is given at its start."""

    config: RunConfig
    prompts: PromptOrder
    ahead: Ahead
    folder: Path
    """Of the run."""
    newest_version: int
    """See Production."""


class SamplerProcess:
    """Seen from the driver. Every call waits for the process and passes the time with `meanwhile`."""

    def __init__(self, setup: Setup, meanwhile: Callable[[], bool]) -> None:
        """Starts it and returns at once; `wait_ready` says when it serves.

        meanwhile: called all the time while a call waits; once it is true, the drawing ends as it is.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._meanwhile, self._told = meanwhile, False
        self._process = context.Process(target=_main, args=(theirs, os.getpid(), setup), name=TITLE)
        self._process.start()
        theirs.close()
        self._owed = deque([READY])
        """Answers that are not taken yet, in their order."""

    def check_alive(self) -> None:
        """SamplerLost when the process has ended."""
        if not self._process.is_alive():
            raise self._lost()

    def wait_ready(self) -> None:
        """Until it has done all that it was told. Raises ConfigError for a reward that cannot be loaded."""
        while self._owed:
            self._answer(START_SECONDS)

    def publish(self, version: int, routing_width: int, endpoint: Endpoint, *, wait: bool = True) -> None:
        """See Production.publish. wait: False: returns at once; it does so as soon as it serves."""
        self._tell("publish", version, routing_width, endpoint)
        if wait:
            self.wait_ready()

    def take(self, iteration: int, seconds: float) -> tuple[RolloutGroups, Ahead, Flow]:
        """See Production.take; with what stands behind it then, without responses, and Production.flow."""
        taken: tuple[RolloutGroups, Ahead, Flow] = self._call("take", iteration, seconds=seconds)
        return taken

    def draw(self, rollout: RolloutGroups, seconds: float) -> RolloutGroups:
        """See Production.draw."""
        drawn: RolloutGroups = self._call("draw", rollout, seconds=seconds)
        return drawn

    def ahead(self) -> Ahead:
        """See Production.ahead; with responses."""
        ahead: Ahead = self._call("ahead", seconds=START_SECONDS)
        return ahead

    def close(self) -> None:
        """End it; never fails."""
        self._pipe.close()
        self._process.join(ENDING_SECONDS)
        self._process.kill()
        self._process.join()

    def _call(self, command: str, *words: Any, seconds: float) -> Any:
        self.wait_ready()
        self._tell(command, *words)
        return self._answer(seconds)

    def _tell(self, command: str, *words: Any) -> None:
        with suppress(OSError):  # one that has ended owes the answer, and gives none
            self._pipe.send((command, words))
        self._owed.append(command)

    def _answer(self, seconds: float) -> Any:
        """The next that it owes; SamplerLost when the process has ended, EngineError at the deadline."""
        end, command = time.monotonic() + seconds, self._owed[0]
        try:
            while not self._pipe.poll(POLL_SECONDS):
                if self._meanwhile() and not self._told:
                    self._told = True
                    self._pipe.send((INTERRUPT, ()))
                if time.monotonic() > end:
                    raise EngineError(f"process `{TITLE}` did not answer `{command}` within {seconds:g} s")
            result, failure = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        self._owed.popleft()
        if failure is not None:
            raise failure
        return result

    def _lost(self) -> SamplerLost:
        self._process.join(ENDING_SECONDS)
        return SamplerLost(
            f"the process `{TITLE}` ended with status {self._process.exitcode}: was it killed?"
        )


def _main(pipe: Connection, parent: int, setup: Setup) -> None:
    become_helper(TITLE, parent)
    quiet()
    allow_many_files()
    from megatron_pmd.data.tokenizer import load_tokenizer
    from megatron_pmd.rewards.grading import grading
    from megatron_pmd.rollout.group_journal import GroupJournal
    from megatron_pmd.training.production import Production

    config = setup.config
    with ExitStack() as opened:
        try:
            grader: Any = opened.enter_context(grading(config.reward, config.rewards))
            tokenizer = load_tokenizer(config.model)
            production = Production(
                config, setup.prompts, setup.ahead, tokenizer, grader,
                GroupJournal(setup.folder), setup.newest_version,
            )  # fmt: skip
        except PmdError as failure:
            pipe.send((None, failure))
            return
        pipe.send((None, None))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Service(pipe, production, config.rollout.staleness).serve())


class _Service:
    """The process's end of the pipe."""

    def __init__(self, pipe: Connection, production: Production, staleness: int) -> None:
        self._pipe, self._production, self._staleness = pipe, production, staleness
        self._closed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until the driver closes the pipe, or is gone."""
        # by a thread: to watch the pipe itself the loop would make it non-blocking, and cut long answers
        reading = threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True)
        reading.start()
        await self._closed.wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                command, words = self._pipe.recv()
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self._closed.set)
                return
            loop.call_soon_threadsafe(self._begin, command, words)

    def _begin(self, command: str, words: tuple[Any, ...]) -> None:
        if command == INTERRUPT:
            self._production.interrupt()
            return
        task = asyncio.create_task(self._do(command, words))
        self._tasks.add(task)  # the loop itself holds none
        task.add_done_callback(self._tasks.discard)

    async def _do(self, command: str, words: tuple[Any, ...]) -> None:
        result, failure = None, None
        try:
            result = await getattr(self, f"_{command}")(*words)
        except PmdError as error:
            failure = error
        except Exception as error:  # a fault of ours, or of a user's function: the driver is to end with it
            failure = RolloutError(
                f"the process `{TITLE}` failed in `{command}`: {type(error).__name__}: {error}\n"
                f"{traceback.format_exc()}"
            )
        self._pipe.send((result, failure))

    async def _publish(self, version: int, routing_width: int, endpoint: Endpoint) -> None:
        # as many rollouts are drawn at one time, and an evaluation
        at_once = max(1, connections_possible() // (self._staleness + 2))
        self._production.publish(version, routing_width, replace(endpoint, max_in_flight=at_once))

    async def _take(self, iteration: int) -> tuple[RolloutGroups, Ahead, Flow]:
        rollout = await self._production.take(iteration)
        return rollout, self._production.ahead(responses=False), self._production.flow()

    async def _draw(self, rollout: RolloutGroups) -> RolloutGroups:
        return await self._production.draw(rollout)

    async def _ahead(self) -> Ahead:
        self._production.flow()
        return self._production.ahead(responses=True)
