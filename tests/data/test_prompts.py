"""Rendering to tokens, the order over epochs and its resumption, and the seeds of samples."""

import json
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PrioritisedPrompts, PromptSource, prompt_source, sample_seed, tokenize
from megatron_pmd.errors import DataError
from tests.data.conftest import TEMPLATE


def problems_of(count: int) -> list[Problem]:
    return [Problem(i, ({"role": "user", "content": f"{'very ' * i}hard?"},), str(i)) for i in range(count)]


def test_tokens_decode_to_the_rendered_chat_with_the_generation_prompt(tokenizer):
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"})
    (kept,), dropped = tokenize([Problem(0, chat, "4")], tokenizer, max_prompt_tokens=200)
    assert all(type(token) is int for token in kept.tokens) and isinstance(kept.tokens, tuple)
    assert tokenizer.decode(kept.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dropped == 0


def test_prompts_of_more_than_the_limit_are_dropped_and_counted(tokenizer):
    (one,), _ = tokenize(problems_of(1), tokenizer, max_prompt_tokens=1000)
    # "very " is five byte tokens: the limit is exactly the third problem's length
    kept, dropped = tokenize(problems_of(5), tokenizer, max_prompt_tokens=len(one.tokens) + 10)
    assert ([p.index for p in kept], dropped) == ([0, 1, 2], 2)


def test_dropping_every_prompt_is_an_error_that_names_the_shortest(tokenizer):
    (one,), _ = tokenize(problems_of(1), tokenizer, max_prompt_tokens=1000)
    with pytest.raises(DataError, match=rf"max_prompt_tokens=3; the shortest has {len(one.tokens)} tokens"):
        tokenize(problems_of(2), tokenizer, max_prompt_tokens=3)


def test_a_tokenizer_without_chat_template_is_refused_with_a_remedy(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template; put a chat_template\.jinja"):
        tokenize(problems_of(1), tokenizer, max_prompt_tokens=100)


def test_a_template_that_refuses_the_messages_names_the_problem(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match=r"problem 0: the chat template refuses .*\(user\): no system role"):
        tokenize(problems_of(1), tokenizer, max_prompt_tokens=100)


def test_template_arguments_reach_the_template_and_one_that_it_does_not_read_is_refused(tokenizer):
    """As Qwen3's template does without thinking: it writes an empty thought."""
    tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    (problem,) = problems_of(1)
    silent = replace(problem, template_arguments={"enable_thinking": False})
    (kept,), _ = tokenize([silent], tokenizer, max_prompt_tokens=1000)
    (plain,), _ = tokenize([problem], tokenizer, max_prompt_tokens=1000)
    assert tokenizer.decode(kept.tokens) == tokenizer.decode(plain.tokens) + "<think>\n\n</think>\n\n"
    misspelt = replace(problem, template_arguments={"enable_thinkin": False})
    with pytest.raises(DataError, match=r"reads no enable_thinkin \(did you mean enable_thinking\?\)"):
        tokenize([misspelt], tokenizer, max_prompt_tokens=1000)


def indices(source: PromptSource, n: int) -> list[int]:
    return [problem.index for problem in source.take(n)]


@given(count=st.integers(1, 12), seed=st.integers(0, 2**40), sizes=st.lists(st.integers(0, 30), max_size=6))
def test_every_epoch_is_a_permutation_however_the_prompts_are_taken(count, seed, sizes):
    pieces, whole = PromptSource(problems_of(count), seed), PromptSource(problems_of(count), seed)
    taken = [i for n in sizes for i in indices(pieces, n)]
    assert taken == indices(whole, sum(sizes))
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))


@given(
    before=st.integers(0, 40),
    after=st.integers(0, 40),
    sampling=st.sampled_from(["uniform", "in_order", "curriculum", "prioritised"]),
)
def test_a_resumed_order_equals_the_uninterrupted_one(before, after, sampling):
    rated = [replace(p, difficulty=-p.index) for p in problems_of(7)]
    interrupted, whole = (prompt_source(rated, 3, sampling) for _ in range(2))
    first, same = indices(interrupted, before), indices(whole, before)
    for source in (interrupted, whole):
        source.record({("", 1): 1.0, ("", 2): 0.5})
    resumed = prompt_source(rated, 3, sampling)
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert first + indices(resumed, after) == same + indices(whole, after)
    assert resumed.state() == whole.state()


def test_the_order_of_existing_checkpoints_never_changes():
    """Written down once: another numpy, or another way to seed it, would resume runs in another order."""
    assert indices(PromptSource(problems_of(6), seed=0), 12) == [3, 2, 5, 4, 0, 1, 1, 4, 3, 0, 2, 5]


def test_epochs_and_seeds_differ():
    source = PromptSource(problems_of(50), seed=0)
    first, second = indices(source, 50), indices(source, 50)
    assert first != second
    assert first != indices(PromptSource(problems_of(50), seed=1), 50)


