"""What the driver costs with 4,096 agents in flight, of 8 turns with slow tools.

    python -m tools.bench.agents                       # about 5 minutes
    python -m tools.bench.agents --episodes 256 --client openai

The engine is a stub in a process of its own (tools/bench/stub_engine.py). Programs and endpoint are in this
one, as in a run. Nothing else may run on the machine meanwhile: the line of JSON records its load.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

import aiohttp
import typer
from openai import AsyncOpenAI

from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import sample_seed
from megatron_pmd.processes import allow_many_files
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.program import Agent, AgentTask
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.sampler import Limits
from recipes.tiny_moe_cpu import make_tokenizer
from tools.bench.rollout import sampler, settings_of, stub
from tools.bench.stub_engine import response_length

TURNS = 8
ENGINE = {"median_tokens": 100, "sigma": 0.75, "tokens_per_second": 50, "whole_turns": True}
TOOL_SECONDS, TOOL_SIGMA = 10.0, 0.75
"""Median of a tool's latency, and sigma of its logarithm."""
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
    """The agents: each asks, waits for a tool, and asks again."""

    def __init__(self, client: str) -> None:
        self._client = client

    async def run(self, task: AgentTask) -> str:
        messages: list[Any] = [dict(message) for message in task.problem.messages]
        if self._client == "openai":
            async with AsyncOpenAI(base_url=task.base_url, api_key=task.api_key) as client:

                async def ask() -> str:
                    made = await client.chat.completions.create(model=task.model, messages=messages)
                    return made.choices[0].message.content or ""

                return await self._talk(task.problem.index, messages, ask)
        headers = {"Authorization": f"Bearer {task.api_key}"}
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(None)) as session:

            async def ask_plainly() -> str:
                body = {"model": task.model, "messages": messages}
                async with session.post(f"{task.base_url}/chat/completions", json=body) as reply:
                    return (await reply.json())["choices"][0]["message"]["content"] or ""

            return await self._talk(task.problem.index, messages, ask_plainly)

    async def _talk(self, episode: int, messages: list[Any], ask: Any) -> str:
        text = await ask()
        for seconds in latencies(episode):
            await asyncio.sleep(seconds)
            messages += [{"role": "assistant", "content": text}, {"role": "tool", "content": "result " * 8}]
            text = await ask()
        return str(text)


def ideal_seconds(seed: int, episode: int) -> float:
    """Of an episode whose driver costs nothing."""
    seeds = [seed, *(sample_seed(seed, 0, 0, turn, "agent") for turn in range(1, TURNS))]
    tokens = [response_length(s, ENGINE["median_tokens"], ENGINE["sigma"]) for s in seeds]
    return sum(tokens) / ENGINE["tokens_per_second"] + sum(latencies(episode))


def main(
    episodes: Annotated[int, typer.Option(help="in flight at one time")] = 4096,
    client: Annotated[Literal["aiohttp", "openai"], typer.Option(help="of the programs")] = "aiohttp",
) -> None:
    """Run all episodes at once, and print how much later than ideal the last one ended."""
    allow_many_files()
    load = os.getloadavg()[0]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = tuple(tokenizer.encode("<|user|>Go.<|end|><|assistant|>", add_special_tokens=False))
    problems = [Problem(i, ({"role": "user", "content": "Go."},), "", tokens=prompt) for i in range(episodes)]
    rollout = RolloutGroups(problems, settings_of(1, iteration=0))
    ideal = [ideal_seconds(group.members[0].seed, group.problem.index) for group in rollout.groups]
    agent = Agent(Programs(client).run, 3600.0, OutputReader(tokenizer), max_prompt_tokens=1024)
    with stub(ENGINE) as url:
        limits = Limits(MAX_TOKENS, max_turns=TURNS)
        drawing = replace(sampler(url, MAX_TOKENS), tokenizer=tokenizer, function=agent, limits=limits)
        used, begun = time.process_time(), time.monotonic()
        drawing.run(rollout)
        seconds = time.monotonic() - begun
    assert rollout.accounts.agents == {"turns": episodes * TURNS, "failed": 0}, rollout.accounts.agents
    values = {
        "episodes": episodes,
        "ideal_seconds": max(ideal),
        "seconds": seconds,
        "over_ideal": seconds / max(ideal) - 1,
        "processor_seconds": time.process_time() - used,
        "milliseconds_per_turn": 1000 * (time.process_time() - used) / (episodes * TURNS),
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    for key, value in values.items():
        print(f"  {key:<28}{value:>12,.3f}")
    print(json.dumps({"load": load, "cores": os.cpu_count(), "client": client, **values}))


if __name__ == "__main__":
    typer.run(main)
