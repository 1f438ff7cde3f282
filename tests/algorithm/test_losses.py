"""Every objective against its definition, written token by token; its gradient against autograd of that."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pmd.algorithm.losses import LossInput, LossTerms, next_token
from megatron_pmd.algorithm.mismatch import SEQUENCE_WEIGHTS, TOKEN_WEIGHTS, WEIGHTS
from megatron_pmd.config import OBJECTIVES
from tests.algorithm.evaluated import evaluated, made

Scalar = torch.Tensor | float


@dataclass
class Sequence:
    """The counted tokens of one sequence: (log π_θ, a scalar with gradient; log π_t; log π_b)."""

    advantage: float
    tokens: list[tuple[torch.Tensor, float, float]]
    teacher: list[float]
    """log π_T of the same tokens."""

    def s(self) -> Scalar:
        return sum((new - anchor for new, anchor, _ in self.tokens), 0.0)

    def d(self) -> list[float]:
        return [anchor - engine for _, anchor, engine in self.tokens]


def exp(x: Scalar) -> Scalar:
    return torch.exp(x) if isinstance(x, torch.Tensor) else math.exp(x)


def number(x: Scalar) -> float:
    return x.item() if isinstance(x, torch.Tensor) else float(x)


def clip_surrogate(ratio: Scalar, advantage: float, low: float, high: float) -> Scalar:
    if advantage >= 0:
        return ratio * advantage if ratio < 1 + high else (1 + high) * advantage
    return ratio * advantage if ratio > 1 - low else (1 - low) * advantage


def weight_of_sequence(q: Sequence, name: str, cap=2.0, low=0.5, high=2.0, lowest=1e-4) -> float:
    total = sum(q.d())
    match name:
        case "sequence_tis":
            return min(math.exp(total), cap)
        case "geometric_tis":
            return min(math.exp(total / max(len(q.tokens), 1)), cap)
        case "sequence_mis":
            return math.exp(total) if low <= math.exp(total) <= high else 0.0
        case "token_veto":
            return 0.0 if any(math.exp(d) < lowest for d in q.d()) else 1.0
    return 1.0


def weight_of_token(q: Sequence, d: float, name: str, cap=2.0, low=0.5, high=2.0, lowest=1e-4) -> float:
    match name:
        case "token_tis":
            return min(math.exp(d), cap)
        case "token_mis":
            return math.exp(d) if low <= math.exp(d) <= high else 0.0
        case "token_veto":
            return weight_of_sequence(q, "token_veto", lowest=lowest)
    return 1.0


def divisor(q: Sequence, normaliser: str, max_response_tokens: int | None) -> int:
    return {"response": len(q.tokens), "max_response": max_response_tokens or 0, "none": 1}[normaliser]


def sequence_loss(
    name: str,
    q: Sequence,
    *,
    tau=1.0,
    normaliser="response",
    max_response_tokens=None,
    scaling="gradient",
    clip_low=3e-4,
    clip_high=4e-4,
    form="token",
) -> Scalar:
    if not q.tokens:
        return 0.0
    match name:
        case "pmd":
            factor = tau / 2 if scaling == "gradient" else 1 / 2
            square = (q.s() - q.advantage / tau) ** 2
            return factor * square / divisor(q, normaliser, max_response_tokens)
        case "distillation":
            target = [given - anchor for given, (_, anchor, _) in zip(q.teacher, q.tokens, strict=True)]
            by_token = sum(
                (new - anchor - d) ** 2 for d, (new, anchor, _) in zip(target, q.tokens, strict=True)
            )
            square = by_token if form == "token" else (q.s() - sum(target)) ** 2
            return square / 2 / divisor(q, normaliser, max_response_tokens)
        case "reinforce":
            return -q.advantage * q.s() / divisor(q, normaliser, max_response_tokens)
        case "gspo":
            return -clip_surrogate(exp(q.s() / len(q.tokens)), q.advantage, clip_low, clip_high)
    raise AssertionError(name)


def token_loss(
    name: str,
    q: Sequence,
    new: torch.Tensor,
    anchor: float,
    *,
    tau=1.0,
    log_ratio_low=0.0,
    log_ratio_high=0.0,
    clip_low=0.2,
    clip_high=0.28,
    kl_coefficient=0.0,
    ratio_low=0.0,
    ratio_high=5.0,
) -> Scalar:
    x = new - anchor
    match name:
        case "pmd_token":
            inside = log_ratio_low <= x <= log_ratio_high
            return -exp(x) * q.advantage + tau * x**2 if inside else 0.0
        case "grpo":
            k3 = exp(-x) - 1 + x
            return -clip_surrogate(exp(x), q.advantage, clip_low, clip_high) + kl_coefficient * k3
        case "cispo":
            return -min(max(math.exp(number(x)), ratio_low), ratio_high) * q.advantage * new
        case "sft":
            return -new
    raise AssertionError(name)


def definition(name: str, batch: list[Sequence], weight: str, options: dict) -> tuple[Scalar, int]:
    if name in MEANS_OVER_TOKENS:
        total = sum(
            (
                weight_of_token(q, anchor - engine, weight) * token_loss(name, q, new, anchor, **options)
                for q in batch
                for new, anchor, engine in q.tokens
            ),
            0.0,
        )
        return total, sum(len(q.tokens) for q in batch)
    return sum((weight_of_sequence(q, weight) * sequence_loss(name, q, **options) for q in batch), 0.0), len(
        batch
    )


@st.composite
def inputs(draw, spread: float = 0.4) -> LossInput:
    """Up to 5 sequences of up to 6 tokens, a third not counted, in any order; log-ratios of size `spread`."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sequence = rng.permutation(np.repeat(np.arange(len(lengths)), lengths))
    anchor = -rng.exponential(1.0, len(sequence))
    return LossInput(
        log_probs=torch.tensor(anchor + spread * rng.normal(size=len(sequence)), requires_grad=True),
        anchor_log_probs=torch.tensor(anchor),
        engine_log_probs=torch.tensor(anchor + rng.choice([0.1, 3.0]) * rng.normal(size=len(sequence))),
        mask=torch.tensor(rng.random(len(sequence)) < 2 / 3),
        sequence=torch.tensor(sequence, dtype=torch.int64),
        advantages=torch.tensor(rng.choice([-2.0, -0.5, 0.0, 0.5, 2.0], len(lengths))),
        tau=torch.ones(len(lengths)),
        teacher_log_probs=torch.tensor(anchor + rng.normal(size=len(sequence))),
    )


