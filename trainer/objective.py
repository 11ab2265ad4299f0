"""From token log-probs of a stream to the step's loss and metrics, for every training objective.

Losses are sums divided by counts of the whole global batch, so micro-batches and ranks add up exactly. The counts
follow from the plan alone: no forward and no collective is needed to know them.

Letters: N scored tokens, S segments, P pairs. A pair owns three segments: prompt, chosen, rejected.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data_tools.encode import Group
from trainer import losses
from trainer.batch import Stream, build_stream
from trainer.config import LossConfig
from trainer.losses import PairLengths, PairLogps


@dataclass(frozen=True)
class Counts:
    """What a global batch's sums are divided by: weighted pairs (or examples, or steps), weighted tokens of the NLL
    term, and the plain number of pairs (or steps) for metrics; right and wrong: of the steps."""

    weight: float
    nll_tokens: float
    groups: int
    right: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Terms:
    """One micro-batch: `loss` (scalar, float32) carries the gradient; `sums` are detached scalars to add up over
    micro-batches and ranks, named as the metrics and already divided by the step's counts. steps: (N, 2) score and
    hard label of each step, for what compares steps with each other; None for other objectives."""

    loss: Tensor
    sums: dict[str, Tensor]
    steps: Tensor | None = None


class Objective:
    """One training objective: `dpo`, `orpo`, `simpo`, `cpo` or `sft` with its loss settings (`prm`: trainer.prm)."""

    output: Literal["logps"] = "logps"
    """What the model is asked for."""
    compares_steps = False

    def __init__(self, name: str, config: LossConfig) -> None:
        self.name = name
        self.config = config

    @property
    def needs_reference(self) -> bool:
        return self.name == "dpo"

    @property
    def is_pairwise(self) -> bool:
        return self.name != "sft"

    @property
    def scores_prompt(self) -> bool:
        """ORPO's NLL runs over prompt and chosen completion, as in its paper, unless told otherwise."""
        return self.name == "orpo" and self.config.orpo_nll == "full"

    def stream(self, groups: Sequence[Group]) -> Stream:
        """The micro-batch, with the tokens that this objective scores."""
        return build_stream(groups, score_prompt=self.scores_prompt)

    def count(self, groups: Iterable[Group]) -> Counts:
        """Counts of a global batch: give it all groups of the step, over all ranks."""
        weight = nll_tokens = 0.0
        number = 0
        for group in groups:
            weight += group.weight
            scored = sum(stop - start for start, stop in group.spans[1])
            if group.lengths[0] == 0 and group.spans[1] and group.spans[1][0][0] == 0:
                scored -= 1  # no token predicts the first one
            if self.scores_prompt:
                scored += max(0, group.lengths[0] - 1)
            nll_tokens += group.weight * scored
            number += 1
        return Counts(weight, nll_tokens, number)

    def terms(
        self, token_logps: Tensor, ref_token_logps: Tensor | None, stream: Stream, weights: Tensor, counts: Counts
    ) -> Terms:
        """Loss and metric sums of one micro-batch.

        token_logps: (N,) float32 of the policy; ref_token_logps: (N,) float32, only for `dpo`. weights: (groups,)
        float32. counts: of the whole global batch.
        """
        if self.name == "sft":
            return self._sft(token_logps, stream, weights, counts)
        policy, lengths = pair_sums(token_logps, stream)
        if self.name == "dpo":
            reference, _ = pair_sums(ref_token_logps, stream)
            if self.config.ld_alpha is None:
                return self._dpo(policy, policy, reference, lengths, weights, counts)
            alpha = self.config.ld_alpha
            tailed = ld_pair_sums(token_logps, stream, alpha), ld_pair_sums(ref_token_logps, stream, alpha)
            return self._dpo(policy, *tailed, lengths, weights, counts)
        if self.name == "orpo":
            return self._orpo(policy, lengths, token_logps, stream, weights, counts)
        return self._without_reference(policy, lengths, weights, counts)

    def _dpo(
        self,
        plain: PairLogps,
        policy: PairLogps,
        reference: PairLogps,
        lengths: PairLengths,
        weights: Tensor,
        counts: Counts,
    ) -> Terms:
        """Weighted sum of the configured losses. `plain`: the policy's ordinary sums, which `sft` and the metrics use
        even where `ld_alpha` gives the preference losses others."""
        config = self.config
        total = policy.chosen.new_zeros(())
        sums = {}
        for index, loss_type in enumerate(config.loss_type):
            by_tokens = loss_type in losses.NORMALISED_BY_TOKENS
            per_pair = losses.preference_loss(
                loss_type,
                plain if by_tokens else policy,
                reference,
                lengths,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                f_divergence=config.f_divergence,
                f_alpha_divergence_coef=config.f_alpha_divergence_coef,
                discopop_tau=config.discopop_tau,
            )
            term = (per_pair * weights).sum() / (counts.nll_tokens if by_tokens else counts.weight)
            if by_tokens:
                sums["nll_loss"] = term
            total = total + (1.0 if config.loss_weights is None else config.loss_weights[index]) * term
        chosen = config.beta * (policy.chosen - reference.chosen)
        rejected = config.beta * (policy.rejected - reference.rejected)
        return self._finish(total, sums, chosen, rejected, plain, lengths, counts)

    def _orpo(
        self,
        policy: PairLogps,
        lengths: PairLengths,
        token_logps: Tensor,
        stream: Stream,
        weights: Tensor,
        counts: Counts,
    ) -> Terms:
        mean = PairLogps(chosen=policy.chosen / lengths.chosen, rejected=policy.rejected / lengths.rejected)
        log_sigmoid, log_odds = losses.orpo_odds_term(mean.chosen, mean.rejected)
        likelihood = policy.chosen
        if self.scores_prompt:
            sums = losses.segment_sums(token_logps, stream.score_segments, stream.num_segments)
            likelihood = likelihood + sums.view(-1, 3)[:, 0]
        nll = -(likelihood * weights).sum() / counts.nll_tokens
        loss = nll - self.config.beta * (log_sigmoid * weights).sum() / counts.weight
        sums = {
            "nll_loss": nll,
            "log_odds_ratio": log_sigmoid.sum() / counts.groups,
            "log_odds_chosen": log_odds.sum() / counts.groups,
        }
        rewards = (self.config.beta * mean.chosen, self.config.beta * mean.rejected)
        return self._finish(loss, sums, *rewards, policy, lengths, counts)

    def _without_reference(self, policy: PairLogps, lengths: PairLengths, weights: Tensor, counts: Counts) -> Terms:
        config = self.config
        if self.name == "simpo":
            per_pair = losses.simpo_loss(
                policy, lengths, beta=config.beta, gamma=config.simpo_gamma, label_smoothing=config.label_smoothing
            )
            loss, sums = (per_pair * weights).sum() / counts.weight, {}
            rewards = (
                config.beta * policy.chosen / lengths.chosen,
                config.beta * policy.rejected / lengths.rejected,
            )
        else:
            per_pair = losses.cpo_loss(
                policy,
                beta=config.beta,
                loss_type=config.loss_type[0],
                label_smoothing=config.label_smoothing,
                lengths=lengths,
            )
            nll = -(policy.chosen * weights).sum() / counts.nll_tokens
            loss = (per_pair * weights).sum() / counts.weight + config.cpo_alpha * nll
            sums = {"nll_loss": nll}
            rewards = (config.beta * policy.chosen, config.beta * policy.rejected)
        return self._finish(loss, sums, *rewards, policy, lengths, counts)

    def _sft(self, token_logps: Tensor, stream: Stream, weights: Tensor, counts: Counts) -> Terms:
        per_token = weights.index_select(0, stream.score_segments // 2)  # two segments a group: prompt, completion
        loss = -(token_logps.double() * per_token).sum().float() / counts.nll_tokens
        return Terms(loss, {"loss": loss.detach(), "nll_loss": loss.detach()})

    def _finish(
        self,
        loss: Tensor,
        sums: dict[str, Tensor],
        chosen_reward: Tensor,
        rejected_reward: Tensor,
        policy: PairLogps,
        lengths: PairLengths,
        counts: Counts,
    ) -> Terms:
        """Add the metrics every pairwise objective reports; means over the pairs of the global batch."""
        per_pair = {
            "rewards/chosen": chosen_reward,
            "rewards/rejected": rejected_reward,
            "rewards/accuracies": (chosen_reward > rejected_reward).float(),
            "rewards/margins": chosen_reward - rejected_reward,
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "lengths/chosen": lengths.chosen,
            "lengths/rejected": lengths.rejected,
        }
        means = {name: values.double().sum() / counts.groups for name, values in per_pair.items()}
        detached = {name: value.detach().double() for name, value in ({"loss": loss} | sums | means).items()}
        return Terms(loss, detached)


def group_weights(groups: Iterable[Group], device: torch.device | None = None) -> Tensor:
    """(groups,) float32 weights of a micro-batch's rows; without a device, in CPU memory."""
    return torch.tensor([group.weight for group in groups], dtype=torch.float32, device=device)


def pair_sums(token_logps: Tensor, stream: Stream) -> tuple[PairLogps, PairLengths]:
    """Summed log-probs and scored tokens of chosen and rejected, from a stream of pairs; token_logps (N,)."""
    sums_P3 = losses.segment_sums(token_logps, stream.score_segments, stream.num_segments).view(-1, 3)
    tokens_P3 = stream.segment_tokens.view(-1, 3).float()
    return (
        PairLogps(chosen=sums_P3[:, 1], rejected=sums_P3[:, 2]),
        PairLengths(chosen=tokens_P3[:, 1], rejected=tokens_P3[:, 2]),
    )


def ld_pair_sums(token_logps: Tensor, stream: Stream, alpha: float) -> PairLogps:
    """Like `pair_sums`, with the tokens past the shorter completion's length counted `alpha` times (LD-DPO)."""
    shared = stream.segment_tokens.view(-1, 3)[:, 1:].amin(dim=1).repeat_interleave(3)
    sums = losses.ld_logps(token_logps, stream.score_segments, stream.score_ranks, shared, stream.num_segments, alpha)
    sums_P3 = sums.view(-1, 3)
    return PairLogps(chosen=sums_P3[:, 1], rejected=sums_P3[:, 2])
