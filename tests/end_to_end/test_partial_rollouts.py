"""Responses of two turns, stopped by a real engine's abort, continued under newer weights, resumed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_pmd.batch import NOT_SAMPLED
from megatron_pmd.data.problems import Key
from megatron_pmd.rollout.carried_over_file import FILE
from megatron_pmd.rollout_file import read_rollout
from tests.data.test_mixture import keys, mixture
from tests.end_to_end.command_line import CommandLine

pytestmark = pytest.mark.slow

LIMITS = {"letters": 40, "few_characters": 30}

WORDS = {"kind": "reasoning_gym", "task": "spell_backward", "size": 500, "parameters": {"max_word_len": 6}}
MIXTURE = [
    {"name": "letters", "weight": 2, "source": WORDS},
    {
        "name": "few_characters", "weight": 1, "source": WORDS | {"seed": 1}, "tau": 0.3,
        "max_response_tokens": 30,
        "reward": {"name": "tests.end_to_end.rewards:few_characters", "workers": 1},
    },
]  # fmt: skip
PARTIAL = [
    "batch.max_response_tokens=40",
    "rollout.max_running_requests=16",
    "rollout.partial.extra_groups=5",
    "rollout.partial.max_staleness=3",
    "rollout.repetition.window_tokens=32",
    "rollout.function=tests.end_to_end.two_turns:rollout",
    "rollout.group_filter.drop_equal_rewards=false",
    "rollout.group_filter.mean_reward_below=1.0",
    "rollout.group_filter.max_dropped=4",
    "checkpoint.hf_export=false",
    f"data.train={json.dumps(MIXTURE)}",
    f"data.evaluation={json.dumps([{k: s[k] for k in s.keys() - {'weight', 'tau'}} for s in MIXTURE])}",
    "evaluation.prompts=2",
]


def test_stopped_responses_are_continued_under_newer_weights_also_after_a_resume(
    command_line: CommandLine,
) -> None:
    """fp32: the actor's log-probability of every token sampled under its weights is the engine's to 1e-5, so
    the engine saw in its context exactly the tokens that are trained on, the inserted ones too."""
    command_line.run("partial", *PARTIAL, "iterations=2")
    folder = command_line.path("partial")
    kept = pq.read_table(folder / "checkpoints" / "iteration-2" / FILE).to_pylist()
    assert len(kept) == 5 * 4
    command_line.run("partial", *PARTIAL, "iterations=4")
    lines = [m for m in command_line.lines("partial", "metrics.jsonl") if m["kind"] == "iteration"]
    assert [m["iteration"] for m in lines] == [0, 1, 2, 3]
    assert [m["partial/carried_responses"] for m in lines] == [0, 20, 20, 20]
    # on a busy machine an engine may finish all before the driver sees that there is enough
    assert any(m["partial/stopped_enough_groups"] > 0 for m in lines)
    continued_under_newer_weights = 0

    for t, line in enumerate(lines):
        # the engine's log-probabilities after a continuation are the current weights' own
        assert line["sync/mean_abs_difference"] <= 1e-5
        assert line["sync/max_abs_difference"] <= 1e-3
        samples, _ = read_rollout(folder / "rollouts" / f"{t}.parquet")
        assert len(samples) == 32
        for s in samples:
            versions = [g.weight_version for g in s.segments if g.weight_version != NOT_SAMPLED]
            assert versions == sorted(versions) and versions[-1] == s.weight_version <= t
            assert all(g.counted == (g.weight_version != NOT_SAMPLED) for g in s.segments)
            assert len(s.engine_log_probs) == len(s.response_tokens) <= LIMITS[s.source]
            continued_under_newer_weights += len(set(versions)) > 1
    assert continued_under_newer_weights
    assert lines[-1]["rollout/inserted_share"] > 0

    check_sources(lines, folder)
    evaluations = [m for m in command_line.lines("partial", "metrics.jsonl") if m["kind"] == "evaluation"]
    assert [m["iteration"] for m in evaluations] == [0, 4]
    assert all(m[f"source/{name}/prompts"] == 2 for m in evaluations for name in LIMITS)

    # what the checkpoint kept is what the resumed run went on with
    after, _ = read_rollout(folder / "rollouts" / "2.parquet")
    continued = {s.seed: s.response_tokens.tolist() for s in after}
    begun = {row["seed"]: [t for turn in row["turns"] for t in turn["tokens"]] for row in kept}
    common = set(begun) & set(continued)
    # of the five groups kept, those that were among the first eight to be complete
    assert len(common) >= 4
    assert all(continued[seed][: len(begun[seed])] == begun[seed] for seed in common)


def check_sources(lines: list[dict[str, Any]], folder: Path) -> None:
    """A group is of one source and graded by its reward; the order goes on behind the resume, none left out.

    A rollout's prompts are those left over and the next of the mixture. Which are complete first, the engine
    decides: of all that were drawn, all but those last left over and those that the filter dropped are there.
    """
    drawn: set[Key] = set()
    for t, line in enumerate(lines):
        samples, _ = read_rollout(folder / "rollouts" / f"{t}.parquet")
        source_of = {s.group: s.source for s in samples}
        assert all(s.source == source_of[s.group] for s in samples)
        # one reward is never negative, the other never positive
        for name, sign in (("letters", 1), ("few_characters", -1)):
            own = [s.reward for s in samples if s.source == name]
            assert min(sign * reward for reward in own) >= 0 < max(sign * reward for reward in own)
            assert line[f"source/{name}/reward"] == pytest.approx(sum(own) / len(own))
            assert line[f"source/{name}/groups"] == Counter(source_of.values())[name]
        drawn |= {(s.source, s.problem) for s in samples}
    dropped = round(sum(line["filter/dropped_groups"] for line in lines))
    order = mixture({"letters": 2, "few_characters": 1}, sizes=dict.fromkeys(LIMITS, 500), seed=0)
    order.take(4 * 16)  # of the warm start
    assert len(drawn) == 4 * 8
    assert drawn <= set(keys(order, 4 * 8 + 5 + dropped))
