"""Losses of a global batch: by hand from log-probs, and the same however the batch is cut into micro-batches."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import random_decoder, random_group, random_pairs, tiny_config
from torch import Tensor

from data_tools.encode import Group
from data_tools.grouping import cut_microbatches
from trainer.batch import build_stream
from trainer.config import LossConfig
from trainer.models.decoder import Decoder
from trainer.objective import Objective, group_weights

OBJECTIVES = {
    "dpo": ("dpo", {}),
    "dpo with sft": (
        "dpo",
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.5), "beta": 0.3},
    ),
    "ld-dpo": ("dpo", {"ld_alpha": 0.25}),
    "ld-dpo with sft": ("dpo", {"ld_alpha": 0.25, "loss_type": ("sigmoid", "sft")}),
    "orpo full": ("orpo", {"beta": 0.4}),
    "orpo completion": ("orpo", {"beta": 0.4, "orpo_nll": "completion"}),
    "simpo": ("simpo", {"beta": 2.0, "simpo_gamma": 0.7}),
    "cpo": ("cpo", {"cpo_alpha": 0.6}),
    "cpo ipo": ("cpo", {"loss_type": ("ipo",), "cpo_alpha": 0.0}),
    "sft": ("sft", {}),
}
ALL = pytest.mark.parametrize("name", OBJECTIVES)


def objective_of(name: str) -> Objective:
    kind, options = OBJECTIVES[name]
    return Objective(kind, LossConfig(**options))


def groups_for(name: str, number: int, *, seed: int = 0, weighted: bool = True) -> list[Group]:
    """Pairs; for sft, conversations whose second completion span follows an unscored turn."""
    if name != "sft":
        return random_pairs(number, seed=seed, weighted=weighted)
    pairs = random_pairs(number, seed=seed, weighted=weighted)
    return [
        Group(g.record_id, g.ids, (g.lengths[0], sum(g.lengths[1:])), ((), ((0, 1), (2, sum(g.lengths[1:])))), g.weight)
        for g in pairs
    ]


# --- by hand ---------------------------------------------------------------------------------------------------------


def segments(groups: Sequence[Group], score_prompt: bool, seed: int) -> tuple[Tensor, list[list[list[float]]]]:
    """Random log-probs of a stream, (N,), and the same as lists: [group][branch][token]."""
    stream = build_stream(groups, score_prompt=score_prompt)
    logps = -torch.rand(len(stream.score_targets), generator=torch.Generator().manual_seed(seed)).double() * 2 - 0.01
    parts = iter(torch.split(logps, stream.segment_tokens.tolist()))
    return logps, [[next(parts).tolist() for _ in group.lengths] for group in groups]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(tokens: list[float]) -> float:
    mean = sum(tokens) / len(tokens)
    return mean - math.log(1 - math.exp(mean))


def tailed(tokens: list[float], other: list[float], alpha: float) -> float:
    """LD-DPO's sum: tokens beyond the shorter completion count alpha times."""
    return sum(tokens[: len(other)]) + alpha * sum(tokens[len(other) :])


def by_hand(name: str, groups: Sequence[Group], ours: list, theirs: list) -> float:
    """The objective's loss of a whole batch, a pair at a time, in plain Python."""
    config = objective_of(name).config
    beta = config.beta
    weights = [group.weight for group in groups]
    completions = [tokens for _, tokens, *_ in ours]

    def weighted_mean(values: list[float], counts: list[float]) -> float:
        total = sum(w * value for w, value in zip(weights, values, strict=True))
        return total / sum(w * count for w, count in zip(weights, counts, strict=True))

    def mean_over_pairs(loss: Callable[[list[float], list[float], list[float], list[float]], float]) -> float:
        pairs = zip(ours, theirs, strict=True)
        return weighted_mean([loss(*policy[1:], *reference[1:]) for policy, reference in pairs], [1.0] * len(groups))

    def nll(with_prompt: bool = False) -> float:
        scored = [tokens + (prompt if with_prompt else []) for prompt, tokens, *_ in ours]
        return -weighted_mean([sum(tokens) for tokens in scored], [len(tokens) for tokens in scored])

    def dpo(c: list[float], r: list[float], ref_c: list[float], ref_r: list[float]) -> float:
        return -log_sigmoid(beta * (sum(c) - sum(ref_c) - sum(r) + sum(ref_r)))

    def bco(c: list[float], r: list[float], ref_c: list[float], ref_r: list[float]) -> float:
        return -log_sigmoid(beta * (sum(c) - sum(ref_c))) - log_sigmoid(-beta * (sum(r) - sum(ref_r)))

    def ld(c: list[float], r: list[float], ref_c: list[float], ref_r: list[float]) -> float:
        chosen = tailed(c, r, 0.25) - tailed(ref_c, ref_r, 0.25)
        return -log_sigmoid(beta * (chosen - tailed(r, c, 0.25) + tailed(ref_r, ref_c, 0.25)))

    def odds(c: list[float], r: list[float], *_: list[float]) -> float:
        return -beta * log_sigmoid(log_odds(c) - log_odds(r))

    def simpo(c: list[float], r: list[float], *_: list[float]) -> float:
        return -log_sigmoid(beta * (sum(c) / len(c) - sum(r) / len(r)) - 0.7)

    def cpo(c: list[float], r: list[float], *_: list[float]) -> float:
        return -log_sigmoid(beta * (sum(c) - sum(r)))

    def cpo_ipo(c: list[float], r: list[float], *_: list[float]) -> float:
        return (sum(c) / len(c) - sum(r) / len(r) - 1 / (2 * beta)) ** 2

    if name == "sft":
        return -weighted_mean([sum(tokens) for tokens in completions], [len(tokens) for tokens in completions])
    return {
        "dpo": lambda: mean_over_pairs(dpo),
        "dpo with sft": lambda: 0.8 * mean_over_pairs(dpo) + 0.2 * mean_over_pairs(bco) + 1.5 * nll(),
        "ld-dpo": lambda: mean_over_pairs(ld),
        "ld-dpo with sft": lambda: mean_over_pairs(ld) + nll(),
        "orpo full": lambda: nll(with_prompt=True) + mean_over_pairs(odds),
        "orpo completion": lambda: nll() + mean_over_pairs(odds),
        "simpo": lambda: mean_over_pairs(simpo),
        "cpo": lambda: mean_over_pairs(cpo) + 0.6 * nll(),
        "cpo ipo": lambda: mean_over_pairs(cpo_ipo),
    }[name]()


