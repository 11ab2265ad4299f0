"""DPO losses against numbers that a reader can check, against TRL's, at extreme margins, through their gradients."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.divergences import F_DIVERGENCES
from trainer.errors import UserError
from trainer.losses import (
    DPO_LOSSES,
    F_DIVERGENCE_LOSSES,
    LOSS_OPTIONS,
    NORMALISED_BY_TOKENS,
    PairLengths,
    PairLogps,
    preference_loss,
    sft_loss,
)

LN3, LN9 = math.log(3), math.log(9)
GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(os.environ.get("LOGRATIO_SHARED", Path(__file__).parents[2] / "shared"))
SMOOTHED = [name for name, options in LOSS_OPTIONS.items() if "label_smoothing" in options]


def logps(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> PairLogps:
    return PairLogps(torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype))


def lengths(chosen: list[int], rejected: list[int]) -> PairLengths:
    return PairLengths(torch.tensor(chosen), torch.tensor(rejected))


def smoothing(name: str) -> float:
    return 0.1 if name == "exo_pair" else 0.0


# --- values by hand --------------------------------------------------------------------------------------------------
# One pair with log-ratios a = ln 3 and b = -ln 3, so with beta = 1: s(a) = 3/4, s(b) = 1/4, d = ln 9, s(d) = 9/10.

BY_HAND = [
    ("sigmoid", {}, -math.log(0.9)),
    ("sigmoid", {"label_smoothing": 0.2}, -0.8 * math.log(0.9) - 0.2 * math.log(0.1)),
    ("sigmoid", {"beta": 0.5}, -math.log(0.75)),  # s(ln 9 / 2) = s(ln 3) = 3/4
    ("hinge", {}, 0.0),  # 1 - ln 9 = -1.197
    ("hinge", {"beta": 0.1}, 1 - 0.1 * LN9),
    ("ipo", {}, (LN3 / 2 + LN3 / 4 - 0.5) ** 2),  # 2 chosen and 4 rejected tokens
    ("ipo", {"beta": 0.25}, (0.75 * LN3 - 2) ** 2),
    ("robust", {"label_smoothing": 0.1}, (-0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / 0.8),
    ("robust", {}, -math.log(0.9)),
    ("exo_pair", {"label_smoothing": 0.1}, 0.0),  # the policy says (0.9, 0.1), and so does the label
    ("exo_pair", {"label_smoothing": 0.2}, 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)),
    ("nca_pair", {}, -1.5 * math.log(0.75) - 0.5 * math.log(0.25)),
    ("bco_pair", {}, -2 * math.log(0.75)),
    ("sppo_hard", {}, 2 * (LN3 - 0.5) ** 2),
    ("aot", {"label_smoothing": 0.2}, -0.8 * math.log(0.9) - 0.2 * math.log(0.1)),  # one pair: nothing to sort
    ("aot_unpaired", {"label_smoothing": 0.2}, -0.8 * math.log(0.9) - 0.2 * math.log(0.1)),
    ("apo_zero", {}, 0.25 + 0.25),
    ("apo_down", {}, 0.75 + 0.1),
    ("discopop", {"discopop_tau": 1.0}, 0.1 * -math.log(0.9) + 0.9 / 9),  # m = 9/10, e^-d = 1/9
    ("discopop", {"discopop_tau": 0.5}, -math.log(0.9) / 82 + 81 / 82 / 9),  # m = s(2 ln 9) = 81/82
    ("sigmoid_norm", {"beta": 4 / 3}, -math.log(0.75)),  # a/2 - b/4 = 3/4 ln 3
    ("sft", {}, 5.0),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_value_by_hand(name: str, options: dict, expected: float) -> None:
    policy = logps([-5.0], [-7.0])
    reference = logps([-5.0 - LN3], [-7.0 + LN3])
    loss = preference_loss(name, policy, reference, lengths([2], [4]), **{"beta": 1.0, **options})
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_every_loss_has_a_value_by_hand() -> None:
    assert {name for name, _, _ in BY_HAND} == set(DPO_LOSSES)


def test_the_docs_table_has_every_loss_and_divergence() -> None:
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    missing = [name for name in (*DPO_LOSSES, *F_DIVERGENCES) if f"\n| `{name}` " not in text]
    assert missing == []


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"])
def test_equal_models_give_ln_2_whatever_beta_is(name: str, beta: float) -> None:
    same = logps([-7.0, -1.0], [-9.0, -30.0])
    loss = preference_loss(name, same, same, lengths([3, 1], [4, 9]), beta=beta)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2), dtype=torch.float64))


def test_aot_sorts_policy_and_reference_apart() -> None:
    # pair                                  0   1
    # a                                     3  -1
    # b                                    -2   2
    # policy chosen - rejected              5  -1
    # reference chosen - rejected           0   2   so the two orders differ
    policy, reference = logps([3.0, 1.0], [-2.0, 2.0]), logps([0.0, 2.0], [0.0, 0.0])
    expected = {
        "sigmoid": [5.0, -3.0],  # a - b, row by row
        "aot": [-1.0, 3.0],  # sorted (-1, 5) - sorted (0, 2)
        "aot_unpaired": [1.0, 1.0],  # sorted (-1, 3) - sorted (-2, 2)
    }
    for name, margins in expected.items():
        loss = preference_loss(name, policy, reference, lengths([1, 1], [1, 1]), beta=0.5)
        by_hand = [math.log1p(math.exp(-0.5 * margin)) for margin in margins]
        assert loss.tolist() == pytest.approx(by_hand, abs=1e-12), name


def test_no_pairs_give_no_losses() -> None:
    for name in DPO_LOSSES:
        empty = logps([], [])
        loss = preference_loss(name, empty, empty, lengths([], []), label_smoothing=smoothing(name))
        assert loss.shape == (0,)


# --- values of TRL 1.16 ----------------------------------------------------------------------------------------------


def oracle_cases() -> list:
    files = [GOLDEN / "own_losses.json", SHARED / "oracles" / "trl_losses.json"]
    cases = []
    for file in files:
        if not file.exists():
            skip = pytest.mark.skip(reason=f"{file} is not there (set LOGRATIO_SHARED)")
            cases.append(pytest.param({}, {}, marks=skip, id=file.stem))
            continue
        oracle = json.loads(file.read_text())
        # LD-DPO needs log-probs a token, which the file does not hold.
        for case in [case for case in oracle["cases"] if "ld_alpha" not in case]:
            options = {key: value for key, value in case.items() if key not in ("loss", "loss_type")}
            label = "+".join(case["loss_type"] + [f"{key}={value}" for key, value in options.items()])
            cases.append(pytest.param(oracle["inputs"], case, id=f"{file.stem}-{label}"))
    return cases


@pytest.mark.parametrize(("inputs", "case"), oracle_cases())
def test_batch_loss_equals_trl(inputs: dict, case: dict) -> None:
    policy = logps(inputs["policy_chosen"], inputs["policy_rejected"], torch.float32)
    reference = logps(inputs["ref_chosen"], inputs["ref_rejected"], torch.float32)
    tokens = lengths(inputs["chosen_tokens"], inputs["rejected_tokens"])
    total = 0.0
    for name, weight in zip(case["loss_type"], case.get("loss_weights", [1.0, 1.0, 1.0]), strict=False):
        losses = preference_loss(
            name,
            policy,
            reference,
            tokens,
            beta=case.get("beta", 0.1),
            label_smoothing=case.get("label_smoothing", 0.0),
            f_divergence=case.get("f_divergence_type", "reverse_kl"),
        )
        count = tokens.chosen.sum() if name in NORMALISED_BY_TOKENS else losses.numel()
        total += weight * (losses.sum() / count).item()
    # The same inputs in the same float32: what is left is the order of a few additions.
    assert total == pytest.approx(case["loss"], rel=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(
    name: str, chosen_ratio: list[float], rejected_ratio: list[float], dtype: torch.dtype = torch.float64, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and their gradients towards chosen and rejected policy log-probs; the reference says 0 everywhere."""
    policy = logps(chosen_ratio, rejected_ratio, dtype)
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    zeros = logps([0.0] * len(chosen_ratio), [0.0] * len(chosen_ratio), dtype)
    tokens = lengths([2] * len(chosen_ratio), [3] * len(chosen_ratio))
    loss = preference_loss(name, policy, zeros, tokens, **{"label_smoothing": smoothing(name), **options})
    loss.sum().backward()
    rejected = torch.zeros_like(policy.rejected) if policy.rejected.grad is None else policy.rejected.grad
    return loss.detach(), policy.chosen.grad, rejected


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_gradient_is_the_derivative(name: str) -> None:
    reference, tokens = logps([-4.0, -6.0, -5.5], [-5.0, -3.0, -7.0]), lengths([2, 3, 4], [5, 1, 2])
    policy = logps([-3.0, -6.5, -5.0], [-5.5, -2.0, -7.7])

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        pair = PairLogps(chosen, rejected)
        return preference_loss(name, pair, reference, tokens, beta=0.7, label_smoothing=0.1, discopop_tau=0.5)

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", [name for name in DPO_LOSSES if name not in ("apo_down", "discopop", "sft")])
def test_at_the_start_chosen_goes_up_and_rejected_down(name: str) -> None:
    _, chosen, rejected = gradients(name, [0.0], [0.0])
    assert chosen.item() < 0 < rejected.item()


