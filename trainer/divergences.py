"""The f-divergences of f-DPO: what plays the part of the log-ratio when the tie to the reference is not reverse KL.

Wang et al. 2023 (arXiv 2309.16240): with u = policy(y) / reference(y), the implicit reward is beta * f'(u) plus a term
that depends on the prompt only. That term cancels in chosen minus rejected and nowhere else. Each score below is 0 at
u = 1 (the constant matters to losses that divide each side by its own length) and grows with u.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2 = 0.6931471805599453

# exp is continued by its tangent past e^30: the square of the largest score a run can meet (a log-ratio of 1e4) still
# fits float32, and unlike with a hard clamp the gradient of a pair beyond the limit does not vanish.
EXPONENT_LIMIT = 30.0


def divergence_score(logratio: Tensor, f_divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(u) at u = e^logratio, same shape and dtype as `logratio` (nats).

    alpha: the coefficient of `alpha_divergence` only; f'(u) = (u^(alpha-1) - 1) / (alpha - 1), whose limits are
    reverse KL at 1 and forward KL at 0 (the paper's alpha is 1 minus this one).
    f_divergence: a key of F_DIVERGENCES.
    """
    return F_DIVERGENCES[f_divergence](logratio, alpha)


def _reverse_kl(logratio: Tensor, alpha: float) -> Tensor:
    return logratio


def _forward_kl(logratio: Tensor, alpha: float) -> Tensor:
    return -_expm1_bounded(-logratio)


def _js_divergence(logratio: Tensor, alpha: float) -> Tensor:
    return LOG_2 + F.logsigmoid(logratio)


def _alpha_divergence(logratio: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return logratio
    return _expm1_bounded((alpha - 1.0) * logratio) / (alpha - 1.0)


def _expm1_bounded(exponent: Tensor) -> Tensor:
    inside = exponent.clamp(max=EXPONENT_LIMIT)
    return torch.expm1(inside) + inside.exp() * (exponent - inside)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