def unpack(x: LossInput) -> tuple[list[Sequence], torch.Tensor]:
    """The same data as plain lists, over a fresh leaf for the gradient."""
    leaf = x.log_probs.detach().double().clone().requires_grad_()
    assert x.teacher_log_probs is not None
    anchor, engine, mask = (v.tolist() for v in (x.anchor_log_probs, x.engine_log_probs, x.mask))
    batch = [Sequence(a, [], []) for a in x.advantages.tolist()]
    for k, i in enumerate(x.sequence.tolist()):
        if mask[k]:
            batch[i].tokens.append((leaf[k], anchor[k], engine[k]))
            batch[i].teacher.append(float(x.teacher_log_probs[k]))
    return batch, leaf


def gradient(value: Scalar, leaf: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]


MEANS_OVER_TOKENS = {"pmd_token", "grpo", "cispo", "sft"}
OPTIONS: dict[str, list[dict]] = {
    "pmd": [
        dict(tau=0.1),
        dict(tau=3.0, normaliser="none"),
        dict(tau=0.5, normaliser="max_response", max_response_tokens=7),
        dict(tau=0.01, scaling="regression"),
    ],
    "distillation": [
        dict(),
        dict(form="sequence", normaliser="max_response", max_response_tokens=7),
    ],
    "reinforce": [dict(normaliser="none"), dict(normaliser="response")],
    "gspo": [dict(), dict(clip_low=0.1, clip_high=0.2)],
    "grpo": [dict(), dict(clip_low=0.1, clip_high=0.5, kl_coefficient=0.3)],
    "cispo": [dict(), dict(ratio_low=0.8, ratio_high=1.2)],
    "pmd_token": [
        dict(tau=0.1, log_ratio_low=-0.3, log_ratio_high=0.5),
        dict(tau=2.0, log_ratio_low=-9.0, log_ratio_high=9.0),
    ],
    "sft": [dict()],
}
CASES = [
    (name, weight, options)
    for name, several in OPTIONS.items()
    for options in several
    for weight in (["none"] if name == "sft" else WEIGHTS[made(name).counts])
]


