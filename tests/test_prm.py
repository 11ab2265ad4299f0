"""The objective of process rewards against plain PyTorch, its metrics worked by hand, scores of answers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from model_fixtures import random_decoder, tiny_config
from prm_fixtures import many_steps, padded_rewards, random_steps
from torch import Tensor

from data_tools.encode import Group
from data_tools.grouping import cut_microbatches
from data_tools.step_rows import StepLabel
from trainer.batch import build_stream
from trainer.config import PrmConfig
from trainer.errors import ModelError
from trainer.losses import step_loss
from trainer.models.decoder import Decoder
from trainer.objective import group_weights
from trainer.prm import PrmTable, ProcessObjective, aggregate, area_under_curve, read_table, step_auc

KINDS = {
    "hard": PrmConfig(),
    "hard mse": PrmConfig(loss="mse"),
    "soft": PrmConfig(labels="soft"),
    "soft mse": PrmConfig(labels="soft", loss="mse"),
    "outcome": PrmConfig(labels="outcome"),
    "outcome last": PrmConfig(labels="outcome", outcome="last"),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def reward_model(dtype: torch.dtype = torch.float64, **changes: object) -> Decoder:
    model = random_decoder(tiny_config(**changes), dtype=dtype)
    model.add_reward_head(dtype)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        model.reward_head.weight.copy_(0.3 * torch.randn(model.reward_head.weight.shape, generator=generator))
        model.reward_head.bias.fill_(0.25)
    return model


def step(
    model: Decoder, groups: Sequence[Group], config: PrmConfig, budget: int
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Metric sums and scores of a global batch in micro-batches of at most `budget` tokens; gradients add up."""
    objective = ProcessObjective(config)
    counts = objective.count(groups)
    sums: dict[str, float] = {}
    steps: list[tuple[float, float]] = []
    tokens = [len(group.ids) for group in groups]
    for members in cut_microbatches(range(len(groups)), tokens, budget=budget, world_size=1, rank=0):
        own = [groups[index] for index in members]
        stream = objective.stream(own)
        terms = objective.terms(model(stream, output="rewards"), None, stream, group_weights(own), counts)
        terms.loss.backward()
        for name, value in terms.sums.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        steps += map(tuple, terms.steps.tolist())
    return sums, steps


def plain_loss(config: PrmConfig, groups: Sequence[Group], logits: Sequence[Tensor]) -> Tensor:
    """The weighted mean over labelled steps, in plain PyTorch, from log-odds a branch."""
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    rows = iter(logits)
    for group in groups:
        for labels in group.labels[1:]:
            for label, logit in zip(labels, next(rows), strict=True):
                last = label is labels[-1]
                target = {"hard": label.hard, "soft": label.soft, "outcome": label.outcome}[config.labels]
                if config.outcome == "last" and not last:
                    continue
                probability = torch.sigmoid(logit)
                if config.loss == "mse":
                    loss = (probability - target) ** 2
                else:
                    loss = -target * torch.log(probability) - (1 - target) * torch.log(1 - probability)
                total, count = total + group.weight * loss, count + group.weight
    return total / count


@ALL
@pytest.mark.parametrize("budget", [24, 1000])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_are_those_of_plain_pytorch(kind: str, budget: int, tied: bool) -> None:
    """float64: both ways differ by rounding only. Groups of several branches are packed behind one prompt."""
    groups, config = many_steps(9), KINDS[kind]
    model = reward_model(tie_word_embeddings=tied)
    sums, _ = step(model, groups, config, budget)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected = plain_loss(config, groups, padded_rewards(leaves, model.config, groups))
    expected.backward()
    assert sums["loss"] == pytest.approx(expected.item(), rel=1e-6)  # reported in float32
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight":
            assert parameter.grad is None and not parameter.requires_grad
            continue
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-5, atol=1e-8)


def test_logits_are_float32_whatever_the_model_computes_in() -> None:
    model = reward_model(torch.bfloat16)
    stream = build_stream(many_steps(3), at_tokens=True)
    assert model(stream, output="rewards").dtype == torch.float32


def test_the_stream_points_at_the_tokens_themselves() -> None:
    """Two groups by hand: prompt of 2, branches of steps 1 + 2 and 2; then an empty prompt and one step of 3."""
    groups = [random_steps([[1, 2], [2]], prompt=2), random_steps([[3]], prompt=0, seed=1)]
    stream = build_stream(groups, at_tokens=True)
    assert stream.score_index.tolist() == [2, 4, 6, 9]
    assert stream.score_targets.tolist() == stream.tokens[stream.score_index].tolist()
    assert stream.score_segments.tolist() == [1, 1, 2, 4]
    wanted = [label for group in groups for own in group.labels for label in own]
    torch.testing.assert_close(stream.labels, torch.tensor(wanted), equal_nan=True)
    assert build_stream(groups).score_index.tolist() == [1, 3, 5, 8]
    assert build_stream(groups).labels is None


