"""f-divergence scores by hand, against each other in the limits, and far out."""

import math

import pytest
import torch
from torch import Tensor

from trainer.divergences import EXPONENT_LIMIT, F_DIVERGENCES, divergence_score
from trainer.losses import F_DIVERGENCE_LOSSES, PairLengths, PairLogps, preference_loss


def score(u: float, name: str, alpha: float = 0.5) -> float:
    return divergence_score(torch.tensor(math.log(u), dtype=torch.float64), name, alpha).item()


@pytest.mark.parametrize(
    ("name", "at_4", "at_quarter"),
    [
        ("reverse_kl", math.log(4), -math.log(4)),  # log u
        ("forward_kl", 0.75, -3.0),  # 1 - 1/u
        ("js_divergence", math.log(1.6), math.log(0.4)),  # log (2u / (1 + u))
        ("alpha_divergence", 1.0, -2.0),  # (u^-1/2 - 1) / (-1/2) = 2 (1 - 1/sqrt u)
    ],
)
def test_score_by_hand(name: str, at_4: float, at_quarter: float) -> None:
    assert score(4.0, name) == pytest.approx(at_4)
    assert score(0.25, name) == pytest.approx(at_quarter)
    assert score(1.0, name) == 0.0


@pytest.mark.parametrize("u", [0.2, 3.0])
def test_alpha_divergence_ends_at_forward_and_reverse_kl(u: float) -> None:
    assert score(u, "alpha_divergence", 0.0) == pytest.approx(score(u, "forward_kl"))
    assert score(u, "alpha_divergence", 1.0) == score(u, "reverse_kl")
    assert score(u, "alpha_divergence", 1 - 1e-9) == pytest.approx(score(u, "reverse_kl"), rel=1e-8)


def test_js_loss_by_hand() -> None:
    # u = 3 and 1/3: log 1.5 - log 0.5 = log 3, s(log 3) = 3/4
    policy = PairLogps(torch.tensor([math.log(3) - 8]), torch.tensor([-math.log(3) - 6]))
    reference = PairLogps(torch.tensor([-8.0]), torch.tensor([-6.0]))
    lengths = PairLengths(torch.tensor([2]), torch.tensor([2]))
    loss = preference_loss("sigmoid", policy, reference, lengths, beta=1.0, f_divergence="js_divergence")
    assert loss.item() == pytest.approx(-math.log(0.75), abs=1e-6)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_gradient_is_the_derivative_on_both_sides_of_the_limit(name: str) -> None:
    far = EXPONENT_LIMIT + 2
    ratios = torch.tensor([-far, -1.0, 0.0, 1.0, far], dtype=torch.float64, requires_grad=True)

    def scaled(logratio: Tensor) -> Tensor:
        # divided by the size of the largest score, so that one absolute tolerance serves all
        return divergence_score(logratio, name, 0.0) / torch.tensor([math.exp(far), 1, 1, 1, 1], dtype=torch.float64)

    assert torch.autograd.gradcheck(scaled, ratios)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", sorted(F_DIVERGENCE_LOSSES))
def test_extreme_ratios_stay_finite(name: str, divergence: str) -> None:
    policy = PairLogps(torch.tensor([1e4, -1e4, 0.0, -1e4]), torch.tensor([-1e4, 1e4, -1e4, -1e4]))
    zeros = PairLogps(torch.zeros(4), torch.zeros(4))
    lengths = PairLengths(torch.ones(4), torch.ones(4))
    loss = preference_loss(
        name,
        PairLogps(policy.chosen.requires_grad_(), policy.rejected.requires_grad_()),
        zeros,
        lengths,
        label_smoothing=0.1,
        f_divergence=divergence,
    )
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(policy.chosen.grad).all()
    assert policy.rejected.grad is None or torch.isfinite(policy.rejected.grad).all()


def test_a_chosen_completion_far_below_the_reference_is_still_pulled_up() -> None:
    ratio = torch.tensor([-200.0], requires_grad=True)
    divergence_score(ratio, "forward_kl").backward()
    assert ratio.grad.item() == pytest.approx(math.exp(EXPONENT_LIMIT), rel=1e-5)