def test_without_shuffling_the_order_of_the_file_repeats():
    source = PromptSource(problems_of(3), seed=0, sampling="in_order")
    assert indices(source, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert (source.state()["epoch"], source.state()["cursor"]) == (2, 1)


def test_a_curriculum_begins_with_the_easiest_and_is_uniform_from_the_second_epoch_on():
    levels = [2.0, 0.0, 1.0, 0.0, 2.0, 1.0]
    rated = [replace(p, difficulty=d) for p, d in zip(problems_of(6), levels, strict=True)]
    source = PromptSource(rated, seed=0, sampling="curriculum")
    assert [levels[i] for i in indices(source, 6)] == sorted(levels)
    assert indices(source, 6) == indices(PromptSource(rated, seed=0), 12)[6:]


def test_a_curriculum_without_difficulties_names_the_problem():
    with pytest.raises(DataError, match="problem 0 has no difficulty"):
        PromptSource(problems_of(2), seed=0, sampling="curriculum")


def test_prioritised_prompts_come_in_proportion_to_their_failures():
    """Two problems at failure rates 0.9 and 0.3: the first comes first in 3 of 4 draws of one."""
    source = PrioritisedPrompts(problems_of(2), seed=0)
    source.record({("", 0): 0.1, ("", 1): 0.7})
    share = np.mean([indices(source, 1) == [0] for _ in range(4000)])
    assert share == pytest.approx(0.75, abs=0.03)  # four standard errors


def test_solved_problems_come_only_when_nothing_else_is_left_and_none_twice_before():
    source = PrioritisedPrompts(problems_of(5), seed=0)
    source.record({("", 0): 1.0, ("", 3): 1.0})
    assert sorted(indices(source, 3)) == [1, 2, 4]
    drawn = indices(source, 5)
    assert sorted(drawn[:3]) == [1, 2, 4] and sorted(drawn[3:]) == [0, 3]
    assert len(indices(source, 12)) == 12


def test_problems_that_are_all_solved_come_again():
    source = PrioritisedPrompts(problems_of(5), seed=0)
    source.record({("", index): 1.0 for index in range(5)})
    assert sorted(indices(source, 5)) == [0, 1, 2, 3, 4]


def test_a_replayed_problem_that_is_not_among_these_is_named():
    source = PrioritisedPrompts(problems_of(2), seed=0)
    with pytest.raises(DataError, match="7"):
        source.record({("", 7): 1.0})


@pytest.mark.parametrize("change", [{"difficulty": 2.0}, {"token_budget": 5}])
def test_what_orders_and_limits_problems_is_part_of_which_data_they_are(change):
    before = PromptSource([replace(p, difficulty=1.0) for p in problems_of(3)], seed=0)
    after = [replace(p, difficulty=1.0) for p in problems_of(3)]
    after[1] = replace(after[1], **change)
    with pytest.raises(DataError, match="fingerprint"):
        PromptSource(after, seed=0).load_state(before.state())


def test_draws_of_several_problems_never_repeat_one():
    source = PrioritisedPrompts(problems_of(30), seed=1)
    for _ in range(20):
        assert len(set(indices(source, 20))) == 20


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptSource(problems_of(6), seed=0), "problems=7, this run 6"),
        (PromptSource(problems_of(7)[::-1], seed=0), "fingerprint"),
        (PromptSource(problems_of(7), seed=1), "seed=0, this run 1"),
        (PromptSource(problems_of(7), seed=0, sampling="in_order"), "sampling=uniform, this run in_order"),
    ],
)
def test_resuming_with_other_data_is_an_error(other, message):
    with pytest.raises(DataError, match=message):
        other.load_state(PromptSource(problems_of(7), seed=0).state())


@pytest.mark.parametrize("change", [{"cursor": 7}, {"cursor": -1}, {"epoch": "two"}])
def test_a_state_out_of_range_is_an_error(change):
    source = PromptSource(problems_of(7), seed=0)
    with pytest.raises(DataError, match="the saved prompt order is at epoch"):
        source.load_state({**source.state(), **change})


def test_a_state_of_something_else_is_an_error():
    with pytest.raises(DataError, match="lacks epoch, cursor"):
        PromptSource(problems_of(7), seed=0).load_state({"step": 3})


def test_a_source_without_problems_is_an_error():
    with pytest.raises(DataError, match="at least one problem"):
        PromptSource([], seed=0)


def test_sample_seeds_are_reproducible_distinct_and_in_range():
    keys = list(product(range(4), range(5), range(20), range(8)))
    seeds = [sample_seed(*key) for key in keys]
    assert seeds == [sample_seed(*key) for key in keys]
    assert all(0 <= seed < 2**31 for seed in seeds)
    # 3,200 draws from 2**31 collide with probability 0.0024; these do not
    assert len(set(seeds)) == len(seeds)
    assert sample_seed(0, 0, 0, 0, "evaluation") != sample_seed(0, 0, 0, 0)
    assert sample_seed(1, 23, 4, 5) != sample_seed(12, 3, 4, 5)


def test_neighbouring_sample_seeds_are_uncorrelated():
    """Half of the 31 bits differ between neighbours: 15.5 on average, standard error 2.8/√4000 = 0.04."""
    seeds = [sample_seed(0, 0, 0, sample) for sample in range(4001)]
    assert np.mean([(a ^ b).bit_count() for a, b in pairwise(seeds)]) == pytest.approx(15.5, abs=0.2)