def test_apo_down_lowers_both_once_they_are_apart() -> None:
    # beta = 1, a = ln 3, b = -ln 3: d/da = s'(a) - s'(d) = 3/16 - 9/100, d/db = s'(d) = 9/100
    _, chosen, rejected = gradients("apo_down", [LN3], [-LN3], beta=1.0)
    assert (chosen.item(), rejected.item()) == (pytest.approx(3 / 16 - 0.09), pytest.approx(0.09))


def test_discopop_slopes_the_wrong_way_at_the_start() -> None:
    # x = 0, tau = 0.05: m = 1/2, m' = 5; slope = 5 (1 - ln 2) - 1/4 - 1/2 = 0.784, times beta = 0.1
    _, chosen, rejected = gradients("discopop", [0.0], [0.0])
    slope = 0.1 * (5 * (1 - math.log(2)) - 0.75)
    assert (chosen.item(), rejected.item()) == (pytest.approx(slope), pytest.approx(-slope))


def test_sft_is_the_negative_sum() -> None:
    assert sft_loss(torch.tensor([-2.5, -1.0])).tolist() == [2.5, 1.0]


def test_sft_ignores_the_rejected_completion() -> None:
    _, chosen, rejected = gradients("sft", [-3.0], [-4.0])
    assert (chosen.item(), rejected.item()) == (-1.0, 0.0)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_the_reference_gets_no_gradient(name: str) -> None:
    policy, reference = logps([-3.0, -6.0], [-4.0, -5.0]), logps([-3.5, -5.0], [-4.5, -5.0])
    for tensor in (policy.chosen, policy.rejected, reference.chosen, reference.rejected):
        tensor.requires_grad_()
    tokens = lengths([2, 2], [3, 3])
    divergences = ["reverse_kl", "js_divergence"] if name in F_DIVERGENCE_LOSSES else ["reverse_kl"]
    for divergence in divergences:
        options = {"label_smoothing": smoothing(name), "f_divergence": divergence}
        preference_loss(name, policy, reference, tokens, **options).sum().backward()
    assert policy.chosen.grad is not None
    assert reference.chosen.grad is None and reference.rejected.grad is None


