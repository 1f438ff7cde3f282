"""One run with real engines, looked at from all sides."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_pmd.rollout_file import read_rollout
from megatron_pmd.shared_memory import shared_memory_key
from recipes.tiny_moe_cpu import TEMPERATURE
from tests.convert.command_line import convert, tensors
from tests.end_to_end.command_line import CommandLine

pytestmark = pytest.mark.slow


def test_phases_follow_one_another_as_the_loop_says(live: Path, command_line: CommandLine) -> None:
    before, after = ["rollout", "release", "anchor", "update", "save"], ["sync", "resume"]
    expected = [(0, "warm_start"), (0, "start"), (0, "evaluate")]
    # checkpoint.hf_export_every=2
    expected += [(t, phase) for t in range(3) for phase in (*before, *["export"] * (t == 1), *after)]
    assert command_line.phases("live") == [
        *expected,
        (3, "evaluate"),
        (3, "check"),
        (3, "export"),
        (3, "save"),
    ]


def test_every_optimizer_step_moves_the_policy(live: Path, command_line: CommandLine) -> None:
    """Else the other tests of this folder compare runs in which nothing happens."""
    assert all(step["gradient_norm"] > 0 for step in command_line.steps("live"))


def test_every_sample_carries_the_weight_version_of_its_iteration(live: Path) -> None:
    for t in range(3):
        samples, iteration = read_rollout(live / "rollouts" / f"{t}.parquet")
        assert iteration == t
        assert {s.weight_version for s in samples} == {t}
        assert sorted((s.group, s.number) for s in samples) == [(g, n) for g in range(8) for n in range(4)]
        assert len({s.seed for s in samples}) == 32


def test_engine_and_actor_agree_on_every_sampled_token_after_every_sync(
    live: Path, command_line: CommandLine
) -> None:
    iterations = [line for line in command_line.lines("live", "metrics.jsonl") if line["kind"] == "iteration"]
    assert len(iterations) == 3
    for line in iterations:
        assert line["sync/mean_abs_difference"] <= 1e-5
        assert line["sync/max_abs_difference"] <= 1e-3


def test_the_engines_log_probs_are_those_of_transformers_with_the_exported_weights(live: Path) -> None:
    """Evaluation 3 was sampled from the weights in hf/iteration-3: an account independent of the actor."""
    model = AutoModelForCausalLM.from_pretrained(live / "hf" / "iteration-3", dtype=torch.float32)
    samples, _ = read_rollout(live / "evaluations" / "3.parquet")
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens)[None].long()
        with torch.no_grad():
            # an engine's log-probabilities are those of the policy at its sampling temperature
            log_probs = (model(tokens).logits / TEMPERATURE).log_softmax(-1)
        first = len(sample.prompt_tokens)
        expected = log_probs[0, first - 1 : -1].gather(1, tokens[0, first:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.engine_log_probs), expected, atol=1e-4, rtol=0)


def test_the_recorded_experts_are_those_that_transformers_chooses_with_the_exported_weights(
    live: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(live / "hf" / "iteration-3", dtype=torch.float32)
    chosen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[2]))
    samples, _ = read_rollout(live / "evaluations" / "3.parquet")
    for sample in samples:
        assert sample.routed_experts is not None
        tokens = torch.from_numpy(sample.tokens)[None].long()[:, :-1]
        chosen.clear()
        with torch.no_grad():
            model(tokens)
        recorded = sample.routed_experts.reshape(tokens.size(1), len(chosen), -1)
        expected = torch.stack(chosen, 1).sort(-1).values
        assert torch.equal(torch.from_numpy(recorded.astype(np.int64)).sort(-1).values, expected)


def test_replaying_the_engines_routing_brings_the_actor_no_further_from_the_engine(
    live: Path, command_line: CommandLine
) -> None:
    first = ("--replay", str(live / "rollouts" / "0.parquet"), "iterations=1")
    command_line.run("own_routing", *first, "actor.experts.replay_routing=false")
    own, replayed = (
        next(line for line in command_line.lines(name, "metrics.jsonl") if line["kind"] == "iteration")
        for name in ("own_routing", "live")
    )
    # where no expert is disputed the two differ by rounding: a tenth of a log-probability's last fp32 digit
    assert replayed["sync/mean_abs_difference"] <= own["sync/mean_abs_difference"] + 5e-8


def test_exported_folder_has_its_tokenizer_and_chat_template(live: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(live / "hf" / "iteration-3")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|end|>"


def test_a_folder_exported_on_the_way_holds_what_its_checkpoint_converts_to(
    live: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    model = command_line.folder / "models" / "tiny-moe"
    done = convert("megatron-to-hf", live, "--iteration", 2, "--out", tmp_path / "hf", "--model", model)
    assert done.returncode == 0, done.stderr
    on_the_way, converted = tensors(live / "hf" / "iteration-2"), tensors(tmp_path / "hf")
    assert on_the_way.keys() == converted.keys()
    assert all(torch.equal(on_the_way[name], converted[name]) for name in converted)
    last = tensors(live / "hf" / "iteration-3")
    assert any(not torch.equal(on_the_way[name], last[name]) for name in last)


def test_summary_says_complete_and_a_finished_run_trains_no_further(
    live: Path, command_line: CommandLine
) -> None:
    summary = command_line.summary("live")
    assert summary["status"] == "complete"
    assert summary["iterations"] == 3
    assert [e["iteration"] for e in summary["evaluations"]] == [0, 3]
    before = command_line.lines("live", "ledger.jsonl")
    assert "is complete: nothing is left to train" in command_line.run("live")
    assert command_line.lines("live", "ledger.jsonl") == before


def test_the_report_shows_the_rewards_that_the_rollout_files_hold(live: Path) -> None:
    page = (live / "report.html").read_text()
    (text,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    curve = json.loads(text)["charts"]["curve-0"]["data"][0]
    rollouts = [read_rollout(live / "rollouts" / f"{t}.parquet")[0] for t in range(3)]
    rewards = [np.mean([sample.reward for sample in samples]) for samples in rollouts]
    assert curve["y"] == pytest.approx(rewards, abs=1e-6)  # the page has six digits of each


def test_nothing_stays_in_shared_memory(live: Path) -> None:
    key = shared_memory_key(live)
    assert [name for name in os.listdir("/dev/shm") if key in name] == []


def test_another_configuration_cannot_continue_the_run(live: Path, command_line: CommandLine) -> None:
    output = command_line.run("live", "algorithm.tau=0.2", expect=2)
    assert "algorithm.tau: 0.1 there, 0.2 here" in output
