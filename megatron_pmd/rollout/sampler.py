"""Drawing samples: thousands of requests in flight through the router, graded as they come back."""

from __future__ import annotations

import asyncio
import base64
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import numpy as np

from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import sample_seed
from megatron_pmd.errors import EngineError, StaleWeights
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rollout.samples import Sample

RETRY_PAUSE_SECONDS = 1.0
"""Before the first repetition of a request; doubled for each further one."""


class EnginesLost(EngineError):
    """No engine answers any more; what was sampled before is kept and the rest can be asked for again."""


class Grader(Protocol):
    def submit(self, response: str, problem: Problem) -> Future[Verdict]: ...


@dataclass
class SamplingPlan:
    """What to draw, and what has been drawn so far; survives the loss of engines."""

    problems: list[Problem]
    samples_per_prompt: int
    iteration: int
    weight_version: int
    temperature: float
    top_p: float
    run_seed: int
    stream: str = "train"
    """Separates the seeds of training and evaluation."""
    done: dict[tuple[int, int], Sample] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return len(self.problems) * self.samples_per_prompt

    @property
    def pending(self) -> list[tuple[int, int]]:
        """Missing samples; those of one prompt stand together, so that an engine can share their prefix."""
        everything = ((g, n) for g in range(len(self.problems)) for n in range(self.samples_per_prompt))
        return [key for key in everything if key not in self.done]

    @property
    def samples(self) -> list[Sample]:
        return [self.done[key] for key in sorted(self.done)]


@dataclass(frozen=True)
class Sampler:
    """The driver's client of the engines."""

    router_url: str
    headers: dict[str, str]
    tokenizer: Any
    stop_tokens: list[int]
    max_response_tokens: int
    request_timeout_seconds: float
    retries: int
    grader: Grader
    any_engine_alive: Callable[[], bool]
    record_routing: bool = False
    """Ask which experts each token went to."""
    max_in_flight: int | None = None
    """Requests sent at one time; their deadline runs only then. None: all at once."""

    def run(self, plan: SamplingPlan, on_sample: Callable[[], None] = lambda: None) -> None:
        """Draw and grade what the plan still lacks.

        Raises EnginesLost when no engine is left (the plan keeps what is done), EngineError when a request
        fails `retries` times on engines that are alive, StaleWeights when a sample came from other weights
        than the plan's.
        """
        asyncio.run(self._run(plan, on_sample))

    async def _run(self, plan: SamplingPlan, on_sample: Callable[[], None]) -> None:
        timeout = aiohttp.ClientTimeout(total=self.request_timeout_seconds)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers=self.headers
        ) as session:
            most = self.max_in_flight or max(1, plan.total)
            transport = _Transport(session, self.router_url + "/generate", self, most)
            try:
                async with asyncio.TaskGroup() as group:
                    for key in plan.pending:
                        group.create_task(self._sample(transport, plan, key, on_sample))
            except* EngineError as failures:
                raise failures.exceptions[0] from None
            except* StaleWeights as failures:
                raise failures.exceptions[0] from None

    async def _sample(
        self, transport: _Transport, plan: SamplingPlan, key: tuple[int, int], on_sample: Callable[[], None]
    ) -> None:
        group, number = key
        problem = plan.problems[group]
        seed = sample_seed(plan.run_seed, plan.iteration, group, number, plan.stream)
        answer = await transport.generate(self._request(plan, problem, seed))
        information = answer["meta_info"]
        # not a number while an engine holds a mixture of two versions
        version = information["weight_version"]
        if version != str(plan.weight_version):
            raise StaleWeights(f"a sample came from weight version {version}, expected {plan.weight_version}")
        tokens = answer["output_ids"]
        response = self.tokenizer.decode(tokens, skip_special_tokens=True)
        verdict = await asyncio.wrap_future(self.grader.submit(response, problem))
        # the one place where a sample is recorded: an attempt that failed half-way leaves nothing behind
        plan.done[key] = Sample(
            group=group,
            number=number,
            problem=problem.index,
            prompt=self.tokenizer.decode(problem.tokens),
            response=response,
            answer=problem.answer,
            prompt_tokens=list(problem.tokens),
            response_tokens=tokens,
            engine_log_probs=[entry[0] for entry in information["output_token_logprobs"]],
            finish_reason=information["finish_reason"]["type"],
            weight_version=plan.weight_version,
            seed=seed,
            reward=verdict.reward,
            reward_error=verdict.error,
            routed_experts=_routed_experts(information),
        )
        on_sample()

    def _request(self, plan: SamplingPlan, problem: Problem, seed: int) -> dict[str, Any]:
        return {
            "input_ids": list(problem.tokens),
            "sampling_params": {
                "max_new_tokens": min(problem.token_budget or math.inf, self.max_response_tokens),
                "temperature": plan.temperature,
                "top_p": plan.top_p,
                "stop_token_ids": self.stop_tokens,
                "sampling_seed": seed,
            },
            "return_logprob": True,
            "return_routed_experts": self.record_routing,
        }


def _routed_experts(information: dict[str, Any]) -> bytes | None:
    """From SGLang's base64 of int32 [prompt + response − 1, layers, top-k] to Sample's bytes."""
    encoded = information.get("routed_experts")
    if encoded is None:
        return None
    return np.frombuffer(base64.b64decode(encoded), np.int32).astype(np.uint16).tobytes()


class _Transport:
    """One rollout's requests to the engines: how many at a time, and again where an engine failed one."""

    def __init__(self, session: aiohttp.ClientSession, url: str, sampler: Sampler, most: int) -> None:
        self._session, self._url = session, url
        self._retries, self._ask = sampler.retries, sampler.any_engine_alive
        self._slots, self._asking = asyncio.Semaphore(most), asyncio.Lock()
        self._asked, self._alive = -RETRY_PAUSE_SECONDS, True

    async def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises EnginesLost or EngineError, see Sampler.run."""
        failure = ""
        for attempt in range(self._retries + 1):
            try:
                async with self._slots, self._session.post(self._url, json=request) as reply:
                    if reply.status == 200:
                        answer = await reply.json()
                        if answer["meta_info"]["finish_reason"]["type"] in ("stop", "length"):
                            return answer
                        failure = f"finish reason {answer['meta_info']['finish_reason']}"
                    elif reply.status == 400:
                        raise EngineError(f"the engine refuses a request: {(await reply.text())[:500]}")
                    else:
                        failure = f"HTTP {reply.status}: {(await reply.text())[:200]}"
            except (aiohttp.ClientError, TimeoutError) as error:
                failure = f"{type(error).__name__}: {error}"
            await asyncio.sleep(RETRY_PAUSE_SECONDS * 2**attempt)
            if not await self._any_alive():
                raise EnginesLost(f"no engine answers any more; last failure: {failure}")
        raise EngineError(f"a request failed {self._retries + 1} times; last failure: {failure}")

    async def _any_alive(self) -> bool:
        """Asked once for all requests that fail together."""
        async with self._asking:
            if time.monotonic() - self._asked >= RETRY_PAUSE_SECONDS:
                self._alive = await asyncio.to_thread(self._ask)
                self._asked = time.monotonic()
            return self._alive


def stop_tokens(tokenizer: Any, model_path: str) -> list[int]:
    """Tokens that end a response: the tokenizer's own, and those of the model's generation_config.json."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    if (Path(model_path) / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(model_path).eos_token_id
        stops.update(listed if isinstance(listed, list) else [listed])
    return sorted(stop for stop in stops if stop is not None)
