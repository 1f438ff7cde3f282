"""What CONTRIBUTING lets a user add, added as a user would: the page's own code, in the user's folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from megatron_pmd.algorithm.losses import Constants, LossInput, terms
from megatron_pmd.config import OBJECTIVES, REWARDS, ROUTER_POLICIES, TRANSPORTS, Reward, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.engine.router import RouterProcess, RouterSpec
from megatron_pmd.engine.server import ServerProcess
from megatron_pmd.errors import ConfigError
from megatron_pmd.rewards.pool import RewardPool
from megatron_pmd.rollout.episode import rollout_function
from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.weight_sync.transport import Disk, transport_of
from recipes import RECIPES, configuration, recipe
from tests.engine.only_rank import OnlyRank
from tests.rollout.test_episode import Turns
from tests.rollout.test_sampler import Numbers, rollout_for, sampler_for
from tools.bench.stub_engine import serving

PROJECT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n# (my_\w+\.py)\n(.*?)```", re.DOTALL)
PROBLEM = Problem(0, ({"role": "user", "content": "?"},), "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and the current one: CONTRIBUTING's files in mine/, and again as modules."""
    blocks = dict(BLOCK.findall((PROJECT / "CONTRIBUTING.md").read_text()))
    assert set(blocks) == {
        f"my_{n}.py" for n in ("recipe", "objectives", "rewards", "rollouts", "transports")
    }
    (tmp_path / "mine").mkdir()
    for name, text in blocks.items():
        (tmp_path / "mine" / name).write_text(text)
        (tmp_path / f"module_of_{name}").write_text(text)
    # what is imported from here is gone for the next test, which has another folder
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def three_names(name: str, attribute: str) -> list[str]:
    """The file, the module of the current folder, and a name that one line in a registry gives it."""
    return [f"mine/my_{name}.py:{attribute}", f"module_of_my_{name}:{attribute}", "one_line"]


@pytest.mark.parametrize("word", ["mine/my_recipe.py", "module_of_my_recipe:my_recipe", "one_line"])
def test_a_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setitem(RECIPES.entries, "one_line", "module_of_my_recipe:my_recipe")
    config = configuration(word, ["seed=7"])
    assert (config.name, config.seed, config.layout.ranks, config.engines) == ("my_run", 7, 1, 1)
    from megatron_pmd.cli.main import app

    for command in (["plan"], ["launch", "--dry-run"]):
        # the profile's GPUs are stood in for by processors, one to a node
        done = CliRunner().invoke(app, [command[0], word, "--cluster", "lab", *command[1:]])
        assert done.exit_code == 0, done.output
    assert '"name": "my_run"' in done.output and "PMD_RECIPE=" in done.output


@pytest.mark.parametrize("name", three_names("objectives", "Pull"))
def test_an_objective_and_its_gradient_by_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """d/dlog π of strength (s − A)² is 2 strength (s − A) at every counted token of the sequence."""
    monkeypatch.setitem(OBJECTIVES.entries, "one_line", "module_of_my_objectives:Pull")
    words = ["algorithm.objective.strength=0.75", f"algorithm.objective={name}"]
    config = override(recipe("tiny_moe_cpu"), words)
    assert override(config, []) == config, "it reads back from its own dump"
    log_probs = torch.tensor([-1.0, -2.0, -0.5, -3.0], requires_grad=True)
    anchor = torch.tensor([-1.5, -1.5, -0.25, -0.5])
    counted = torch.tensor([1, 1, 1, 0])
    x = LossInput(
        log_probs,
        anchor,
        anchor,
        counted,
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.5, -1.0]),
        torch.ones(2),
    )
    found = terms(config.algorithm.objective, x, Constants(max_response_tokens=8))
    s, advantage = np.array([0.5 - 0.5, -0.25]), np.array([0.5, -1.0])
    assert found.count == 2
    assert found.sum.item() == pytest.approx(0.75 * ((s - advantage) ** 2).sum(), rel=1e-12)
    by_sequence = 2 * 0.75 * (s - advantage)
    expected = [by_sequence[0], by_sequence[0], by_sequence[1], 0.0]
    assert torch.autograd.grad(found.sum, log_probs)[0].tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match=r"objective\.strenght is not a setting of .*mean strength"):
        override(config, ["algorithm.objective.strenght=1"])
    with pytest.raises(ConfigError, match=r"strength: Input should be greater than 0"):
        override(config, ["algorithm.objective.strength=-1"])


