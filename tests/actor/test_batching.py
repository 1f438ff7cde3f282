"""Packing: a pure function of lengths, so it is tested on many of them."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pmd.actor.batching import (
    attention_cost_tokens,
    length_of_equal_cost,
    pack,
    steps_of_groups,
)
from megatron_pmd.errors import ConfigError
from megatron_pmd.planner.shapes import MODELS

LIMIT = 100
lengths_and_ranks = st.tuples(st.lists(st.integers(1, LIMIT), max_size=60), st.integers(1, 5))


def packed(lengths: list[int] | np.ndarray, ranks: int, limit: int = LIMIT) -> list[list[list[int]]]:
    array = np.array(lengths, np.int64)
    return pack(array, attention_cost_tokens(array, 12 * 64), ranks=ranks, max_tokens=limit)


@given(lengths_and_ranks)
def test_every_sample_is_packed_exactly_once(case):
    lengths, ranks = case
    seen = [i for share in packed(lengths, ranks) for microbatch in share for i in microbatch]
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths_and_ranks)
def test_no_microbatch_exceeds_the_limit(case):
    lengths, ranks = case
    for share in packed(lengths, ranks):
        assert all(sum(lengths[i] for i in microbatch) <= LIMIT for microbatch in share)


@given(lengths_and_ranks)
def test_every_rank_runs_the_same_number_of_microbatches(case):
    lengths, ranks = case
    shares = packed(lengths, ranks)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1 and shares[0]


@given(lengths_and_ranks)
def test_the_number_of_microbatches_is_within_the_bound_of_best_fit(case):
    """Two micro-batches of best fit are together over the limit, or the second had gone into the first."""
    lengths, ranks = case
    count = len(packed(lengths, ranks)[0])
    assert count <= max(1, -(-(2 * sum(lengths) // LIMIT + 1) // ranks))


@given(lengths_and_ranks, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_of_the_samples_does_not_change_the_loads(case, random):
    lengths, ranks = case
    order = list(range(len(lengths)))
    random.shuffle(order)

    def loads(values: list[int]) -> list[list[list[int]]]:
        return [[sorted(values[i] for i in m) for m in share] for share in packed(values, ranks)]

    assert loads(lengths) == loads([lengths[i] for i in order])


def test_few_equal_samples_are_spread_over_the_ranks():
    shares = packed([10] * 8, ranks=4)
    assert [[len(m) for m in share] for share in shares] == [[2]] * 4


def test_a_sample_over_the_limit_names_the_setting_to_raise():
    with pytest.raises(ConfigError, match=r"101 tokens does not fit a pass of 100; raise batch\.max_tokens"):
        packed([3, 101], ranks=2)


def test_attention_costs_as_much_as_the_linear_layers_at_the_given_length():
    np.testing.assert_allclose(attention_cost_tokens(np.array([0, 500, 1000]), 1000.0), [0, 750, 2000])


def published_tensors(name: str) -> dict[str, list[int]]:
    """The tensors of a published model, as transformers makes it without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = json.loads(MODELS.read_text())[name]["config"]
    config = AutoConfig.for_model(**known)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "routed_share", "score_width", "tokens"),
    [
        # 2.73 billion weights a token in 48 layers of 32 heads, queries and values of 128
        ("Qwen3-30B-A3B-Base", 8 / 128, 48 * 32 * 256, 13_900),
        # 35.7 billion in 61 layers of 128 heads, queries of 192 and values of 128
        ("DeepSeek-V3-Base", 8 / 256, 61 * 128 * 320, 28_600),
    ],
)
def test_the_length_of_equal_cost_is_counted_from_the_architecture(name, routed_share, score_width, tokens):
    found = length_of_equal_cost(published_tensors(name), routed_share=routed_share, score_width=score_width)
    assert found == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(("tokens_at_equal_cost", "loss"), [(13_889, 1.022), (24_576, 1.055)])
def test_ranks_wait_less_for_each_other_when_attention_has_its_cost(tokens_at_equal_cost, loss):
    """One optimizer step of 512 responses on 32 ranks: what micro-batches in lockstep lose, by true costs."""
    draws = np.random.default_rng(0).lognormal(np.log(4000) - 0.18, 0.6, 512)
    lengths = np.clip(draws, 1, 10_000).astype(np.int64)
    true = attention_cost_tokens(lengths, 13_889)
    shares = pack(lengths, attention_cost_tokens(lengths, tokens_at_equal_cost), ranks=32, max_tokens=12_288)
    work = np.array([[true[microbatch].sum() for microbatch in share] for share in shares])
    assert work.max(0).sum() / work.mean(0).sum() == pytest.approx(loss, abs=0.002)


@pytest.mark.parametrize(
    ("mean", "longest", "ranks", "limit"),
    [
        *((4_000, 10_000, 32, limit) for limit in (10_000, 12_288, 16_384, 32_768)),
        # replicas of ranks that share out each row: see test_packing for what each of these gets of it
        *((32_768, 131_072, 8, limit) for limit in (133_120, 163_840, 262_144)),
    ],
)
def test_a_rollout_of_long_responses_fills_and_balances_all_ranks(mean, longest, ranks, limit):
    """8,192 log-normal lengths, cut at the longest, operations as of Qwen3-30B-A3B.

    The ranks wait for each other after every micro-batch (experts) and after all of them (gradients).
    """
    sigma = 0.6
    draws = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, 8192)
    lengths = np.clip(draws, 1, longest).astype(np.int64)
    costs = attention_cost_tokens(lengths, 13_889)
    begin = time.process_time()
    shares = pack(lengths, costs, ranks=ranks, max_tokens=limit)
    seconds = time.process_time() - begin
    work = np.array([[costs[microbatch].sum() for microbatch in share] for share in shares])
    assert lengths.sum() / (work.size * limit) >= 0.97
    assert work.sum(1).max() / work.sum(1).mean() <= 1.03
    assert work.max(0).sum() / work.mean(0).sum() <= 1.03
    assert seconds < 1.0


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 4))
def test_steps_take_whole_groups_in_the_rollouts_order(groups, prompts_per_step):
    array = np.array(groups, np.int64)
    steps = steps_of_groups(array, prompts_per_step)
    assert sorted(i for step in steps for i in step) == list(range(len(groups)))
    members = [set(array[step].tolist()) for step in steps]
    assert all(len(step) == prompts_per_step for step in members[:-1])
    first_seen = list(dict.fromkeys(groups))
    for k, step in enumerate(members):
        assert step == set(first_seen[k * prompts_per_step : (k + 1) * prompts_per_step])
