"""What the driver adds to 4,096 episodes in flight, of 8 turns with slow tools between them.

    python -m tools.bench.episodes                     # a rollout function, whose tools wait in the driver
    python -m tools.bench.episodes --program aiohttp   # an agent on the endpoint, with a plain client
    python -m tools.bench.episodes --program openai --episodes 256

The engine is a stub in a process of its own (tools/bench/stub_engine.py), which answers at once. Programs and
endpoint are in this one, as in a run. Time is that of a core of its own (tools/bench/idle_core.py), so that
the machine may be busy; `--clock wall` is for one on which nothing else runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import aiohttp
import typer
import uvloop
from openai import AsyncOpenAI

from megatron_pmd.data.problems import Problem
from megatron_pmd.processes import allow_many_files
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.program import Agent, AgentTask
from megatron_pmd.rollout.episode import Episode, RolloutFunction
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.sampler import Limits
from recipes.tiny_moe_cpu import make_tokenizer
from tools.bench.idle_core import IdleCoreLoop
from tools.bench.rollout import sampler, settings_of, stub

TURNS = 8
ENGINE = {"median_tokens": 100, "sigma": 0.75, "tokens_per_second": 1e9, "whole_turns": True}
TOOL_SECONDS, TOOL_SIGMA = 10.0, 0.75
"""Median of a tool's latency, and sigma of its logarithm."""
RESULT = "result " * 8
TEMPLATE = (
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_TOKENS = 1 << 15


def latencies(episode: int) -> list[float]:
    """Of the tools between the turns, in seconds."""
    draws = random.Random(episode)
    return [TOOL_SECONDS * draws.lognormvariate(0.0, TOOL_SIGMA) for _ in range(TURNS - 1)]


class Programs:
    """Each asks, waits for a tool, and asks again."""

    def __init__(self) -> None:
        self.asking = 0
        """Programs that wait for an answer of the engine, and not for a tool."""

    async def function(self, episode: Episode) -> str:
        """A rollout function."""
        answer = await self._asked(episode.generate)
        for seconds in latencies(episode.problem.index):
            await episode.insert_message("user", partial(_tool, seconds))
            answer = await self._asked(episode.generate)
        return answer.text

    async def aiohttp(self, task: AgentTask) -> str:
        """An agent with a client that does no more than it has to."""
        messages: list[Any] = [dict(message) for message in task.problem.messages]
        headers = {"Authorization": f"Bearer {task.api_key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(None)) as session:

            async def ask() -> str:
                body = {"model": task.model, "messages": messages}
                async with session.post(f"{task.base_url}/chat/completions", json=body) as reply:
                    return (await reply.json())["choices"][0]["message"]["content"] or ""

            return await self._talk(task.problem.index, messages, ask)

    async def openai(self, task: AgentTask) -> str:
        """An agent with OpenAI's own client."""
        messages: list[Any] = [dict(message) for message in task.problem.messages]
        async with AsyncOpenAI(base_url=task.base_url, api_key=task.api_key) as client:

            async def ask() -> str:
                made = await client.chat.completions.create(model=task.model, messages=messages)
                return made.choices[0].message.content or ""

            return await self._talk(task.problem.index, messages, ask)

    async def _talk(self, episode: int, messages: list[Any], ask: Callable[[], Awaitable[str]]) -> str:
        text = await self._asked(ask)
        for seconds in latencies(episode):
            messages += [
                {"role": "assistant", "content": text},
                {"role": "tool", "content": await _tool(seconds)},
            ]
            text = await self._asked(ask)
        return text

    async def _asked[T](self, ask: Callable[[], Awaitable[T]]) -> T:
        self.asking += 1
        try:
            return await ask()
        finally:
            self.asking -= 1


async def _tool(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return RESULT


def main(
    episodes: Annotated[int, typer.Option(help="in flight at one time")] = 4096,
    program: Annotated[Literal["function", "aiohttp", "openai"], typer.Option()] = "function",
    clock: Annotated[Literal["core", "wall"], typer.Option(help="wall: on a machine that is idle")] = "core",
) -> None:
    """Run all episodes at once, and print how much later than ideal the last one ended."""
    allow_many_files()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = tuple(tokenizer.encode("<|user|>Go.<|end|><|assistant|>", add_special_tokens=False))
    problems = [Problem(i, ({"role": "user", "content": "Go."},), "", tokens=prompt) for i in range(episodes)]
    rollout = RolloutGroups(problems, settings_of(1, iteration=0))
    ideal = [sum(latencies(episode)) for episode in range(episodes)]
    finished: list[float] = []
    programs = Programs()
    function: RolloutFunction | Agent = programs.function
    if program != "function":
        talk = programs.openai if program == "openai" else programs.aiohttp
        function = Agent(talk, 3600.0, OutputReader(tokenizer), max_prompt_tokens=1024)

    def loop() -> asyncio.AbstractEventLoop:
        if clock == "wall":
            return uvloop.new_event_loop()
        return IdleCoreLoop(lambda: programs.asking > 0)

    with stub(ENGINE) as url, asyncio.Runner(loop_factory=loop) as runner:
        limits = Limits(MAX_TOKENS, max_turns=TURNS)
        drawing = replace(sampler(url, MAX_TOKENS), tokenizer=tokenizer, function=function, limits=limits)
        time_of = runner.get_loop().time
        load, used, begun = os.getloadavg()[0], time.process_time(), time_of()
        runner.run(drawing.draw(rollout, lambda _: finished.append(time_of() - begun)))
        seconds, used = time_of() - begun, time.process_time() - used
    sampled = [member for group in rollout.groups for member in group.members]
    assert all(sum(turn.finish == "stop" for turn in member.turns) == TURNS for member in sampled)
    values = {
        "ideal_seconds": max(ideal),
        "seconds": seconds,
        "over_ideal": seconds / max(ideal) - 1,
        "mean_ideal_seconds": sum(ideal) / episodes,
        "mean_lateness_seconds": (sum(finished) - sum(ideal)) / episodes,
        "processor_seconds": used,
        "milliseconds_per_turn": 1000 * used / (episodes * TURNS),
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    for key, value in values.items():
        print(f"  {key:<28}{value:>12,.3f}")
    of_run = {"episodes": episodes, "program": program, "clock": clock}
    print(json.dumps({"load": load, "cores": os.cpu_count(), **of_run, **values}))


if __name__ == "__main__":
    typer.run(main)