@pytest.mark.parametrize("name", three_names("rewards", "variety"))
def test_a_reward_in_its_worker_processes(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "one_line":  # in the package it is there in the workers, too; here the line is this process's
        monkeypatch.setitem(REWARDS.entries, "one_line", "module_of_my_rewards:variety")
        assert REWARDS.load(Reward(name=name).name, what="reward.name")("abca", PROBLEM) == 3.0
        return
    with RewardPool(Reward(name=name, workers=1)) as pool:
        assert [v.reward for v in pool.grade([("abca", PROBLEM), ("", PROBLEM)])] == [3.0, 0.0]


@pytest.mark.parametrize("name", three_names("rollouts", "twice")[:2])
def test_a_rollout_function(folder: Path, name: str) -> None:
    class Chat(Numbers):
        """A template that writes `7 50` after an answer, where a turn begins for the engine below."""

        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return f"{messages[1]['content']} 7 50"

    engine, groups = Turns(), rollout_for(1, samples_per_prompt=1)
    with serving(engine) as url:
        sampler = sampler_for(url, function=rollout_function(name), max_turns=2)
        replace(sampler, tokenizer=Chat()).run(groups)
    [sample] = groups.samples(Chat())
    assert sample.response_tokens.tolist() == [100, 101, 102, 103, 7, 50, 110, 111, 112, 113]
    assert [(segment.tokens, segment.counted) for segment in sample.segments] == [
        (4, True), (2, False), (4, True)
    ]  # fmt: skip


@pytest.mark.parametrize("name", three_names("transports", "Announced"))
def test_a_transport(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(TRANSPORTS.entries, "one_line", "module_of_my_transports:Announced")
    config = override(recipe("tiny_moe_cpu"), [f"sync.transport={name}"])
    fleet: Any = None  # a transport asks it for nothing before the first push
    transport = transport_of(config, fleet, OnlyRank(), folder)
    assert isinstance(transport, Disk) and type(transport).__name__ == "Announced"
    with pytest.raises(ConfigError, match="engines do not open the buckets"):
        transport_of(override(config, ["sync.verify=full"]), fleet, OnlyRank(), folder)


def test_a_transport_that_is_none_is_named(folder: Path) -> None:
    config = override(recipe("tiny_moe_cpu"), ["sync.transport=module_of_my_rewards:variety"])
    with pytest.raises(ConfigError, match="is no class with the methods of"):
        transport_of(config, None, OnlyRank(), folder)  # type: ignore[arg-type]


def policy_that_the_router_reads(policy: str, folder: Path) -> str:
    """What sglang-router's own parser makes of the arguments that we start it with."""
    from sglang_router.launch_router import parse_router_args

    log = folder / "router.log"
    RouterProcess(RouterSpec(["http://127.0.0.1:9"], 9, log, request_timeout_seconds=1.0, policy=policy))
    return parse_router_args(json.loads(log.with_name("router.log.json").read_text())).policy


def test_a_router_policy_is_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ServerProcess, "__init__", lambda *_: None)
    for policy in ROUTER_POLICIES:
        assert policy_that_the_router_reads(policy, tmp_path) == policy
    *others, last = ROUTER_POLICIES
    monkeypatch.setattr("megatron_pmd.config.rollout.ROUTER_POLICIES", others)
    with pytest.raises(ConfigError, match=f"'{last}' is no policy"):
        override(recipe("tiny_moe_cpu"), [f"rollout.router_policy={last}"])
    monkeypatch.setattr("megatron_pmd.config.rollout.ROUTER_POLICIES", [*others, last])
    assert override(recipe("tiny_moe_cpu"), [f"rollout.router_policy={last}"]).rollout.router_policy == last


@pytest.mark.slow
def test_a_run_with_everything_of_ones_own(folder: Path) -> None:
    """Through the command as it is installed: the current folder is not on Python's path by itself (-P).

    At the first step s = 0, so that the mean of strength (s − A)² is that of strength A².
    """
    words = [
        "iterations=1", "batch.prompts_per_rollout=4", "batch.samples_per_prompt=4",
        "batch.prompts_per_step=4", "batch.max_response_tokens=256", "warm_start=null",
        "data.evaluation=null", "checkpoint.hf_export=false", "rollout.max_total_tokens=8192",
        "actor.experts.replay_routing=false",
        "algorithm.objective.name=mine/my_objectives.py:Pull", "algorithm.objective.strength=0.5",
        "reward.name=mine/my_rewards.py:variety", "rollout.function=module_of_my_rollouts:twice",
        "sync.transport=mine/my_transports.py:Announced",
    ]  # fmt: skip
    command = [sys.executable, "-P", "-m", "megatron_pmd.cli.main", "train", "mine/my_recipe.py", *words]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(PROJECT)}, text=True, capture_output=True,
        stdin=subprocess.DEVNULL, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the engines serve version 0" in done.stdout and "the engines serve version 1" in done.stdout
    run = folder / "runs" / "my_run"
    samples, _ = read_rollout(run / "rollouts" / "0.parquet")
    # a model made from nothing ends one answer in 128 tokens; one that was cut has no second, and is worth 0
    asked_again = [s.response.split("Again.") for s in samples]
    assert [s.reward for s in samples] == [len(set(parts[1])) if parts[1:] else 0 for parts in asked_again]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [step] = [line for line in lines if line["kind"] == "step"]
    squares = [s.advantage**2 for s in samples]
    assert step["loss"] == pytest.approx(0.5 * np.mean(squares), rel=1e-6) and max(squares) > 0
    # started again from the configuration that the run wrote, it finds all of it again
    again = subprocess.run(
        [*command[:5], str(run / "config.json"), "iterations=1"], cwd=folder, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)}, timeout=600,
    )  # fmt: skip
    assert "is complete" in again.stdout, again.stdout + again.stderr