def evaluate(name: str, x: LossInput, weight: str, options: dict) -> LossTerms:
    return evaluated(name, x, **options, mismatch=WEIGHTS[made(name).counts][weight])


def pmd(x: LossInput, **options) -> LossTerms:
    return evaluated("pmd", x, **options)


@pytest.mark.parametrize(("name", "weight", "options"), CASES)
@settings(max_examples=12)
@given(x=inputs())
def test_value_and_gradient_equal_the_definition_written_token_by_token(name, weight, options, x):
    terms = evaluate(name, x, weight, options)
    batch, leaf = unpack(x)
    expected, count = definition(name, batch, weight, options)
    assert terms.count.item() == count and terms.count.dtype == torch.int64
    assert terms.sum.item() == pytest.approx(number(expected), rel=1e-9, abs=1e-9)
    found = torch.autograd.grad(terms.sum, x.log_probs)[0]
    torch.testing.assert_close(found, gradient(expected, leaf), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms.per_sequence["loss"].sum(), terms.sum.detach())


def test_every_objective_and_every_weight_is_compared_with_its_definition():
    assert set(OPTIONS) == set(OBJECTIVES)
    assert {weight for _, weight, _ in CASES} == set(SEQUENCE_WEIGHTS) | set(TOKEN_WEIGHTS)
    assert {name for name in OBJECTIVES if made(name).counts == "tokens"} == MEANS_OVER_TOKENS


@settings(max_examples=12)
@given(x=inputs())
def test_the_supervised_loss_beside_a_rollout_is_that_of_the_supervised_objective(x):
    assert next_token(x).sum == evaluated("sft", x).sum


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=12)
@given(x=inputs())
def test_single_precision_log_probs_give_the_double_precision_loss_of_the_same_numbers(name, x):
    single = LossInput(
        log_probs=x.log_probs.detach().float().requires_grad_(),
        anchor_log_probs=x.anchor_log_probs.float(),
        engine_log_probs=x.engine_log_probs.float(),
        mask=x.mask.float(),
        sequence=x.sequence,
        advantages=x.advantages.float(),
        tau=x.tau,
        teacher_log_probs=x.teacher_log_probs.float() if x.teacher_log_probs is not None else None,
    )
    terms = evaluate(name, single, "none", OPTIONS[name][0])
    batch, leaf = unpack(single)
    expected, _ = definition(name, batch, "none", OPTIONS[name][0])
    assert terms.sum.item() == pytest.approx(number(expected), rel=1e-9, abs=1e-9)
    found = torch.autograd.grad(terms.sum, single.log_probs)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gradient(expected, leaf).float(), rtol=1e-6, atol=1e-6)


@settings(max_examples=25)
@given(x=inputs())
def test_per_sequence_quantities_equal_their_definitions(x):
    per_sequence = pmd(x, tau=0.1, mismatch=SEQUENCE_WEIGHTS["sequence_tis"]).per_sequence
    for i, q in enumerate(unpack(x)[0]):
        ratios = [number(new) - anchor for new, anchor, _ in q.tokens]
        expected = {
            "loss": number(sequence_loss("pmd", q, tau=0.1)) * weight_of_sequence(q, "sequence_tis"),
            "weight": weight_of_sequence(q, "sequence_tis"),
            "log_ratio": sum(ratios),
            "length": len(ratios),
            "kl_k2": sum(r * r / 2 for r in ratios),
            "kl_k3": sum(math.exp(r) - 1 - r for r in ratios),
            "mismatch_sum": sum(q.d()),
            "mismatch_abs_sum": sum(abs(d) for d in q.d()),
            "mismatch_abs_max": max((abs(d) for d in q.d()), default=0.0),
        }
        assert {k: v[i].item() for k, v in per_sequence.items()} == pytest.approx(expected, abs=1e-12)
        assert not any(v.requires_grad for v in per_sequence.values())


