"""Drawing a rollout: thousands of requests in flight, graded as they come, ended when it is time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvloop

from megatron_pmd.config import Repetition, Rollout, RunConfig
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import PmdError, RequestRefused, RolloutError
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.stated_answer import THOUGHT
from megatron_pmd.rollout.agents.conversations import AgentEpisode
from megatron_pmd.rollout.agents.program import Agent
from megatron_pmd.rollout.agents.server import AgentServer
from megatron_pmd.rollout.episode import Episode, RolloutFunction, rollout_function, single_turn
from megatron_pmd.rollout.generate_client import Endpoint, GenerateClient, ResponseStopped
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.rollout.teacher import TeacherClient, endpoint_of
from megatron_pmd.rollout.trajectory import Trajectory
from megatron_pmd.rollout.turn_sampler import Sampling

DEADLINE, ENOUGH_GROUPS, INTERRUPTED = "deadline", "enough_groups", "interrupted"
"""Why responses are stopped all at once."""
INTERRUPTION_POLL_SECONDS = 0.5
OPENING_TOKENS = 8
"""At the end of a prompt: where a chat template begins a thought."""


OnSample = Callable[[Group], None]
"""Is told whose response is finished."""


class Grader(Protocol):
    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]: ...


@dataclass(frozen=True)
class Limits:
    """Where a response ends that does not end by itself."""

    max_response_tokens: int
    max_turns: int = 1
    repetition: Repetition | None = None


@dataclass(frozen=True)
class Sampler:
    """A run's client of the engines."""

    endpoint: Endpoint
    tokenizer: Any
    stop_tokens: list[int]
    limits: Limits
    grader: Grader
    teacher: Endpoint | None = None
    """Who scores the tokens of responses that are trained on; None: nobody."""
    routing_width: int = 0
    """Experts that a token goes to, over all layers: the engines are asked which. 0: they are not."""
    function: RolloutFunction | Agent = single_turn
    """What makes a response."""
    failed: float = 0.0
    """Reward of a response that could not be graded, of a problem without a reward of its own."""
    interrupted: Callable[[], bool] = lambda: False
    """Asked all the time; once true the rollout ends as it is, and the groups say what is lacking."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        endpoint: Endpoint,
        tokenizer: Any,
        grader: Grader,
        routing_width: int,
        *,
        interrupted: Callable[[], bool],
    ) -> Sampler:
        """As a run's configuration has it; routing_width: of its model, used where routing is replayed."""
        sampling, teacher = config.rollout, config.algorithm.teacher
        return cls(
            endpoint=endpoint,
            tokenizer=tokenizer,
            stop_tokens=stop_tokens(tokenizer, config.model.path),
            limits=Limits(config.batch.max_response_tokens, sampling.max_turns, sampling.repetition),
            grader=grader,
            teacher=endpoint_of(teacher) if teacher else None,
            routing_width=routing_width if config.actor.experts.replay_routing else 0,
            function=maker_of(sampling, tokenizer, config.batch.max_prompt_tokens),
            failed=config.reward.failed,
            interrupted=interrupted,
        )

    def worth_of_failure(self, problem: Problem) -> float:
        """Reward of a response to it that could not be graded, or begun in an evaluation."""
        return problem.reward.failed if problem.reward else self.failed

    def run(self, rollout: RolloutGroups, on_sample: OnSample = lambda _: None) -> None:
        """Draw and grade what the rollout still lacks; on_sample is called for each finished response.

        Raises EnginesLost when no engine is left (what is done is kept), EngineError when a request fails
        `retries` times on engines that are alive, StaleWeights when a sample came from other weights
        than the rollout's, RolloutError when the rollout function fails or the accounts do not add up.
        """
        # asyncio's own loop takes a fifth more processor time for thousands of connections
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self.draw(rollout, on_sample))

    async def draw(
        self,
        rollout: RolloutGroups,
        on_sample: OnSample = lambda _: None,
        newest_version: Callable[[], int] | None = None,
    ) -> None:
        """As run(), in a loop that may draw others beside it; an interruption then has to be that of all.

        newest_version: the weights that engines have been given by now; None: the rollout's all the time.
        """
        newest_version = newest_version or (lambda: rollout.settings.weight_version)
        budget = rollout.rules.partial.max_new_tokens if rollout.rules.partial else None
        await _Draw(self, rollout, on_sample, newest_version, budget).run()
        # all that is unfinished has used up its budget, and no optimizer step is full
        while not rollout.may_end and not self.interrupted():
            await _Draw(self, rollout, on_sample, newest_version, None).run()
        rollout.check()


