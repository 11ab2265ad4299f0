"""ORPO, SimPO, CPO and the sums over tokens, against numbers that a reader can check and against TRL's."""

import math

import pytest
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.losses import (
    CPO_LOSSES,
    PairLengths,
    PairLogps,
    cpo_loss,
    ld_logps,
    log1mexp,
    orpo_odds_term,
    segment_sums,
    simpo_loss,
)

LN3, LN9 = math.log(3), math.log(9)


def logps(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype))


def lengths(chosen: list[int], rejected: list[int]) -> PairLengths:
    return PairLengths(torch.tensor(chosen), torch.tensor(rejected))


# --- ORPO, SimPO, CPO ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-1e-3, -0.5, -math.log(2), -1.0, -50.0, -700.0])
def test_log1mexp_by_hand(x: float) -> None:
    small = math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x))
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(small, rel=1e-14)
    # float32 gets the tiny result too: log(1 - e^-50) = -1.9e-22, where a naive form returns 0
    assert log1mexp(torch.tensor(x)).item() == pytest.approx(small, rel=1e-5, abs=1e-37)


def test_log1mexp_at_zero_is_the_value_at_the_rounding_unit() -> None:
    x = torch.tensor([0.0, -1e-8, -0.0, 1e-6], requires_grad=True)
    value = log1mexp(x)
    assert value.tolist() == pytest.approx([math.log(2**-23)] * 4, rel=1e-5)
    value.sum().backward()
    assert torch.isfinite(x.grad).all()


# ORPO rows of TRL 1.16 on our own pairs 0..3: mean log-probs of chosen and rejected, log odds, its log sigmoid.
TRL_ORPO = [
    (-1.1148319244384766, -1.3791388273239136, 0.3716810941696167, -0.5244764685630798),
    (-2.839547634124756, -2.5239388942718506, -0.3389160633087158, -0.8768950700759888),
    (-1.22256338596344, -1.505117416381836, 0.38034868240356445, -0.520948052406311),
    (-1.4183378219604492, -1.1503715515136719, -0.37129777669906616, -0.8959307670593262),
]


def test_orpo_equals_trl() -> None:
    chosen, rejected, log_odds, log_sigmoid = (torch.tensor(column) for column in zip(*TRL_ORPO, strict=True))
    ours = orpo_odds_term(chosen, rejected)
    torch.testing.assert_close(ours, (log_sigmoid, log_odds), rtol=1e-6, atol=1e-6)


def test_orpo_by_hand() -> None:
    # P = 3/4 has odds 3, P = 1/4 has odds 1/3: the ratio is 9 and s(ln 9) = 9/10
    log_sigmoid, log_odds = orpo_odds_term(torch.tensor([0.75]).log().double(), torch.tensor([0.25]).log().double())
    assert log_odds.item() == pytest.approx(LN9, rel=1e-6)
    assert log_sigmoid.item() == pytest.approx(math.log(0.9), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [0.0, -1e-8, -1.0, -50.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-8, -1.0, -50.0])
def test_orpo_is_never_nan(chosen: float, rejected: float, dtype: torch.dtype) -> None:
    means = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (chosen, rejected)]
    log_sigmoid, log_odds = orpo_odds_term(*means)
    (-log_sigmoid).sum().backward()
    for tensor in (log_sigmoid, log_odds, means[0].grad, means[1].grad):
        assert torch.isfinite(tensor).all()
    assert means[0].grad.item() <= 0 <= means[1].grad.item()
    if chosen == rejected:
        assert log_odds.item() == 0.0


def test_orpo_gradient_is_the_derivative() -> None:
    means = [torch.tensor(values, dtype=torch.float64) for values in ([-0.2, -3.0, -0.7], [-1.0, -0.1, -9.0])]
    assert torch.autograd.gradcheck(orpo_odds_term, [mean.requires_grad_() for mean in means])


def test_simpo_by_hand() -> None:
    # means: 4 ln 3 / 2 = 2 ln 3 and 3 ln 3 / 3 = ln 3; beta = 3, gamma = ln 3: logit 2 ln 3, s = 9/10
    policy, tokens = logps([4 * LN3], [3 * LN3]), lengths([2], [3])
    plain = simpo_loss(policy, tokens, beta=3.0, gamma=LN3)
    smoothed = simpo_loss(policy, tokens, beta=3.0, gamma=LN3, label_smoothing=0.2)
    assert plain.item() == pytest.approx(-math.log(0.9))
    assert smoothed.item() == pytest.approx(-0.8 * math.log(0.9) - 0.2 * math.log(0.1))