@pytest.mark.parametrize("tau", [0.05, 1.0])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_extreme_margins_stay_finite(name: str, tau: float) -> None:
    far, none = 1e4, 0.0
    chosen, rejected = [far, -far, far, -far, none, none], [-far, far, none, none, far, -far]
    for label_smoothing in {smoothing(name), 0.1}:
        options = {"beta": 0.1, "label_smoothing": label_smoothing, "discopop_tau": tau}
        for values in gradients(name, chosen, rejected, torch.float32, **options):
            assert torch.isfinite(values).all(), values


@pytest.mark.parametrize(
    ("name", "expected", "slope"),
    [
        ("sigmoid", 1000.0, -0.1),
        ("discopop", 1000.0, -0.1),
        ("hinge", 1001.0, -0.1),
        ("exo_pair", -math.log(0.1), 0.0),  # KL from (0, 1) to (0.9, 0.1): flat, however wrong the pair is
        ("sppo_hard", 2 * 5005.0**2, -2 * 5005.0),
    ],
)
def test_extreme_margins_have_the_right_limit(name: str, expected: float, slope: float) -> None:
    # a = -5000, b = 5000, beta = 0.1: beta d = -1000
    loss, chosen, rejected = gradients(name, [-5e3], [5e3], torch.float32, beta=0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert (chosen.item(), rejected.item()) == (pytest.approx(slope, rel=1e-6), pytest.approx(-slope, rel=1e-6))


# --- what a user can get wrong ---------------------------------------------------------------------------------------

MISTAKES = [
    ("sigmod", {}, "loss_type = 'sigmod': unknown; nearest is 'sigmoid', known are sigmoid, hinge"),
    ("sigmoid", {"beta": 0.0}, "beta = 0.0: must be > 0"),
    ("sigmoid", {"beta": math.nan}, "beta = nan: must be > 0"),
    ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing = 0.5: must be at least 0 and below 0.5"),
    ("aot", {"label_smoothing": -0.1}, "label_smoothing = -0.1: must be at least 0"),
    ("robust", {"label_smoothing": 0.5}, "label_smoothing = 0.5: must be at least 0 and below 0.5"),
    ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing = 0: exo_pair takes its logarithm and needs more than 0"),
    ("discopop", {"discopop_tau": 0.0}, "discopop_tau = 0.0: must be above 0 and at most 1"),
    ("discopop", {"discopop_tau": 1.5}, "discopop_tau = 1.5: must be above 0 and at most 1"),
    ("sigmoid", {"f_divergence": "kl"}, "f_divergence = 'kl': unknown; nearest is 'reverse_kl'"),
    ("aot", {"f_divergence": "forward_kl"}, "f_divergence = 'forward_kl': not defined for loss_type 'aot'"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_mistakes_are_named(name: str, options: dict, message: str) -> None:
    pair = logps([-1.0], [-2.0])
    with pytest.raises(UserError) as error:
        preference_loss(name, pair, pair, lengths([1], [1]), **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", SMOOTHED)
def test_smallest_label_smoothing_is_near_none(name: str) -> None:
    # exo_pair alone has no limit at 0: -s(-x) log eps grows without bound
    tiny, _, _ = gradients(name, [LN3], [-LN3], label_smoothing=1e-9)
    if name == "exo_pair":
        assert tiny.item() > 5
    else:
        none, _, _ = gradients(name, [LN3], [-LN3], label_smoothing=0.0)
        assert tiny.item() == pytest.approx(none.item(), abs=1e-8)