@pytest.mark.parametrize("tau", [1e-3, 0.1, 10.0])
def test_at_the_anchor_the_pmd_gradient_is_the_policy_gradient_for_every_tau(tau):
    """−A/|y| on each counted token: (τ/2)(s − A/τ)² was scaled for this."""
    log_probs = torch.tensor([-1.0, -2.0, -0.5, -0.1], requires_grad=True)
    x = LossInput(
        log_probs=log_probs,
        anchor_log_probs=log_probs.detach(),
        engine_log_probs=log_probs.detach(),
        mask=torch.tensor([1, 1, 0, 1]),
        sequence=torch.tensor([0, 0, 0, 1]),
        advantages=torch.tensor([2.0, -3.0]),
        tau=torch.ones(2),
    )
    pmd_gradient = torch.autograd.grad(pmd(x, tau=tau).sum, log_probs)[0]
    torch.testing.assert_close(pmd_gradient, torch.tensor([-1.0, -1.0, 0.0, 3.0]))
    reinforce = evaluated("reinforce", x, normaliser="response")
    torch.testing.assert_close(torch.autograd.grad(reinforce.sum, log_probs)[0], pmd_gradient)


def two_sequences(log_probs: torch.Tensor, anchor: torch.Tensor, advantages: list[float]) -> LossInput:
    """Of one token each."""
    ones, sequence = torch.ones(2), torch.tensor([0, 1])
    return LossInput(log_probs, anchor, anchor, ones, sequence, torch.tensor(advantages), ones)


def test_the_two_scalings_differ_by_tau_and_nothing_else():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    anchor = torch.tensor([-1.5, -1.8])
    x = two_sequences(log_probs, anchor, [1.0, -1.0])
    by_gradient, by_regression = pmd(x, tau=0.3).sum, pmd(x, tau=0.3, scaling="regression").sum
    torch.testing.assert_close(by_gradient, 0.3 * by_regression)


def test_a_ratio_beyond_any_clip_range_keeps_every_value_and_gradient_finite():
    log_probs = torch.tensor([-0.1, -700.0], requires_grad=True)
    anchor = torch.tensor([-700.0, -0.1])
    x = two_sequences(log_probs, anchor, [0.0, -1.0])
    for name in ("grpo", "gspo", "cispo", "pmd_token"):
        total = evaluate(name, x, "none", OPTIONS[name][-1]).sum
        assert total.isfinite() and torch.autograd.grad(total, log_probs)[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tau=1.0, normaliser="mean"), r"normaliser(.|\n)*Input should be 'response', 'max_response'"),
        (dict(tau=1.0, max_response_tokens=0), "max_response_tokens must be positive"),
        (dict(tau=1.0, scaling="both"), r"scaling(.|\n)*Input should be 'gradient' or 'regression'"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        pmd(LossInput(zero, zero, zero, zero, torch.zeros(1, dtype=torch.int64), zero, zero), **options)


def test_bounds_that_exclude_the_anchor_itself_are_refused():
    with pytest.raises(ValueError, match=r"log_ratio_low(.|\n)*less than or equal to 0"):
        made("pmd_token", log_ratio_low=0.1, log_ratio_high=0.2)
    with pytest.raises(ValueError, match=r"log_ratio_high(.|\n)*greater than or equal to 0"):
        made("pmd_token", log_ratio_low=-0.2, log_ratio_high=-0.1)


def test_arrays_that_do_not_belong_together_are_refused_by_name():
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="engine_log_probs"):
        LossInput(two, two, three, two, torch.zeros(2, dtype=torch.int64), two, two)
    with pytest.raises(ValueError, match="teacher_log_probs has shape"):
        LossInput(two, two, two, two, torch.zeros(2, dtype=torch.int64), two, two, three)
    with pytest.raises(ValueError, match="has no teacher_log_probs"):
        evaluated("distillation", LossInput(two, two, two, two, torch.zeros(2, dtype=torch.int64), two, two))
    with pytest.raises(ValueError, match="advantages"):
        LossInput(two, two, two, two, torch.zeros(2, dtype=torch.int64), torch.zeros(1, 2), two)
    with pytest.raises(ValueError, match="tau has shape"):
        LossInput(two, two, two, two, torch.zeros(2, dtype=torch.int64), two, three)


def test_cispo_lets_no_gradient_through_its_weight():
    """d/dlogπ of −sg[ρ] A log π is −ρ A, not −ρ A (1 + log π)."""
    log_probs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([-1.3], dtype=torch.float64)
    x = LossInput(
        log_probs, anchor, anchor, torch.ones(1), torch.tensor([0]), torch.tensor([2.0]), torch.ones(1)
    )
    (found,) = torch.autograd.grad(evaluated("cispo", x).sum, log_probs)
    assert found.item() == pytest.approx(-2 * math.exp(0.3))
