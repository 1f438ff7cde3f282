"""Learning from a teacher: the closed forms against direct minimisation of the losses on a bandit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pmd.algorithm.closed_form import log_partition, optimum_partition, optimum_teacher
from megatron_pmd.algorithm.losses import LossInput
from tests.algorithm.evaluated import evaluated

ARMS = 6
FORMS = ("token", "sequence")


def bandit(seed: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, and the probabilities of anchor and teacher, of each arm."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=ARMS), rng.dirichlet(np.full(ARMS, 2.0)), rng.dirichlet(np.full(ARMS, 2.0))


def minimised(logits: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=5000, tolerance_grad=1e-13, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = loss(logits)
        total.backward()
        return total

    optimizer.step(closure)
    return logits.detach()


def one_token(
    log_probs: torch.Tensor, anchor: torch.Tensor, teacher: torch.Tensor, values: np.ndarray
) -> LossInput:
    """Each arm is a response of one token."""
    return LossInput(
        log_probs, anchor, anchor, torch.ones(ARMS), torch.arange(ARMS), torch.tensor(values),
        torch.ones(ARMS), teacher,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_on_a_bandit_the_minimum_of_the_distillation_loss_is_the_teacher(form: str) -> None:
    rewards, p, q = bandit()
    anchor, teacher = torch.tensor(np.log(p)), torch.tensor(np.log(q))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        x = one_token(logits.log_softmax(0), anchor, teacher, rewards)
        return evaluated("distillation", x, form=form, mismatch=lambda _: anchor.exp()).sum

    found = minimised(anchor, loss).log_softmax(0)
    np.testing.assert_allclose(found.exp().numpy(), q, atol=1e-7)
    np.testing.assert_allclose(
        (found - anchor).numpy(), optimum_teacher(np.zeros(ARMS), p, q, 1.0, 1.0), atol=1e-6
    )


@pytest.mark.parametrize("form", FORMS)
def test_over_responses_of_two_tokens_the_minimum_is_the_teacher_at_every_prefix(form: str) -> None:
    """All responses of a vocabulary of three whose token 2 ends them, weighted by π_t."""
    rng = np.random.default_rng(2)
    anchors, teachers = (torch.tensor(rng.normal(size=(4, 3))).log_softmax(-1) for _ in range(2))
    longer = [[(0, first), (1 + first, second)] for first, second in itertools.product(range(2), range(3))]
    responses = [*longer, [(0, 2)]]
    rows, columns = torch.tensor([step for response in responses for step in response]).T
    sequence = torch.tensor([i for i, response in enumerate(responses) for _ in response])
    weights = torch.stack([torch.stack([anchors[s] for s in response]).sum() for response in responses]).exp()
    assert weights.sum().item() == pytest.approx(1)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        new, anchor, given = (table[rows, columns] for table in (logits.log_softmax(-1), anchors, teachers))
        ones = torch.ones(len(responses))
        x = LossInput(new, anchor, anchor, torch.ones(len(rows)), sequence, ones, ones, given)
        return evaluated("distillation", x, form=form, normaliser="none", mismatch=lambda _: weights).sum

    found = minimised(anchors, loss).log_softmax(-1)
    visited = [0, 1, 2]  # no response goes on after the token 2
    np.testing.assert_allclose(found[visited].numpy(), teachers[visited].numpy(), atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_with_a_reward_the_minimum_is_anchor_teacher_and_reward_multiplied(tau: float, weight: float) -> None:
    """π* ∝ π_t^(1−β) π_T^β e^(r/τ), written out here: by the closed form, and by minimising PMD-partition."""
    rewards, p, q = bandit()
    anchor = torch.tensor(np.log(p))
    product = p ** (1 - weight) * q**weight * np.exp(rewards / tau)
    expected = product / product.sum()
    closed = optimum_teacher(rewards, p, q, tau, weight)
    np.testing.assert_allclose(p * np.exp(closed), expected, rtol=1e-12)
    mixed = rewards + tau * weight * np.log(q / p)
    values = mixed - log_partition(mixed, p, tau)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        x = one_token(logits.log_softmax(0), anchor, anchor, values)
        return evaluated("pmd", x, tau=tau, mismatch=lambda _: anchor.exp()).sum

    np.testing.assert_allclose(minimised(anchor, loss).softmax(0).numpy(), expected, atol=1e-6)


def test_without_a_teachers_weight_the_mixture_is_plain_pmd_and_without_a_reward_the_teacher() -> None:
    rewards, p, q = bandit(7)
    np.testing.assert_allclose(
        optimum_teacher(rewards, p, q, 0.3, 0.0), optimum_partition(rewards, p, 0.3), atol=1e-12
    )
    np.testing.assert_allclose(p * np.exp(optimum_teacher([0.5] * ARMS, p, q, 0.3, 1.0)), q, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 10))
def test_the_teachers_log_ratio_needs_no_baseline(seed: int, tau: float) -> None:
    """E[e^d] = 1 under the anchor: τ log Z of the rewards τ d is 0."""
    _, p, q = bandit(seed)
    assert log_partition(tau * np.log(q / p), p, tau) == pytest.approx(0, abs=1e-12 * max(1, tau))


@pytest.mark.parametrize("form", FORMS)
def test_at_the_anchor_the_gradient_is_that_of_the_reverse_kl_to_the_teacher(form: str) -> None:
    """Autograd's, of Σ π (log π − log π_T) over the whole bandit."""
    _, p, q = bandit()
    anchor, teacher = torch.tensor(np.log(p)), torch.tensor(np.log(q))
    logits = anchor.clone().requires_grad_()
    x = one_token(logits.log_softmax(0), anchor, teacher, np.zeros(ARMS))
    loss = evaluated("distillation", x, form=form, mismatch=lambda _: anchor.exp()).sum
    log_policy = logits.log_softmax(0)
    kl = (log_policy.exp() * (log_policy - teacher)).sum()
    expected, found = (torch.autograd.grad(value, logits)[0] for value in (kl, loss))
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-12)


def test_a_teacher_that_rules_out_what_the_anchor_takes_has_no_closed_form() -> None:
    with pytest.raises(ValueError, match="the teacher must give every outcome of the anchor a probability"):
        optimum_teacher([0.0, 0.0], [0.5, 0.5], [1.0, 0.0], 1.0, 1.0)
    assert optimum_teacher([0.0, 0.0], [1.0, 0.0], [0.5, 0.5], 1.0, 0.0)[0] == 0.0
