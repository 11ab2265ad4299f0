"""Losses as pure functions of log-probabilities. They know no model, batch, config or rank, and hold no state.

Log-probs are natural logarithms summed over a completion's scored tokens, in nats. Gradients flow into the policy only;
a reference is detached here whatever it carries. Every loss returns one value a pair; dividing by a global count and
adding weighted losses is the caller's business.

Letters: P pairs, N scored tokens, S segments (completions). In formulas: a and b are the log-ratios policy - reference
of chosen and rejected, d = a - b, s the logistic function, eps the label smoothing. docs/losses.md has the table.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter, signature

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.divergences import F_DIVERGENCES, LOG_2, divergence_score
from trainer.errors import UserError


@dataclass(frozen=True)
class PairLogps:
    """Summed completion log-probs of P pairs, nats; each field (P,) float32 (float64 is kept)."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PairLengths:
    """Scored tokens of each completion, at least 1; each field (P,), integer or float."""

    chosen: Tensor
    rejected: Tensor


# --- sums over tokens ------------------------------------------------------------------------------------------------


def segment_sums(token_logps: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """Log-probs (N,) summed by the segment of each token, (N,) int64 -> (S,) float32; 0 for a segment without tokens.

    Accumulated in float64: a float32 sum over thousands of tokens loses the digits in which policy and reference
    differ. float64 input gives float64.
    """
    sums = token_logps.new_zeros(num_segments, dtype=torch.float64).index_add(0, segments, token_logps.double())
    return sums if token_logps.dtype == torch.float64 else sums.float()


def ld_logps(
    token_logps: Tensor, segments: Tensor, positions: Tensor, shared_length: Tensor, num_segments: int, alpha: float
) -> Tensor:
    """LD-DPO's length-desensitised sums, (S,) float32 (float64 for float64), nats.

    A completion's first `shared_length` tokens count fully, later ones `alpha` times, 0 <= alpha <= 1 (Liu et al. 2024,
    arXiv 2409.06411). token_logps (N,), segments (N,) int64, positions (N,) int64: 0, 1, 2, ... within the completion;
    shared_length (S,) int64: the shorter completion's length of the segment's pair. Policy and reference both use this.
    """
    inside = positions < shared_length.index_select(0, segments)
    return segment_sums(torch.where(inside, token_logps, alpha * token_logps), segments, num_segments)


# --- losses that use a reference -------------------------------------------------------------------------------------


def _logratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    return policy.chosen - reference.chosen.detach(), policy.rejected - reference.rejected.detach()


def _margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    chosen, rejected = _logratios(policy, reference)
    return chosen - rejected


def _mean_margin(policy: PairLogps, reference: PairLogps, lengths: PairLengths) -> Tensor:
    chosen, rejected = _logratios(policy, reference)
    return chosen / lengths.chosen - rejected / lengths.rejected


def _logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-eps) log s(x) - eps log s(-x)."""
    _check_label_smoothing(label_smoothing)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def sigmoid_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); label_smoothing > 0 is cDPO (Mitchell 2023). (P,)"""
    return _logistic(beta * _margin(policy, reference), label_smoothing)


def hinge_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """max(0, 1 - beta d): the hinge of SLiC (Zhao et al. 2023, arXiv 2305.10425) as RSO normalises it
    (Liu et al. 2023, arXiv 2309.06657). (P,)"""
    return F.relu(1 - beta * _margin(policy, reference))