def test_cpo_by_hand() -> None:
    policy, tokens = logps([-5.0], [-5.0 - LN9]), lengths([2], [4])
    assert cpo_loss(policy, beta=1.0).item() == pytest.approx(-math.log(0.9))
    assert cpo_loss(policy, beta=1.0, label_smoothing=0.2).item() == pytest.approx(
        -0.8 * math.log(0.9) - 0.2 * math.log(0.1)
    )
    assert cpo_loss(policy, beta=0.1, loss_type="hinge").item() == pytest.approx(1 - 0.1 * LN9)
    # means -2.5 and (-5 - ln 9) / 4, target 1 / (2 * 0.5) = 1
    by_hand = (-2.5 + (5 + LN9) / 4 - 1) ** 2
    assert cpo_loss(policy, beta=0.5, loss_type="ipo", lengths=tokens).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["simpo", *CPO_LOSSES])
def test_gradients_without_a_reference(name: str) -> None:
    tokens = lengths([2, 3], [5, 1])

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        policy = PairLogps(chosen, rejected)
        if name == "simpo":
            return simpo_loss(policy, tokens, beta=2.0, gamma=0.5, label_smoothing=0.1)
        return cpo_loss(policy, beta=0.1, loss_type=name, lengths=tokens)

    near, far = logps([-5.0, -9.0], [-6.0, -7.0]), logps([-1e4, 0.0, -1e4], [0.0, -1e4, -1e4], torch.float32)
    assert torch.autograd.gradcheck(loss, (near.chosen.requires_grad_(), near.rejected.requires_grad_()))
    tokens = lengths([1, 1, 1], [1, 1, 1])
    values = loss(far.chosen.requires_grad_(), far.rejected.requires_grad_())
    values.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (values, far.chosen.grad, far.rejected.grad))


def test_cpo_mistakes() -> None:
    policy = logps([-1.0], [-2.0])
    with pytest.raises(UserError, match="loss_type = 'hing': unknown; nearest is 'hinge'"):
        cpo_loss(policy, beta=0.1, loss_type="hing")
    with pytest.raises(ValueError, match="'ipo' needs lengths"):
        cpo_loss(policy, beta=0.1, loss_type="ipo")


# --- sums over tokens ------------------------------------------------------------------------------------------------


def test_segment_sums_by_hand() -> None:
    sums = segment_sums(torch.tensor([-1.0, -2.0, -4.0, -8.0]), torch.tensor([0, 2, 0, 2]), 4)
    assert sums.tolist() == [-5.0, 0.0, -10.0, 0.0]
    assert sums.dtype == torch.float32


def test_segment_sums_accumulate_in_float64() -> None:
    # 2^24 + 1 + 1: float32 drops each 1 when it adds one after another
    tokens = torch.tensor([-(2.0**24), -1.0, -1.0])
    assert segment_sums(tokens, torch.zeros(3, dtype=torch.int64), 1).item() == -(2.0**24) - 2


def test_ld_logps_by_hand() -> None:
    # segment 0 has 3 tokens, its partner 2: the third counts half; segment 1 is the shorter one and counts fully
    tokens, segments = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), torch.tensor([0, 0, 0, 1, 1])
    positions, shared = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2])

    def sums(alpha: float) -> list[float]:
        return ld_logps(tokens, segments, positions, shared, 2, alpha).tolist()

    assert sums(0.5) == [-5.0, -24.0]
    assert sums(0.0) == [-3.0, -24.0]
    assert sums(1.0) == segment_sums(tokens, segments, 2).tolist()


def test_token_sums_pass_gradients_on() -> None:
    tokens = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64, requires_grad=True)
    segments, positions = torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])
    assert torch.autograd.gradcheck(lambda t: segment_sums(t, segments, 2), tokens)
    ld_logps(tokens, segments, positions, torch.tensor([1, 1]), 2, 0.25).sum().backward()
    assert tokens.grad.tolist() == [1.0, 1.0, 0.25]
