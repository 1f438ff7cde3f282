"""The group length reward of K1.5."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pmd.algorithm.shaping import length_rewards

group = st.lists(st.tuples(st.integers(1, 32_000), st.booleans()), min_size=1, max_size=12)


@given(st.lists(group, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_value_is_the_papers_formula_for_any_groups_in_any_order(groups, random):
    rows = [(g, *sample) for g, samples in enumerate(groups) for sample in samples]
    random.shuffle(rows)
    labels, lengths, correct = (list(column) for column in zip(*rows, strict=True))
    found = length_rewards(lengths, correct, labels)
    for value, (label, length, right) in zip(found, rows, strict=True):
        own = [n for n, _ in groups[label]]
        if max(own) == min(own):
            assert value == 0
            continue
        lam = 0.5 - (length - min(own)) / (max(own) - min(own))
        assert value == pytest.approx(lam if right else min(0.0, lam), abs=1e-12)


def test_the_shortest_correct_answer_gains_half_and_the_longest_loses_half():
    assert length_rewards([10, 20, 30], [True, True, True], [0, 0, 0]).tolist() == [0.5, 0.0, -0.5]


def test_a_wrong_answer_gains_nothing_by_being_short():
    assert length_rewards([10, 20, 30], [False, True, False], [7, 7, 7]).tolist() == [0.0, 0.0, -0.5]


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="verdicts"):
        length_rewards([1, 2], [True], [0, 0])
    assert length_rewards([], [], np.array([], int)).size == 0