# --- metrics ---------------------------------------------------------------------------------------------------------


def labelled(hard: Sequence[int], soft: Sequence[float], outcome: int) -> Group:
    group = random_steps([[1] * len(hard)])
    labels = [StepLabel(h, s, outcome) for h, s in zip(hard, soft, strict=True)]
    labels[-1] = labels[-1]._replace(final=outcome)
    return replace(group, labels=((), tuple(labels)))


def test_metrics_by_hand() -> None:
    """Hard labels judge, whatever is trained: steps 1, 1, 0 and 0, 0 with log-odds 2, -1, 1 and -1, -2."""
    groups = [labelled([1, 1, 0], [1.0, 0.5, 0.0], 0), labelled([0, 0], [0.0, 0.25], 1)]
    logits = torch.tensor([2.0, -1.0, 1.0, -1.0, -2.0])
    s = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    for kind, targets in {
        "hard": [1, 1, 0, 0, 0], "soft": [1, 0.5, 0, 0, 0.25], "outcome": [0, 0, 0, 1, 1],
        "outcome last": [None, None, 0, None, 1],
    }.items():  # fmt: skip
        objective = ProcessObjective(KINDS[kind])
        counts = objective.count(groups)
        stream = objective.stream(groups)
        terms = objective.terms(logits, None, stream, group_weights(groups), counts)
        nats = [-t * math.log(p) - (1 - t) * math.log(1 - p) for t, p in zip(targets, s, strict=True) if t is not None]
        found = {name: value.item() for name, value in terms.sums.items()}
        assert found == pytest.approx({
            "loss": sum(nats) / len(nats),
            "step_accuracy": 3 / 5,
            "step_accuracy_right": 1 / 2,
            "step_accuracy_wrong": 2 / 3,
            "step_rewards/right": (s[0] + s[1]) / 2,
            "step_rewards/wrong": (s[2] + s[3] + s[4]) / 3,
        }, rel=1e-6), kind  # fmt: skip
        # pairs (right, wrong): 2 beats all 3; -1 loses to 1, ties with -1, beats -2
        assert step_auc([terms.steps.tolist()]) == pytest.approx({"step_auc": 4.5 / 6})


def test_a_batch_without_wrong_steps_or_without_labels() -> None:
    groups = [labelled([1, 1], [1, 1], 1)]
    objective = ProcessObjective(PrmConfig())
    stream = objective.stream(groups)
    terms = objective.terms(torch.ones(2), None, stream, group_weights(groups), objective.count(groups))
    assert terms.sums.keys() == {"loss", "step_accuracy", "step_accuracy_right", "step_rewards/right"}
    assert step_auc([terms.steps.tolist()]) == {}
    cut = [replace(groups[0], labels=((), tuple(label._replace(final=math.nan) for label in groups[0].labels[1])))]
    objective = ProcessObjective(KINDS["outcome last"])
    logits = torch.ones(2, requires_grad=True)
    terms = objective.terms(logits, None, objective.stream(cut), group_weights(cut), objective.count(cut))
    terms.loss.backward()
    assert terms.loss.item() == 0 and logits.grad.tolist() == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_area_under_the_curve_counts_pairs(steps: list[tuple[int, bool]]) -> None:
    right = [score for score, is_right in steps if is_right]
    wrong = [score for score, is_right in steps if not is_right]
    found = area_under_curve([score for score, _ in steps], [is_right for _, is_right in steps])
    if not right or not wrong:
        assert found is None
        return
    wins = sum((a > b) + (a == b) / 2 for a in right for b in wrong)
    assert found == wins / (len(right) * len(wrong))


def test_losses_a_step() -> None:
    logits, labels = torch.tensor([0.0, 2.0, -50.0]), torch.tensor([1.0, 0.25, 1.0])
    expected = F.softplus(logits) - labels * logits
    torch.testing.assert_close(step_loss(logits, labels), expected)
    torch.testing.assert_close(step_loss(logits, labels, loss="mse"), (logits.sigmoid() - labels) ** 2)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "score"), [("mean", 0.5), ("min", 0.2), ("last", 0.4), ("product", 0.072)])
def test_scores_of_answers(how: str, score: float) -> None:
    assert aggregate([0.9, 0.2, 0.4], how) == pytest.approx(score)


def test_what_a_saved_model_says(tmp_path) -> None:
    table = PrmTable.of(PrmConfig(labels="outcome", outcome="last", aggregation="min", separator=" ки"))
    assert table.as_json() == {
        "labels": "outcome (last)", "loss": "bce", "aggregation": "min", "separator": " ки", "format": 1,
    }  # fmt: skip
    assert read_table(tmp_path) is None
    (tmp_path / "config.json").write_text('{"logratio_prm": {"format": 2}}')
    with pytest.raises(ModelError, match="'logratio_prm' is not what this version writes"):
        read_table(tmp_path)
