"""The programs of docs/agents.md, run as they stand on the page; calls and thoughts through the protocol."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import AgentProgram
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.program import Agent, AgentTask
from tests.rollout.agents.talking_engine import Talking, client_of, decode, draw, problem, tokenizer, user
from tests.rollout.test_sampler import rollout_for
from tests.test_tutorials import blocks
from tools.bench.stub_engine import serving

PAGE = "docs/agents.md"
QUESTION = replace(problem(), messages=(user("6 * 7?"),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for block in blocks(PAGE):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def says(prompt: str) -> str:
    call = json.dumps({"name": "multiply", "arguments": {"a": 6, "b": 7}})
    wants_tool = "multiply" in prompt and "42" not in prompt
    return f"I compute. <tool_call>{call}</tool_call>" if wants_tool else "It is 42."


def played(name: str) -> Any:
    settings = AgentProgram(function=name, tool_parser="qwen25")
    agent = Agent.of(settings, tokenizer(), max_prompt_tokens=400)
    with serving(Talking(says=says)) as url:
        rollout = rollout_for(0, problems=[QUESTION], samples_per_prompt=1)
        draw(url, agent.function, rollout=rollout, agent={"reader": agent.reader})
    return rollout.samples(tokenizer())


def test_the_program_with_a_tool_makes_the_trajectory_that_the_page_shows(folder: Path) -> None:
    (sample,) = played("agent.py:solve")
    shown, start = ["  " + sample.prompt], 0
    for segment in sample.segments:
        text = decode(sample.response_tokens[start : start + segment.tokens].tolist())
        shown.append(("> " if segment.counted else "  ") + text)
        start += segment.tokens
    (trajectory,) = [block.text for block in blocks(PAGE) if block.language == "text"]
    assert [line.rstrip() for line in shown] == trajectory.splitlines()
    assert (sample.reward, sample.reward_error) == (1.0, None)


def test_a_program_in_a_process_of_its_own_is_a_rollout(folder: Path) -> None:
    (sample,) = played("command.py:solve")
    assert sample.response == "It is 42." and sample.reward_error is None


def test_thoughts_come_apart_and_need_not_be_sent_back() -> None:
    heard = []

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            first = await client.chat.completions.create(model="any", messages=[user("go")], stream=True)
            deltas = [chunk.choices[0].delta async for chunk in first]
            heard.append("".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas))
            heard.append("".join(delta.content or "" for delta in deltas))
            history = [user("go"), {"role": "assistant", "content": heard[1]}, user("on")]
            answer = await client.chat.completions.create(model="any", messages=history)
            return str(answer.choices[0].message.content)

    reader = OutputReader(tokenizer(), reasoning_parser="qwen3")
    with serving(Talking(says=lambda _: "<think>hm</think>yes")) as url:
        (sample,) = draw(url, program, agent={"reader": reader}).samples(tokenizer())
    assert heard == ["hm", "yes"]
    assert [segment.counted for segment in sample.segments] == [True, False, True]
