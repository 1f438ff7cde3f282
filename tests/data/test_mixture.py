"""A mixture's order: shares against the weights, resumption at any prompt, and what each source keeps."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pmd.config import Sampling
from megatron_pmd.data.mixture import MixedPrompts, Share, next_source, seed_of
from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.data.prompts import prompt_source
from megatron_pmd.errors import DataError

WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


def mixture(
    weights: dict[str, float], *, sizes: dict[str, int] | None = None, seed: int = 3,
    sampling: Sampling = "uniform",
) -> MixedPrompts:  # fmt: skip
    """Sources of five problems each, but for those that `sizes` names."""
    return MixedPrompts(
        [
            Share(
                name,
                weight,
                prompt_source(
                    [
                        Problem(i, (), str(i), source=name, difficulty=-i)
                        for i in range((sizes or {}).get(name, 5))
                    ],
                    seed_of(seed, name),
                    sampling,
                ),
            )
            for name, weight in weights.items()
        ]
    )


def keys(source: MixedPrompts, n: int) -> list[Key]:
    return [problem.key for problem in source.take(n)]


@given(WEIGHTS, st.integers(1, 120))
def test_after_every_prompt_each_source_has_its_share_to_less_than_one_prompt(weights, prompts):
    """Tijdeman's bound, 1 − 1/(2m − 2) for m sources, in float64: |prompts of source i − n w_i / Σ w|."""
    taken, share = np.zeros(len(weights), int), np.array(weights) / sum(weights)
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0
    for n in range(1, prompts + 1):
        taken[next_source(weights, taken.tolist())] += 1
        assert taken.sum() == n
        assert np.abs(taken - n * share).max() <= bound + 1e-9


def test_shares_of_whole_numbers_repeat_exactly():
    """Of weights 3, 2 and 1 every six prompts have three, two and one: 6 w_i / Σ w has no remainder."""
    source = mixture({"a": 3, "b": 2, "c": 1})
    for _ in range(20):
        assert Counter(name for name, _ in keys(source, 6)) == {"a": 3, "b": 2, "c": 1}


@given(
    before=st.integers(0, 40),
    after=st.integers(0, 40),
    sampling=st.sampled_from(["uniform", "in_order", "curriculum", "prioritised"]),
)
def test_a_mixture_resumed_at_any_prompt_goes_on_as_the_uninterrupted_one(before, after, sampling):
    weights = {"a": 1.0, "b": 0.1, "c": 2.7}
    interrupted, whole, resumed = (mixture(weights, sampling=sampling) for _ in range(3))
    first, same = keys(interrupted, before), keys(whole, before)
    for source in (interrupted, whole):
        source.record({("a", 1): 1.0, ("c", 2): 0.5})
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert first + keys(resumed, after) == same + keys(whole, after)
    assert resumed.state() == whole.state()


def test_the_order_of_existing_checkpoints_never_changes():
    """Written down once: another rule would resume runs in another order."""
    drawn = keys(mixture({"a": 2, "b": 1}, sizes={"a": 3, "b": 2}), 9)
    assert drawn == [
        ("a", 2), ("b", 0), ("a", 1), ("a", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 1), ("a", 2),
    ]  # fmt: skip


def test_the_order_does_not_depend_on_how_many_are_taken_at_once():
    """Nor does peeking change it: a rollout takes hundreds, its group filter one by one."""
    whole, pieces = (mixture({"a": 1, "b": 2}) for _ in range(2))
    expected = keys(whole, 30)
    assert [problem.key for problem in pieces.peek(30)] == expected
    assert [key for n in (1, 7, 0, 12, 10) for key in keys(pieces, n)] == expected


def test_a_source_keeps_its_own_order_whatever_is_beside_it():
    def order_of_a(weights: dict[str, float]) -> list[Key]:
        return [key for key in keys(mixture(weights), 60) if key[0] == "a"][:20]

    assert order_of_a({"a": 1, "b": 1}) == order_of_a({"c": 5, "a": 3, "b": 0.5})
    assert order_of_a({"a": 1}) != [("a", i) for _, i in keys(mixture({"d": 1}), 20)]


def test_a_success_is_recorded_where_it_was_made():
    """The same index in another source is another problem: only source a's is solved, and comes no more."""
    source = mixture({"a": 1, "b": 1}, sampling="prioritised")
    source.record({("a", 2): 1.0})
    drawn = Counter(keys(source, 8))
    assert ("a", 2) not in drawn and ("b", 2) in Counter(keys(source, 10))
    assert set(drawn) >= {("a", i) for i in (0, 1, 3, 4)}
    assert source.problem(("b", 4)).key == ("b", 4)
    for key in (("c", 0), ("a", 99)):
        with pytest.raises(DataError, match=f"problem {key[1]}"):
            source.problem(key)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 1, "b": 3}, r"the sources a \(weight 1\), b \(weight 2\).* of a \(weight 1\), b \(weight 3\)"),
        ({"b": 2, "a": 1}, "names, weights or their order changed"),
        ({"a": 1, "c": 2}, r"b \(weight 2\).* c \(weight 2\)"),
    ],
)
def test_a_resume_with_other_names_or_weights_is_an_error(other, message):
    with pytest.raises(DataError, match=message):
        mixture(other).load_state(mixture({"a": 1, "b": 2}).state())


def test_a_resume_with_other_problems_or_from_a_single_source_is_an_error():
    saved = mixture({"a": 1, "b": 2})
    with pytest.raises(DataError, match="problems=5, this run 4"):
        mixture({"a": 1, "b": 2}, sizes={"b": 4}).load_state(saved.state())
    single = prompt_source([Problem(0, (), "0")], 3, "uniform")
    with pytest.raises(DataError, match=r"of the sources no list, this run's data\.train of a"):
        saved.load_state(single.state())
    with pytest.raises(DataError, match="lacks epoch, cursor"):
        single.load_state(saved.state())