def maker_of(settings: Rollout, tokenizer: Any, max_prompt_tokens: int) -> RolloutFunction | Agent:
    """What rollout.function or rollout.agent names. ConfigError if it cannot be loaded.

    max_prompt_tokens: of a trajectory of the agent.
    """
    if settings.agent is not None:
        return Agent.of(settings.agent, tokenizer, max_prompt_tokens)
    return rollout_function(settings.function)


class _Draw:
    """All open responses of a rollout at once, until they are finished, stopped, or over their budget."""

    def __init__(
        self,
        sampler: Sampler,
        rollout: RolloutGroups,
        on_sample: OnSample,
        newest_version: Callable[[], int],
        max_new_tokens: int | None,
    ) -> None:
        self._sampler, self._rollout, self._on_sample = sampler, rollout, on_sample
        self._sampling = Sampling(
            oldest_version=rollout.settings.weight_version,
            newest_version=newest_version,
            temperature=rollout.settings.temperature,
            top_p=rollout.settings.top_p,
            stop_tokens=sampler.stop_tokens,
            max_response_tokens=sampler.limits.max_response_tokens,
            max_turns=sampler.limits.max_turns,
            max_new_tokens=max_new_tokens,
            repetition=sampler.limits.repetition,
            routing_width=sampler.routing_width,
        )
        self._teacher: TeacherClient | None = None
        self._working = 0
        self._idle, self._enough, self._may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        async with AsyncExitStack() as opened:
            self._client = await opened.enter_async_context(GenerateClient(self._sampler.endpoint))
            teacher = self._sampler.teacher
            if teacher and self._rollout.settings.scored:
                self._teacher = await opened.enter_async_context(TeacherClient(teacher))
            if isinstance(self._sampler.function, Agent):
                # a program has two files here for its connection, and one at the engines for its request
                self._programs = asyncio.Semaphore(max(1, self._sampler.endpoint.slots // 2))
                self._server = await opened.enter_async_context(AgentServer())
            try:
                async with asyncio.TaskGroup() as self._tasks:
                    self._tasks.create_task(self._end())
                    await self._open_all()
            except* PmdError as failures:
                raise failures.exceptions[0] from None

    async def _open_all(self) -> None:
        self._working += 1  # opening is work: with it, nothing is idle
        for group in list(self._rollout.groups):
            self._open(group)
            # One turn of the loop sends what is opened so far; else the first request of thousands would
            # leave when the last one is prepared.
            await asyncio.sleep(0)
        self._working -= 1
        self._note_progress()

    def _open(self, group: Group) -> None:
        """Continue or begin a group's responses, one directly behind the other."""
        for member in group.members:
            if not member.finished:
                self._working += 1
                self._tasks.create_task(self._respond(group, member))

    async def _respond(self, group: Group, member: Trajectory) -> None:
        member.stopped, member.refused = None, False
        try:
            await self._finish(group, member)
        except ResponseStopped as stopped:
            member.stopped = str(stopped)
        except RequestRefused as refusal:
            self._rollout.refuse(member, str(refusal), self._sampler.worth_of_failure(group.problem))
        if member.finished:
            self._on_sample(group)
        if group.settled and (replacement := self._rollout.settled(group)):
            self._open(replacement)
        self._working -= 1
        if group.settled or not self._working:
            self._note_progress()

    def _note_progress(self) -> None:
        if not self._working:
            self._idle.set()
        if self._rollout.is_full or not self._working:
            self._enough.set()
        if self._rollout.may_end or not self._working:
            self._may_end.set()

    async def _end(self) -> None:
        """Stop what is still in flight: when there is enough, at the deadline, or when the run has to end."""
        ends = [asyncio.ensure_future(self._by_rules()), asyncio.ensure_future(self._by_interruption())]
        try:
            first, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        if not self._idle.is_set():
            reason = first.pop().result()
            if self._teacher:
                self._teacher.stop(reason)
            await self._client.stop(reason, self._idle)

    async def _by_rules(self) -> str:
        reason = DEADLINE
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rollout.seconds_left()):
                await self._enough.wait()
                reason = ENOUGH_GROUPS
        await self._may_end.wait()
        return reason

    async def _by_interruption(self) -> str:
        while not self._sampler.interrupted():
            await asyncio.sleep(INTERRUPTION_POLL_SECONDS)
        return INTERRUPTED

    async def _finish(self, group: Group, member: Trajectory) -> None:
        """The rest of one response, and its grade. ResponseStopped if it waits for a later iteration."""
        sampler, error = self._sampler, None
        if isinstance(sampler.function, Agent):
            graded, error = await self._by_agent(group, member, sampler.function)
            for part in member.branches:
                part.response = self._text(part)
            response = self._text(member)
        else:
            graded, response = await self._by_function(group, member, sampler.function)
            if sampler.function is single_turn and self._opens_thought(group.problem):
                graded = THOUGHT + graded  # a grader is to see a thought that was cut for what it is
        grading = None
        if error is None:
            grading = sampler.grader.submit(graded, group.problem, member.truncated)
        if self._teacher:
            prompt = len(group.problem.tokens)
            member.teacher_log_probs = await self._teacher.log_probs(member.tokens, prompt, group.key)
        verdict = Verdict(0.0, error)
        if grading:
            asked = asyncio.wrap_future(grading)
            # an agent's episode would begin anew for want of a grade
            agent = isinstance(sampler.function, Agent)
            verdict = await (asked if agent else self._client.unless_stopped(asked))
        worth = verdict.reward if verdict.error is None else sampler.worth_of_failure(group.problem)
        # the one place where a response becomes finished: an attempt that failed half-way leaves it open
        member.response, member.reward_error, member.reward = response, verdict.error, worth

    def _opens_thought(self, problem: Problem) -> bool:
        """Whether the chat template begins the response's thought, as some do of models that always think."""
        end: str = self._sampler.tokenizer.decode(list(problem.tokens[-OPENING_TOKENS:]))
        return end.rstrip().endswith(THOUGHT)

    async def _by_function(
        self, group: Group, member: Trajectory, function: RolloutFunction
    ) -> tuple[str, str]:
        """The text to be graded, and all of the response."""
        sampler = self._sampler
        episode = Episode(
            member, self._sampling, self._client, sampler.tokenizer, self._rollout.accounts, group.key
        )
        graded = await self._called(function, episode)
        episode.close()
        if not member.turns or not isinstance(graded, str):
            raise RolloutError(
                f"the rollout function made {len(member.turns)} turns and returned a "
                f"{type(graded).__name__} on problem {group.problem.index}: it must call generate() and "
                "return the text to be graded"
            )
        return graded, episode.response_text

    async def _by_agent(self, group: Group, member: Trajectory, agent: Agent) -> tuple[str, str | None]:
        """The text to be graded, or why there is none."""
        accounts, client = self._rollout.accounts, self._client
        async with self._programs:
            if client.stopping:
                raise ResponseStopped(client.stopping)
            episode = AgentEpisode(
                member, self._sampling, client, group.key, accounts, agent.reader, agent.max_prompt_tokens
            )
            with self._server.serving(episode) as address:
                graded, error = await agent.run(group.problem, episode, address, client)
        if episode.refusal is not None and not member.turns:
            raise episode.refusal
        agent.check(group.problem, bool(member.turns), graded, error)
        if error is not None:
            accounts.agents["failed"] += 1
        return graded or "", error

    def _text(self, trajectory: Trajectory) -> str:
        text: str = self._sampler.tokenizer.decode(trajectory.response_tokens, skip_special_tokens=True)
        return text

    async def _called(self, function: RolloutFunction, episode: Episode) -> Any:
        """What the rollout function returns. A request of it that failed is raised, whatever it did then."""
        failure: Exception | None
        try:
            graded, failure = await function(episode), None
        except Exception as error:
            graded, failure = None, error
        if episode.failure is not None:
            failure, what = episode.failure, "a request for it failed"
        else:
            what = "the rollout function failed"
        if failure is None:
            return graded
        if isinstance(failure, PmdError):
            raise failure
        raise RolloutError(
            f"{what}, on problem {episode.problem.index}: {type(failure).__name__}: {failure}"
        ) from failure


def stop_tokens(tokenizer: Any, model_path: str) -> list[int]:
    """Tokens that end a response: the tokenizer's own, and those of the model's generation_config.json."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops.update(listed if isinstance(listed, list) else [listed])
    return sorted(stop for stop in stops if stop is not None)
