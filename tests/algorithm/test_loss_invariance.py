"""What must not change a loss, and what must not break it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pmd.algorithm.baselines import BASELINES, advantages
from megatron_pmd.algorithm.losses import LossInput, LossTerms
from megatron_pmd.algorithm.mismatch import SEQUENCE_WEIGHTS
from megatron_pmd.config import OBJECTIVES
from tests.algorithm.evaluated import evaluated

OPTIONS: dict[str, dict] = {
    "pmd": dict(tau=0.1, mismatch=SEQUENCE_WEIGHTS["sequence_tis"]),
    "pmd_token": dict(tau=0.1, log_ratio_low=-1.0, log_ratio_high=1.0),
    "reinforce": dict(normaliser="none"),
    "grpo": dict(kl_coefficient=0.1),
    "gspo": dict(),
    "cispo": dict(),
    "distillation": dict(),
    "sft": dict(),
}


def sample(rng: np.random.Generator, length: int, scale: float = 0.3) -> dict[str, np.ndarray]:
    anchor = -rng.exponential(1.0, length)
    return {
        "log_probs": anchor + scale * rng.normal(size=length),
        "anchor_log_probs": anchor,
        "engine_log_probs": anchor + 0.05 * rng.normal(size=length),
        "mask": rng.integers(0, 2, length),
        "teacher_log_probs": anchor + rng.normal(size=length),
    }


def pack(sequences: list[dict[str, np.ndarray]], values: np.ndarray, *, padding: int = 0) -> LossInput:
    """Sequences one after another, then `padding` tokens that are not counted and hold NaN."""
    sequence = np.repeat(np.arange(len(sequences)), np.array([len(q["mask"]) for q in sequences], int))
    tensors = {
        name: torch.tensor(np.concatenate([q[name] for q in sequences] + [np.full(padding, fill)]))
        for name, fill in dict(
            log_probs=np.nan,
            anchor_log_probs=np.nan,
            engine_log_probs=-np.inf,
            mask=0,
            teacher_log_probs=np.nan,
        ).items()
    }
    return LossInput(
        log_probs=tensors.pop("log_probs").requires_grad_(),
        sequence=torch.tensor(np.concatenate([sequence, np.zeros(padding)]), dtype=torch.int64),
        advantages=torch.tensor(values),
        tau=torch.ones(len(values)),
        **tensors,
    )


def backward(terms: LossTerms, x: LossInput) -> np.ndarray:
    return torch.autograd.grad(terms.sum, x.log_probs)[0].numpy()


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 9), max_size=4), padding=st.integers(0, 3)
)
def test_the_summed_loss_and_gradient_are_the_same_for_every_packing(name, seed, cuts, padding):
    """Micro-batches cut anywhere (some empty), in any order, padded with tokens that hold NaN."""
    rng = np.random.default_rng(seed)
    sequences = [sample(rng, length) for length in rng.integers(0, 8, 9)]
    values = rng.normal(size=9)
    whole = pack(sequences, values)
    expected = evaluated(name, whole, **OPTIONS[name])
    expected_gradients = np.split(
        backward(expected, whole), np.cumsum([len(q["mask"]) for q in sequences])[:-1]
    )

    total, count = 0.0, 0.0
    bounds = [0, *sorted(cuts), 9]
    order = rng.permutation(9)
    for low, high in pairwise(bounds):
        chosen = order[low:high]
        part = [sequences[i] for i in chosen]
        part_input = pack(part, values[chosen], padding=padding if part else 0)
        terms = evaluated(name, part_input, **OPTIONS[name])
        total += terms.sum.item()
        count += terms.count.item()
        found = backward(terms, part_input)
        start = 0
        for i in chosen:
            length = len(sequences[i]["mask"])
            np.testing.assert_allclose(found[start : start + length], expected_gradients[i], atol=1e-12)
            start += length
        assert (found[start:] == 0).all(), "padding has no gradient"
    assert count == expected.count.item()
    assert total == pytest.approx(expected.sum.item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_batch_without_sequences_gives_zero_with_a_way_back(name):
    log_probs = torch.zeros(0, requires_grad=True)
    nothing = torch.zeros(0)
    x = LossInput(
        log_probs, nothing, nothing, nothing, torch.zeros(0, dtype=torch.int64), nothing, nothing, nothing
    )
    terms = evaluated(name, x, **OPTIONS[name])
    assert terms.sum.item() == 0 and terms.count.item() == 0
    terms.sum.backward()
    assert log_probs.grad is not None and log_probs.grad.shape == (0,)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_sequence_without_counted_tokens_adds_nothing_but_counts_as_a_sequence(name, tokens):
    """Also when its tokens hold −inf, as an engine reports for a token it was not allowed to sample."""
    log_probs = torch.full((tokens,), -torch.inf, requires_grad=True)
    hole = torch.full((tokens,), -torch.inf)
    x = LossInput(
        log_probs,
        hole,
        hole,
        torch.zeros(tokens),
        torch.zeros(tokens).long(),
        torch.tensor([1.5]),
        torch.ones(1),
        hole,
    )
    terms = evaluated(name, x, **OPTIONS[name])
    assert terms.sum.item() == 0
    assert terms.count.item() == (1 if name in ("pmd", "reinforce", "gspo", "distillation") else 0)
    assert (backward(terms, x) == 0).all()
    assert all(v.isfinite().all() for v in terms.per_sequence.values())


@settings(max_examples=60)
@given(
    rewards=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6),
    tau=st.floats(-3, 3).map(lambda exponent: 10.0**exponent),
    baseline=st.sampled_from(sorted(BASELINES)),
    normaliser=st.sampled_from(["response", "max_response", "none"]),
    scaling=st.sampled_from(["gradient", "regression"]),
    weight=st.sampled_from(sorted(SEQUENCE_WEIGHTS)),
    longest=st.sampled_from([1, 2, 100, 1000, 32_000]),
    seed=st.integers(0, 1000),
)
def test_no_reward_tau_or_length_in_range_makes_pmd_overflow(
    rewards, tau, baseline, normaliser, scaling, weight, longest, seed
):
    rng = np.random.default_rng(seed)
    values = advantages(rewards, np.zeros(len(rewards), int), baseline=baseline, tau=tau)
    lengths = [longest, *rng.integers(0, min(longest, 50) + 1, len(rewards) - 1)]
    x = pack([sample(rng, length) for length in lengths], values)
    single = LossInput(
        log_probs=x.log_probs.detach().float().requires_grad_(),
        anchor_log_probs=x.anchor_log_probs.float(),
        engine_log_probs=x.engine_log_probs.float(),
        mask=x.mask,
        sequence=x.sequence,
        advantages=x.advantages.float(),
        tau=x.tau,
    )
    terms = evaluated(
        "pmd",
        single,
        tau=tau,
        normaliser=normaliser,
        max_response_tokens=32_000,
        scaling=scaling,
        mismatch=SEQUENCE_WEIGHTS[weight],
    )
    assert np.isfinite(values).all() and terms.sum.isfinite() and terms.sum.float().isfinite()
    assert np.isfinite(backward(terms, single)).all()
    assert all(v.isfinite().all() for v in terms.per_sequence.values())


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"pmd"}))
@settings(max_examples=15)
@given(
    rewards=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6),
    tau=st.floats(-3, 3).map(lambda exponent: 10.0**exponent),
    longest=st.sampled_from([1, 100, 32_000]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_nor_does_it_make_any_other_objective_overflow(name, rewards, tau, longest, scale, seed):
    rng = np.random.default_rng(seed)
    values = advantages(rewards, np.zeros(len(rewards), int), baseline="mean", tau=tau)
    lengths = [longest, *rng.integers(0, min(longest, 50) + 1, len(rewards) - 1)]
    x = pack([sample(rng, length, scale) for length in lengths], values)
    options = OPTIONS[name] | (dict(tau=tau) if "tau" in OPTIONS[name] else {})
    terms = evaluated(name, x, **options)
    assert terms.sum.float().isfinite() and np.isfinite(backward(terms, x)).all()
    # kl_k3 is e^x − 1 − x of single tokens, and is meant to show a ratio that has run away
    assert all(v.isfinite().all() for key, v in terms.per_sequence.items() if key != "kl_k3")


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("tau", [1e-3, 0.1, 1e3])
def test_a_group_with_equal_rewards_leaves_the_anchor_alone(baseline, tau):
    rng = np.random.default_rng(0)
    values = advantages([0.1] * 16, np.zeros(16, int), baseline=baseline, tau=tau)
    x = pack([sample(rng, 5, scale=0.0) for _ in range(16)], values)
    terms = evaluated("pmd", x, tau=tau)
    assert terms.sum.item() == 0
    assert (backward(terms, x) == 0).all()


def test_a_long_response_has_the_same_weight_alone_in_its_micro_batch_as_in_a_pack():
    """A mean of micro-batch means would weigh the long response as much as the four short ones together."""
    rng = np.random.default_rng(1)
    long, *short = [sample(rng, length) for length in (4000, 10, 10, 10, 10)]
    values = np.array([1.0, -1.0, -1.0, 2.0, -1.0])
    together = evaluated("pmd", pack([long, *short], values), tau=0.1)
    apart = [
        evaluated("pmd", pack([long], values[:1]), tau=0.1),
        evaluated("pmd", pack(short, values[1:]), tau=0.1),
    ]
    mean = sum(t.sum.item() for t in apart) / sum(t.count.item() for t in apart)
    assert mean == pytest.approx(together.sum.item() / together.count.item(), rel=1e-12)


@pytest.mark.parametrize("name", ["pmd", "pmd_token"])
def test_sequences_of_several_taus_add_up_as_each_alone_with_its_own(name):
    rng = np.random.default_rng(4)
    sequences, values, taus = [sample(rng, n) for n in (3, 0, 6, 2)], rng.normal(size=4), [0.1, 1.0, 0.5, 2.0]
    whole = pack(sequences, values)
    alone = [pack([q], values[i : i + 1]) for i, q in enumerate(sequences)]
    parts = [evaluated(name, x, tau=tau) for x, tau in zip(alone, taus, strict=True)]
    expected = np.concatenate([backward(part, x) for part, x in zip(parts, alone, strict=True)])
    found = evaluated(name, whole, tau=taus)
    assert found.sum.item() == pytest.approx(sum(part.sum.item() for part in parts), rel=1e-12)
    np.testing.assert_allclose(backward(found, whole), expected, rtol=1e-12)
    assert found.sum.item() != evaluated(name, whole, tau=0.1).sum.item()
