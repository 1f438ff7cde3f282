"""The weights' own properties; their values are compared with the definitions in test_losses.py."""

import pytest
import torch

from megatron_pmd.algorithm.losses import LossInput
from megatron_pmd.algorithm.mismatch import (
    SEQUENCE_WEIGHTS,
    TOKEN_WEIGHTS,
    Mismatch,
    geometric_tis,
    sequence_mis,
    sequence_tis,
    tis_by_token,
    token_veto,
    veto_by_token,
)

EVERY_WEIGHT = [*SEQUENCE_WEIGHTS.values(), *TOKEN_WEIGHTS.values()]


def mismatch(*sequences: list[float]) -> Mismatch:
    return Mismatch(
        log_ratio=torch.tensor([d for q in sequences for d in q], dtype=torch.float64),
        sequence=torch.tensor([i for i, q in enumerate(sequences) for _ in q], dtype=torch.int64),
        length=torch.tensor([len(q) for q in sequences], dtype=torch.int64),
    )


@pytest.mark.parametrize("weight", EVERY_WEIGHT)
def test_an_engine_that_agrees_with_the_trainer_gives_every_weight_one(weight):
    assert (weight(mismatch([0.0, 0.0], [], [0.0])) == 1).all()


@pytest.mark.parametrize("weight", EVERY_WEIGHT)
def test_no_weight_overflows_or_is_negative(weight):
    w = weight(mismatch([900.0, 900.0], [-900.0], [1e-3]))
    assert w.isfinite().all() and (w >= 0).all()


def test_truncation_bounds_the_weight_from_above_only():
    w = sequence_tis(mismatch([1.0, 1.0], [-1.0]), cap=3.0)
    torch.testing.assert_close(w, torch.tensor([3.0, 0.36787944117144233], dtype=torch.float64))


def test_the_geometric_weight_does_not_grow_with_length():
    short, long = geometric_tis(mismatch([0.1] * 2, [0.1] * 1000))
    torch.testing.assert_close(short, long)


def test_masking_keeps_the_ratio_inside_the_bounds_and_nothing_outside():
    w = sequence_mis(mismatch([0.3], [1.0], [-1.0]), low=0.5, high=2.0)
    torch.testing.assert_close(w, torch.tensor([1.3498588075760032, 0.0, 0.0], dtype=torch.float64))


def test_one_token_the_trainer_finds_impossible_drops_its_whole_sequence():
    ratios = mismatch([0.0, -9.3, 0.0], [-9.1, -9.1])
    assert token_veto(ratios).tolist() == [0.0, 1.0]
    assert veto_by_token(ratios).tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_tokens_that_are_not_counted_do_not_enter_and_weights_carry_no_gradient():
    anchor = torch.tensor([-1.0, -1.0], requires_grad=True)
    x = LossInput(
        log_probs=anchor,
        anchor_log_probs=anchor,
        engine_log_probs=torch.tensor([-1.5, -torch.inf]),
        mask=torch.tensor([1, 0]),
        sequence=torch.tensor([0, 0]),
        advantages=torch.ones(1),
        tau=torch.ones(1),
    )
    for weight in EVERY_WEIGHT:
        assert not weight(x.mismatch).requires_grad
    torch.testing.assert_close(sequence_tis(x.mismatch).item(), 1.6487212707001282)
    torch.testing.assert_close(tis_by_token(x.mismatch).tolist(), [1.6487212707001282, 1.0])


@pytest.mark.parametrize(
    ("weight", "bounds"),
    [
        (sequence_tis, dict(cap=0.0)),
        (geometric_tis, dict(cap=-1.0)),
        (sequence_mis, dict(low=2.0, high=0.5)),
        (sequence_mis, dict(low=0.0)),
        (token_veto, dict(lowest=0.0)),
    ],
)
def test_bounds_that_are_no_ratios_are_refused(weight, bounds):
    with pytest.raises(ValueError):
        weight(mismatch([0.0]), **bounds)