def ipo_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17; beta is the paper's tau) on log-ratios a token. (P,)

    The paper writes sums; a target of 1 / (2 beta) nats makes sense for every length only a token, and TRL does so too.
    """
    return (_mean_margin(policy, reference, lengths) - 1 / (2 * beta)) ** 2


def robust_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean loss when labels are flipped with probability eps
    (Chowdhury et al. 2024, arXiv 2403.00409). Can be negative; 0 <= eps < 0.5. (P,)"""
    _check_label_smoothing(label_smoothing)
    logits = beta * _margin(policy, reference)
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, label_smoothing: float
) -> Tensor:
    """EXO for pairs: KL from (s(beta d), s(-beta d)) to the smoothed label (1-eps, eps), 0 < eps < 0.5
    (Ji et al. 2024, arXiv 2402.00856, eq. 16; the paper takes 1e-3). (P,)"""
    _check_label_smoothing(label_smoothing, needed=True)
    logits = beta * _margin(policy, reference)
    keep = logits.sigmoid() * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    flip = (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return keep + flip


def nca_pair_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """NCA for pairs: -log s(beta a) - 0.5 log s(-beta a) - 0.5 log s(-beta b)
    (Chen et al. 2024, arXiv 2402.05369). (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return -F.logsigmoid(beta * chosen) - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)


def bco_pair_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """BCO for pairs: -log s(beta a) - log s(-beta b), without the paper's running reward shift
    (Jung et al. 2024, arXiv 2404.04656), which would be state. (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """SPPO with win rates 1 and 0: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2
    (Wu et al. 2024, arXiv 2405.00675, eq. 4.7). (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, paired: the policy's and the reference's chosen - rejected differences are sorted apart, then compared rank
    by rank (Melnyk et al. 2024, arXiv 2406.05882). (P,) by rank, not by row: only its sum has a meaning."""
    ours = policy.chosen - policy.rejected
    theirs = (reference.chosen - reference.rejected).detach()
    return _logistic(beta * (ours.sort().values - theirs.sort().values), label_smoothing)


def aot_unpaired_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired: all chosen log-ratios sorted against all rejected ones (source and order as `aot_loss`). (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return _logistic(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def apo_zero_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """APO-zero: 1 - s(beta a) + s(beta b) (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7). (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """APO-down: s(beta a) + 1 - s(beta d) (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8). (P,)"""
    chosen, rejected = _logratios(policy, reference)
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def discopop_loss(
    policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float, discopop_tau: float
) -> Tensor:
    """DiscoPOP: (1-m) (-log s(x)) + m e^-x with x = beta d, m = s(x / tau), 0 < tau <= 1
    (Lu et al. 2024, arXiv 2406.08414, eq. 5). (P,)"""
    logits = beta * _margin(policy, reference)
    # m e^-x as one exponential: at x = -1000 the factors are 0 and inf.
    exponential = (F.logsigmoid(logits / discopop_tau) - logits).exp()
    return (-logits / discopop_tau).sigmoid() * -F.logsigmoid(logits) + exponential


def sigmoid_norm_loss(policy: PairLogps, reference: PairLogps, lengths: PairLengths, *, beta: float) -> Tensor:
    """Length-normalised DPO: -log s(beta (a / |chosen| - b / |rejected|)) (Lambert et al. 2024, Tulu 3,
    arXiv 2411.15124). (P,)"""
    return _logistic(beta * _mean_margin(policy, reference, lengths))


def sft_loss(policy_chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen completions, sums (P,): divide by scored tokens, not by pairs."""
    return -policy_chosen_logps


def _sft_of_pair(policy: PairLogps, reference: PairLogps, lengths: PairLengths) -> Tensor:
    return sft_loss(policy.chosen)


DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "sft": _sft_of_pair,
}

LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(p.name for p in signature(loss).parameters.values() if p.kind is Parameter.KEYWORD_ONLY)
    for name, loss in DPO_LOSSES.items()
}
"""The options each loss takes, e.g. "hinge": ("beta",)."""

NORMALISED_BY_TOKENS = frozenset({"sft"})
"""Losses whose sum is divided by the scored tokens of the global batch; all others by its pairs."""

F_DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"})
"""Losses that take another divergence than reverse KL: those of chosen minus rejected (trainer/divergences.py says why)
and `sft`, which has no reference. `aot*` sort before they subtract and stay out."""


def preference_loss(
    loss_type: str,
    policy: PairLogps,
    reference: PairLogps,
    lengths: PairLengths,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
) -> Tensor:
    """One loss of `DPO_LOSSES` by name, (P,); an option that the loss does not take is left aside.

    Raises UserError on an unknown name (with the nearest known one) and on values that the loss cannot take.
    """
    _check_loss(loss_type, beta, label_smoothing, f_divergence, discopop_tau)
    options = {"beta": beta, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
    taken = {name: options[name] for name in LOSS_OPTIONS[loss_type]}
    if f_divergence != "reverse_kl":
        chosen, rejected = _logratios(policy, reference)
        policy = PairLogps(
            chosen=divergence_score(chosen, f_divergence, f_alpha_divergence_coef),
            rejected=divergence_score(rejected, f_divergence, f_alpha_divergence_coef),
        )
        reference = PairLogps(chosen=torch.zeros_like(chosen), rejected=torch.zeros_like(rejected))
    return DPO_LOSSES[loss_type](policy, reference, lengths, **taken)


# --- losses without a reference --------------------------------------------------------------------------------------


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, same shape and dtype; never NaN, finite with finite gradient at x = 0.

    Two branches keep the digits on both sides of -ln 2 (Maechler 2012). x nearer 0 than the dtype's rounding unit (or
    above 0, by rounding) counts as that unit: 1 - e^x is noise there, and its gradient 1/x would swamp the step.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -LOG_2, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


def orpo_odds_term(mean_chosen: Tensor, mean_rejected: Tensor) -> tuple[Tensor, Tensor]:
    """ORPO's (log s(log odds ratio), log odds ratio), each (P,), from mean log-probs a token, (P,) each.

    odds(y) = P / (1 - P) with log P the completion's mean log-prob. The loss is NLL - beta * the first value; beta is
    the paper's lambda (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).
    """
    log_odds = (mean_chosen - mean_rejected) - (log1mexp(mean_chosen) - log1mexp(mean_rejected))
    return F.logsigmoid(log_odds), log_odds


def simpo_loss(
    policy: PairLogps, lengths: PairLengths, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO: -log s(beta (mean chosen - mean rejected) - gamma) (Meng et al. 2024, arXiv 2405.14734, eq. 6). (P,)"""
    margin = policy.chosen / lengths.chosen - policy.rejected / lengths.rejected
    return _logistic(beta * margin - gamma, label_smoothing)


CPO_LOSSES = ("sigmoid", "hinge", "ipo")


def cpo_loss(
    policy: PairLogps,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: PairLengths | None = None,
) -> Tensor:
    """CPO's preference term, (P,): DPO with a uniform reference (Xu et al. 2024, arXiv 2401.08417).

    The NLL of the chosen completions is the caller's to add. `ipo` works on means a token, as in `ipo_loss`, and needs
    `lengths`; `sigmoid` and `hinge` take sums. Only `sigmoid` takes label_smoothing. UserError on an unknown name.
    """
    _check_known("loss_type", loss_type, CPO_LOSSES)
    if loss_type == "ipo":
        if lengths is None:
            raise ValueError("cpo_loss: loss_type 'ipo' needs lengths")
        mean_margin = policy.chosen / lengths.chosen - policy.rejected / lengths.rejected
        return (mean_margin - 1 / (2 * beta)) ** 2
    logits = beta * (policy.chosen - policy.rejected)
    return F.relu(1 - logits) if loss_type == "hinge" else _logistic(logits, label_smoothing)


# --- checks ----------------------------------------------------------------------------------------------------------


def step_loss(logits: Tensor, labels: Tensor, *, loss: str = "bce") -> Tensor:
    """Loss per step, (N,) nats (bce) or squared error (mse), of a process reward model (Lightman et al. 2023, 0 or 1;
    Wang et al. 2024, shares). mse is the Brier score.

    logits: (N,) float32 log-odds that the step is right. labels: (N,) float32 from 0 to 1; with 0 and 1 bce is the
    cross-entropy of two classes.
    """
    if loss == "mse":
        return (logits.sigmoid() - labels).square()
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def _check_loss(name: str, beta: float, label_smoothing: float, f_divergence: str, discopop_tau: float) -> None:
    _check_known("loss_type", name, DPO_LOSSES)
    _check_known("f_divergence", f_divergence, F_DIVERGENCES)
    if not beta > 0:
        raise UserError(f"beta = {beta}: must be > 0")
    if "label_smoothing" in LOSS_OPTIONS[name]:
        _check_label_smoothing(label_smoothing, needed=name == "exo_pair")
    if name == "discopop" and not 0 < discopop_tau <= 1:
        raise UserError(f"discopop_tau = {discopop_tau}: must be above 0 and at most 1")
    if f_divergence != "reverse_kl" and name not in F_DIVERGENCE_LOSSES:
        raise UserError(
            f"f_divergence = {f_divergence!r}: not defined for loss_type {name!r}; use 'reverse_kl', or one of "
            + ", ".join(sorted(F_DIVERGENCE_LOSSES))
        )


def _check_label_smoothing(value: float, *, needed: bool = False) -> None:
    if not 0 <= value < 0.5:
        raise UserError(f"label_smoothing = {value}: must be at least 0 and below 0.5")
    if needed and value == 0:
        raise UserError(
            "label_smoothing = 0: exo_pair takes its logarithm and needs more than 0 (its paper uses 0.001)"
        )


def _check_known(option: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"{option} = {name!r}: unknown; nearest is {nearest!r}, known are {', '.join(names)}")