@ALL
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_by_hand(name: str, seed: int) -> None:
    objective, groups = objective_of(name), groups_for(name, 5, seed=seed)
    stream = build_stream(groups, score_prompt=objective.scores_prompt)
    policy, ours = segments(groups, objective.scores_prompt, seed)
    reference, theirs = segments(groups, objective.scores_prompt, seed + 100)
    given_reference = reference if objective.needs_reference else None
    terms = objective.terms(policy, given_reference, stream, group_weights(groups), objective.count(groups))
    assert terms.loss.item() == pytest.approx(by_hand(name, groups, ours, theirs), rel=1e-6)
    assert terms.sums["loss"].item() == terms.loss.item()


def test_metrics_are_means_over_pairs_by_hand() -> None:
    """Rewards 0.1 x (policy - reference): chosen +1, -2, 0 nats, rejected -1, +1, 0; a tie is no hit."""
    groups = [random_group((2, 1, 1), seed=seed) for seed in range(3)]
    policy = torch.tensor([-4.0, -6.0, -5.0, -3.0, -2.0, -7.0])
    reference = torch.tensor([-5.0, -5.0, -3.0, -4.0, -2.0, -7.0])
    objective = objective_of("dpo")
    terms = objective.terms(policy, reference, build_stream(groups), group_weights(groups), objective.count(groups))
    found = {key: value.item() for key, value in terms.sums.items() if key != "loss"}
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.1 * (1 - 2 + 0) / 3,
            "rewards/rejected": 0.1 * (-1 + 1 + 0) / 3,
            "rewards/margins": 0.1 * (2 - 3 + 0) / 3,
            "rewards/accuracies": 1 / 3,
            "logps/chosen": (-4 - 5 - 2) / 3,
            "logps/rejected": (-6 - 3 - 7) / 3,
            "lengths/chosen": 1.0,
            "lengths/rejected": 1.0,
        },
        abs=1e-7,
    )


