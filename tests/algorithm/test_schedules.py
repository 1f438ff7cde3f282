"""τ and temperature over the iterations."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pmd.algorithm.schedules import scheduled

SHAPES = ["linear", "geometric", "cosine"]


@pytest.mark.parametrize("shape", SHAPES)
@given(start=st.floats(1e-3, 1e3), end=st.floats(1e-3, 1e3), iterations=st.integers(1, 50))
def test_a_schedule_goes_from_start_to_end_without_turning_back(shape, start, end, iterations):
    values = [scheduled(start, end, iterations, t, shape) for t in range(iterations + 3)]
    assert values[0] == start and values[iterations:] == [end] * 3
    ordered = values if end >= start else values[::-1]
    assert all(b >= a * (1 - 1e-12) for a, b in pairwise(ordered))


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.505), ("geometric", 0.1), ("cosine", 0.505)], ids=SHAPES
)
def test_halfway_is_the_mean_that_the_shape_names(shape, middle):
    assert scheduled(1.0, 0.01, 10, 5, shape) == pytest.approx(middle, rel=1e-12)


def test_a_quarter_of_a_cosine_is_its_definition():
    assert scheduled(2.0, 1.0, 4, 1, "cosine") == pytest.approx(2 - (1 - math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.0, 10, 5, "geometric"), "positive ends"),
        ((1.0, 0.5, 0, 5, "linear"), "iterations >= 1"),
        ((1.0, 0.5, 10, -1, "linear"), "t >= 0"),
        ((1.0, 0.5, 10, 5, "sudden"), "'sudden' is not one of"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduled(*arguments)
