"""Lengths of responses, against scipy and against what was put in."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import lognorm

from megatron_pmd.batch import Sample
from megatron_pmd.errors import DataError
from megatron_pmd.rollout_file import write_rollout
from megatron_pmd.simulator.lengths import LogNormal, cut_mean, log_normal_of_mean, recorded


@pytest.mark.parametrize(("median", "sigma", "most"), [(3412, 1.0, 8192), (50, 0.3, 60), (9000, 2.0, 8192)])
def test_the_mean_of_cut_lengths_is_the_integral_of_their_survival_function(
    median: float, sigma: float, most: float
) -> None:
    by_integral, _ = quad(lognorm(sigma, scale=median).sf, 0, most)
    assert cut_mean(median, sigma, most) == pytest.approx(by_integral, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.5])
def test_lengths_of_a_given_mean_have_it_after_they_were_cut(sigma: float) -> None:
    lengths = log_normal_of_mean(4096.0, sigma, max_tokens=8192, prompt_tokens=1024)
    prompt, drawn = lengths.draw(random.Random(0), 40_000)
    assert prompt == 1024
    assert max(drawn) <= 8192
    assert np.mean(drawn) == pytest.approx(4096, rel=0.01)


def test_recorded_lengths_are_those_of_the_files_by_group(tmp_path: Path) -> None:
    sizes = [[(0, 3, [5, 7]), (1, 4, [2, 9])], [(0, 6, [1, 8])]]
    for iteration, groups in enumerate(sizes):
        samples = [
            sample(group, n, prompt, tokens)
            for group, prompt, lengths in groups
            for n, tokens in enumerate(lengths)
        ]
        write_rollout(tmp_path / f"{iteration}.parquet", samples, iteration)
    lengths = recorded(tmp_path)
    assert sorted(lengths.groups) == [(3, [5, 7]), (4, [2, 9]), (6, [1, 8])]
    assert {tuple(lengths.draw(random.Random(seed), 2)[1]) for seed in range(30)} == {(5, 7), (2, 9), (1, 8)}
    assert set(recorded(tmp_path / "1.parquet").draw(random.Random(0), 50)[1]) == {1, 8}


def sample(group: int, number: int, prompt: int, response: int) -> Sample:
    tokens = np.zeros(response, np.int32)
    return Sample(
        group, number, 0, "", "", "", prompt_tokens=np.zeros(prompt, np.int32), response_tokens=tokens,
        engine_log_probs=tokens.astype(np.float32), finish_reason="stop", weight_version=0, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["absent.parquet", ""])
def test_a_folder_or_file_without_a_rollout_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=str(tmp_path / name)):
        recorded(tmp_path / name)


def test_lengths_without_spread_are_all_alike() -> None:
    assert LogNormal(7, 0.0, 100, 3).draw(random.Random(0), 4) == (3, [7, 7, 7, 7])
