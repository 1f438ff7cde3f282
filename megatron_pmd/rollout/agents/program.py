"""The user's program: what it is given, and how a run of it ends."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

from megatron_pmd.config import AgentProgram
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError, RequestRefused, RolloutError
from megatron_pmd.plugins import load
from megatron_pmd.rollout.agents.conversations import AgentEpisode
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.protocol import MODEL
from megatron_pmd.rollout.agents.server import Address
from megatron_pmd.rollout.generate_client import GenerateClient, ResponseStopped

ENDING_SECONDS = 10.0
"""For what a program does when it is ended: close its files, its containers, its environment."""


@dataclass(frozen=True)
class AgentTask:
    """What a program is given."""

    problem: Problem
    base_url: str
    """Of an OpenAI-compatible endpoint that is this episode's alone."""
    api_key: str
    timeout_seconds: float
    """rollout.agent.timeout_seconds: the program is ended then."""
    model: str = MODEL


AgentFunction = Callable[[AgentTask], Awaitable[str]]


@dataclass(frozen=True)
class Agent:
    """The program that rollout.agent names, and how the model's words are read for it."""

    function: AgentFunction
    timeout_seconds: float
    reader: OutputReader
    max_prompt_tokens: int

    @classmethod
    def of(cls, settings: AgentProgram, tokenizer: Any, max_prompt_tokens: int) -> Self:
        """ConfigError if the program cannot be loaded."""
        return cls(
            function=load(settings.function, what="rollout.agent.function"),
            timeout_seconds=settings.timeout_seconds,
            reader=OutputReader(tokenizer, settings.tool_parser, settings.reasoning_parser),
            max_prompt_tokens=max_prompt_tokens,
        )

    async def run(
        self, problem: Problem, episode: AgentEpisode, address: Address, client: GenerateClient
    ) -> tuple[Any, str | None]:
        """(what the program returned, None), or (None, why its response is worth 0).

        A program that fails, or does not end in time, costs its own response, as a reward function does.
        Raises what ended one of its requests without its fault, and ResponseStopped when the rollout ends
        before it.
        """
        task = AgentTask(problem, address.base_url, address.api_key, self.timeout_seconds)
        program = asyncio.ensure_future(self._called(task))
        watched = [asyncio.ensure_future(episode.failed.wait()), asyncio.ensure_future(client.stopped.wait())]
        try:
            await asyncio.wait(
                [program, *watched], timeout=self.timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for waiting in watched:
                waiting.cancel()
            ended = program.done()
            if not ended:
                program.cancel()
                await asyncio.wait([program], timeout=ENDING_SECONDS)
            await episode.close()
        if isinstance(episode.failure, PmdError | ResponseStopped):
            raise episode.failure
        if episode.failure is not None:
            raise RolloutError(
                f"a request of the agent failed, on problem {problem.index}: "
                f"{type(episode.failure).__name__}: {episode.failure}"
            ) from episode.failure
        if not ended and client.stopping:
            raise ResponseStopped(client.stopping)
        if not ended:
            return None, f"the agent had not ended after {self.timeout_seconds:g} s"
        failure = asyncio.CancelledError() if program.cancelled() else program.exception()
        if isinstance(failure, PmdError):
            raise failure
        if failure is not None:
            return None, f"the agent failed: {type(failure).__name__}: {failure}"
        return program.result(), None

    async def _called(self, task: AgentTask) -> Any:
        """What the function returns. ConfigError for one that is not `async`: it would hold up all others."""
        answer = self.function(task)
        if not inspect.isawaitable(answer):
            raise ConfigError(
                f"rollout.agent.function returned a {type(answer).__name__} at once: make it `async def`, "
                "and await what it asks the model"
            )
        return await answer

    def check(self, problem: Problem, asked: bool, graded: Any, error: str | None) -> None:
        """What run() gave, of a program that got an answer of the model or did not.

        RequestRefused where it failed without one: there is nothing to train on. RolloutError for a program
        that did not ask the model, or returned what cannot be graded.
        """
        if error is not None and not asked:
            raise RequestRefused(error)
        if error is None and not asked:
            raise RolloutError(
                f"the agent got no answer of the model on problem {problem.index}: it must ask task.base_url"
            )
        if error is None and not isinstance(graded, str):
            raise RolloutError(
                f"the agent returned a {type(graded).__name__} on problem {problem.index}: it must return "
                "the text to be graded"
            )
