"""The environments of docs/environments.md, played by the real `verifiers` and OpenEnv's own example."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd.config import Data, VerifiersSource
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import tokenize
from megatron_pmd.data.sources import load_problems
from megatron_pmd.environments import process
from megatron_pmd.errors import DataError, RolloutError
from megatron_pmd.rewards.environment import score
from megatron_pmd.rollout.agents.verifiers import play
from tests.rollout.agents.talking_engine import Talking, draw, problem, tokenizer
from tests.rollout.test_sampler import rollout_for
from tests.test_tutorials import blocks
from tools.bench.stub_engine import serving

PYTHON = Path(__file__).parents[3] / ".venv-verifiers" / "bin" / "python"
STARTING_SECONDS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the page's environment, where the library finds it."""
    if not PYTHON.exists() and not os.environ.get("CI"):
        pytest.skip("no .venv-verifiers: make verifiers")
    assert PYTHON.exists(), "no .venv-verifiers: make verifiers"
    made = tmp_path_factory.mktemp("environments")
    for block in blocks("docs/environments.md"):
        if block.title:
            (made / block.title).write_text(block.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(made))
        yield made
    for started in process._processes.values():
        started.close()


@pytest.fixture(scope="module")
def echo(folder: Path) -> Iterator[str]:
    """OpenEnv's own example, which serves one episode at a time."""
    subprocess.run([PYTHON.parent / "openenv", "init", "echo_env"], cwd=folder, check=True, timeout=120)
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [PYTHON, "-m", "uvicorn", "echo_env.server.app:app", "--port", "0"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield _address(folder / "server.log")
        finally:
            server.terminate()
            server.wait(20)


def _address(log: Path) -> str:
    deadline = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < deadline:
        _, found, rest = log.read_text().partition("running on ")
        if found:
            address = rest.split()[0]
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return address
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def problems_of(**source: Any) -> list[Problem]:
    given = VerifiersSource(python=str(PYTHON), **source)
    return tokenize(load_problems(given, Data(train=given)), tokenizer(), 4000)[0]


def played(problems: list[Problem], says: Callable[[str], str], timeout_seconds: float = 120.0) -> list[Any]:
    with serving(Talking(says=says)) as url:
        rollout = rollout_for(0, problems=problems, samples_per_prompt=1)
        agent = {"timeout_seconds": timeout_seconds, "max_prompt_tokens": 4000}
        draw(url, play, rollout=rollout, agent=agent, score=score, max_response_tokens=8000)
    return rollout.samples(tokenizer())


def test_an_environment_is_played_by_its_name_and_its_reward_is_the_samples(folder: Path) -> None:
    problems = problems_of(taskset="spell_backward", parameters={"words": ["sun", "moon", "star"]}, size=2)
    assert [p.messages[0]["content"] for p in problems] == ["Spell backward: sun", "Spell backward: moon"]
    samples = played(problems, lambda prompt: "nus" if "sun" in prompt else "sun")
    assert [sample.reward_error for sample in samples] == [None, None]
    assert [(sample.response, sample.reward) for sample in samples] == [("nus", 1.0), ("sun", 0.0)]
    assert [sample.prompt for sample in samples] == [tokenizer().decode(p.tokens) for p in problems]


def test_an_openenv_server_is_played_turn_by_turn_and_left_free_for_the_next_episode(echo: str) -> None:
    """It serves one at a time: an episode that is ended by its deadline must have left it."""
    problems = problems_of(
        taskset="openenv", parameters={"base_url": echo}, settings={"player": {"max_turns": 3}}
    )

    over = threading.Event()

    def stuck(prompt: str) -> str:
        if "hello" in prompt:  # the second turn
            over.wait(60)  # the deadline comes in the middle of an episode
        return "hello"

    deadline_seconds = 12.0
    threading.Timer(deadline_seconds + 0.5, over.set).start()
    (ended,) = played(problems, stuck, deadline_seconds)
    (sample,) = played(problems, lambda prompt: "hello")
    assert sample.reward == pytest.approx(3 * 0.1 * len("hello"))
    assert [segment.counted for segment in sample.segments] == [True, False, True, False, True]
    assert '"echoed_message": "hello"' in sample.response
    assert ended.reward == 0.0 and "had not ended after 12 s" in ended.reward_error


def test_what_cannot_be_loaded_or_listed_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the environment spell_bakward could not be loaded: .*not found"):
        problems_of(taskset="spell_bakward")
    with pytest.raises(DataError, match=r"could not be loaded(.|\n)*words"):
        problems_of(taskset="spell_backward", parameters={"words": 3})
    with pytest.raises(DataError, match=r"has no tasks with the parameters {'words': \[\]}"):
        problems_of(taskset="spell_backward", parameters={"words": []})


def test_the_end_of_the_process_ends_the_rollout_and_the_next_one_has_a_new_process(folder: Path) -> None:
    problems = problems_of(taskset="spell_backward", parameters={"words": ["sea"]})
    settings = problems[0].metadata["verifiers"]["settings"]
    first = process.process_of(str(PYTHON), settings)

    def kills(prompt: str) -> str:
        first._process.kill()
        return "aes"

    with pytest.raises(RolloutError, match="plays the environment spell_backward ended, with exit code -9"):
        played(problems, kills)
    assert [sample.reward for sample in played(problems, lambda prompt: "aes")] == [1.0]


def test_the_process_ends_with_the_program_that_started_it(folder: Path) -> None:
    code = (
        "import os, signal; from megatron_pmd.environments.process import process_of\n"
        f"found = process_of({str(PYTHON)!r}, {{'taskset': {{'id': 'spell_backward'}}}})\n"
        "print(found._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", code]
    pid = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120).stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)


def test_a_missing_interpreter_says_what_installs_it() -> None:
    source = VerifiersSource(taskset="gsm8k", python="nowhere/python")
    with pytest.raises(DataError, match="nowhere/python: no such interpreter, to play gsm8k with; `make ver"):
        load_problems(source, Data(train=source))


def test_prompts_that_would_not_reach_the_environment_are_refused() -> None:
    source = VerifiersSource(taskset="gsm8k", python="nowhere/python")
    with pytest.raises(DataError, match="do not reach the environment gsm8k"):
        load_problems(source, Data(train=source, system_prompt="Be brief."))


def test_a_problem_of_another_source_and_a_text_that_is_no_number_are_named() -> None:
    with serving(Talking()) as url, pytest.raises(RolloutError, match="problem 0 is of no environment"):
        draw(url, play)
    assert score("0.5", problem()) == 0.5
    with pytest.raises(ValueError, match=r"the text to be graded is 'half'; reward.name=environment takes"):
        score("half", problem())