def test_orpo_metrics_by_hand() -> None:
    """Probability 1/2 has odds 1, 1/4 has odds 1/3: log odds ratio ln 3, whose sigmoid is 3/4."""
    groups = [random_group((1, 2, 1), seed=0)]
    logps = torch.tensor([0.5, 0.5, 0.25]).log()
    objective = objective_of("orpo completion")
    terms = objective.terms(logps, None, build_stream(groups), group_weights(groups), objective.count(groups))
    assert terms.sums["nll_loss"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert terms.sums["log_odds_chosen"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert terms.sums["log_odds_ratio"].item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert terms.sums["rewards/chosen"].item() == pytest.approx(0.4 * math.log(0.5), rel=1e-6)
    assert terms.loss.item() == pytest.approx(math.log(2) - 0.4 * math.log(0.75), rel=1e-6)


@ALL
def test_weight_three_is_three_copies(name: str) -> None:
    objective = objective_of(name)
    first, second = groups_for(name, 2, weighted=False)
    heavy = Group(second.record_id, second.ids, second.lengths, second.spans, weight=3.0)
    losses = []
    for groups in ([first, heavy], [first, second, second, second]):
        stream = build_stream(groups, score_prompt=objective.scores_prompt)
        # a token's log-prob follows from the token, so that copies are copies
        policy, reference = -1 - stream.score_targets.double() / 50, -2 + stream.score_targets.double().sin()
        counts = objective.count(groups)
        losses.append(objective.terms(policy, reference, stream, group_weights(groups), counts).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=5),
    name=st.sampled_from(["dpo", "orpo full", "orpo completion"]),
)
def test_counts_are_those_of_the_stream(shapes: list[tuple[int, int, int]], name: str) -> None:
    """They are computed from the plan alone; empty prompts leave a completion's first token unscored."""
    objective = objective_of(name)
    groups = [random_group(shape, seed=seed, weight=0.5 + seed) for seed, shape in enumerate(shapes)]
    counts = objective.count(groups)
    scored_P3 = build_stream(groups, score_prompt=objective.scores_prompt).segment_tokens.view(-1, 3)
    assert counts.nll_tokens == (group_weights(groups) * scored_P3[:, :2].sum(1)).sum().item()
    assert counts.weight == sum(group.weight for group in groups)
    assert counts.groups == len(groups)


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Decoder:
    return random_decoder(tiny_config(), seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference() -> Decoder:
    return random_decoder(tiny_config(), seed=2, dtype=torch.float64).requires_grad_(False)


def accumulate(
    policy: Decoder, reference: Decoder, objective: Objective, groups: Sequence[Group], cut: list[list[int]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one step, as the training loop sums them over micro-batches."""
    policy.zero_grad()
    counts = objective.count(groups)
    sums: dict[str, float] = {}
    for members in cut:
        micro = [groups[index] for index in members]
        stream = build_stream(micro, score_prompt=objective.scores_prompt)
        theirs = reference(stream) if objective.needs_reference else None
        terms = objective.terms(policy(stream), theirs, stream, group_weights(micro), counts)
        terms.loss.backward()
        for key, value in terms.sums.items():
            sums[key] = sums.get(key, 0.0) + value.item()
    return sums, {key: parameter.grad.clone() for key, parameter in policy.named_parameters()}


def assert_same_step(name: str, policy: Decoder, reference: Decoder, cuts: list[list[list[int]]]) -> None:
    """float64 weights; 1e-6 because pair counts and the sft loss are float32."""
    objective, groups = objective_of(name), groups_for(name, 8)
    assert len({group.weight for group in groups}) > 1
    expected_sums, expected = accumulate(policy, reference, objective, groups, [list(range(8))])
    for cut in cuts:
        sums, gradients = accumulate(policy, reference, objective, groups, cut)
        assert sums == pytest.approx(expected_sums, rel=1e-6, abs=1e-9), cut
        for key, gradient in gradients.items():
            off = (gradient - expected[key]).abs().max().item()
            assert off <= 1e-9 * expected[key].abs().max().item(), (cut, key)


@ALL
def test_same_step_for_1x8_8x1_4x2(name: str, policy: Decoder, reference: Decoder) -> None:
    eight_by_one = [[index] for index in (3, 1, 0, 2, 7, 5, 4, 6)]
    four_by_two = [[0, 7], [6, 1], [2, 5], [4, 3]]
    assert_same_step(name, policy, reference, [eight_by_one, four_by_two, [[5, 0, 3], [1, 2, 4, 6, 7]]])


@ALL
@settings(max_examples=3, deadline=None)
@given(budget=st.integers(1, 150), world_size=st.integers(1, 3))
def test_same_step_for_any_token_budget(
    name: str, policy: Decoder, reference: Decoder, budget: int, world_size: int
) -> None:
    tokens = [len(group.ids) for group in groups_for(name, 8)]
    cut = [
        members
        for rank in range(world_size)
        for members in cut_microbatches(range(8), tokens, budget=budget, world_size=world_size, rank=rank)
        if members
    ]
    assert_same_step(name, policy, reference, [cut])


def test_float32_steps_agree_too(policy: Decoder, reference: Decoder) -> None:
    """As a run has it; 5e-6 of each tensor's largest gradient is some fifty times float32's rounding."""
    single, frozen = (random_decoder(tiny_config(), seed=seed) for seed in (1, 2))
    frozen.requires_grad_(False)
    objective, groups = objective_of("dpo with sft"), groups_for("dpo with sft", 8)
    _, expected = accumulate(policy, reference, objective, groups, [list(range(8))])
    for cut in ([list(range(8))], [[index] for index in range(8)]):
        _, gradients = accumulate(single, frozen, objective, groups, cut)
        for key, gradient in gradients.items():
            off = np.abs(gradient.numpy() - expected[key].numpy()).max()
            assert off <= 5e-6 * expected[key].abs().max().item(), key
