"""The study's exact curves against the reference values, and the ages of what its runs train on."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_pmd.data.problem_sets import ProblemSets
from recipes.tiny_moe_cpu import make_tokenizer
from tools.studies.harness import RolloutsOfOneRun
from tools.studies.staleness import LAGS, WAYS, configuration, exact_curve

AFTER_SIX = {
    "pmd": (0.934, 0.838, 0.723, 0.543, 0.493),
    "pmd_weighted": (0.934, 0.896, 0.866, 0.837, 0.834),
    "pmd_anchor_engine": (0.934, 0.461, 0.257, 0.257, 0.120),
}
"""docs/algorithm.md, "Samples of an older policy", and the derivation behind it; by lag 0, 1, 2, 4, 8."""


@pytest.mark.parametrize("way", AFTER_SIX)
def test_the_exact_curves_are_those_of_the_derivation(way: str) -> None:
    assert [exact_curve(way, lag)[6] for lag in LAGS] == pytest.approx(AFTER_SIX[way], abs=6e-4)


class Engines:
    """Notes what it is asked to draw."""

    live = True

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int]] = []

    def draw(self, rollout: Any, actor: Any, title: str) -> list[Any]:
        self.drawn.append((rollout.settings.iteration, rollout.settings.weight_version))
        return []


@pytest.mark.parametrize("lag", [0, 2])
def test_every_rollout_is_so_many_iterations_old_and_the_first_ones_are_of_the_first_policy(lag: int) -> None:
    config = configuration("pmd", lag, seed=0)
    engines: Any = Engines()
    problems = ProblemSets.load(config, make_tokenizer(), print)
    rollouts = RolloutsOfOneRun(engines, config, problems, lag)
    assert rollouts.live
    taken: list[tuple[int, int]] = []
    for iteration in range(config.iterations):
        settings = rollouts.take(iteration, [], None).groups.settings  # type: ignore[arg-type]
        taken.append((settings.iteration, settings.weight_version))
        assert max(version for _, version in engines.drawn) == min(iteration, config.iterations - 1 - lag)
    assert taken == [(k, max(0, k - lag)) for k in range(config.iterations)]
    assert engines.drawn == taken, "as many samples as without lag, each once"


def test_the_ways_differ_only_in_what_they_are_named_for() -> None:
    fresh = {way: configuration(way, 0, 0) for way in WAYS}
    assert {config.optimizer.learning_rate for config in fresh.values()} == {2e-4}
    assert [way for way in WAYS if fresh[way].algorithm.anchor == "engine"] == ["pmd_anchor_engine"]
    assert fresh["pmd_weighted"].algorithm.mismatch.weight == "sequence_tis"
    assert configuration("grpo", 8, 1).rollout.staleness == 8
