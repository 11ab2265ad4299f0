"""Master weights, clipping and schedules against PyTorch's and transformers' own."""

import copy
import math

import pytest
import torch
from model_fixtures import random_decoder, random_pairs, tiny_config
from torch import Tensor, nn
from transformers import get_scheduler

from trainer.batch import build_stream
from trainer.models.decoder import Decoder
from trainer.optim import AdamW, MasterWeights, clip_by_global_norm, learning_rate_at

TRANSFORMERS_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "ratio"), [(10, 0.0), (10, 0.25), (7, 0.1), (100, 0.03), (1, 0.0), (5, 1.0)])
@pytest.mark.parametrize("schedule", TRANSFORMERS_NAMES)
def test_schedules_equal_transformers(schedule: str, total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    steps = {"num_warmup_steps": math.ceil(ratio * total), "num_training_steps": total}
    theirs = get_scheduler(TRANSFORMERS_NAMES[schedule], optimizer, **steps)
    for step in range(total):
        ours = learning_rate_at(step, peak=3e-4, schedule=schedule, total_steps=total, warmup_ratio=ratio)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_linear_schedule_by_hand() -> None:
    rates = [
        learning_rate_at(step, peak=8.0, schedule="linear", total_steps=6, warmup_ratio=1 / 3) for step in range(7)
    ]
    assert rates == [0.0, 4.0, 8.0, 6.0, 4.0, 2.0, 0.0]


# --- clipping --------------------------------------------------------------------------------------------------------


def with_gradients(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (7,), (), (2, 2, 2))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_equals_torch(max_norm: float, dtype: torch.dtype) -> None:
    ours, theirs = with_gradients(dtype), with_gradients(dtype)
    norm, expected = clip_by_global_norm(ours, max_norm), nn.utils.clip_grad_norm_(theirs, max_norm).item()
    # ours is summed in float32 and float64; PyTorch rounds each tensor's norm to bfloat16
    assert norm == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=0)


def test_norm_is_of_all_tensors_together() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([-4.0])
    assert clip_by_global_norm(parameters, 2.5) == 5.0
    assert [parameter.grad.item() for parameter in parameters] == pytest.approx([1.5, -2.0], rel=1e-6)


@pytest.mark.parametrize(("value", "max_norm"), [(2.0, 0.0), (2.0, 2.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_gradients_left_alone(value: float, max_norm: float) -> None:
    """Clipping off, a norm within bounds, and numbers that are not finite: the step that follows refuses those."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([value])
    assert clip_by_global_norm([parameter], max_norm) == pytest.approx(value, nan_ok=True)
    assert parameter.grad.item() == pytest.approx(value, nan_ok=True)


# --- master weights --------------------------------------------------------------------------------------------------


def backward(model: Decoder, seed: int) -> None:
    model(build_stream(random_pairs(2, seed=seed))).mean().backward()


def test_float32_masters_are_the_parameters() -> None:
    model = random_decoder(tiny_config())
    masters = MasterWeights(model, compute_dtype=torch.float32)
    assert [name for name, _ in masters.named()] == [name for name, _ in model.named_parameters()]
    assert all(ours is theirs for (_, ours), theirs in zip(masters.named(), model.parameters(), strict=True))
    backward(model, 0)
    first = model.norm.weight.grad.clone()
    masters.zero_grad()
    assert model.norm.weight.grad is None
    backward(model, 0)
    assert torch.equal(model.norm.weight.grad, first)


def test_frozen_and_tied_parameters() -> None:
    model = random_decoder(tiny_config(tie_word_embeddings=True))
    model.layers[0].requires_grad_(False)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    names = [name for name, _ in masters.named()]
    assert names.count("embed_tokens.weight") == 1
    assert not any(name.startswith(("layers.0.", "lm_head")) for name in names)


def test_pure_bf16_has_no_second_copy() -> None:
    model = random_decoder(tiny_config(), dtype=torch.bfloat16)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16, pure=True)
    assert all(ours is theirs for (_, ours), theirs in zip(masters.named(), model.parameters(), strict=True))
    backward(model, 0)
    masters.finish_backward()
    assert {tensor.grad.dtype for _, tensor in masters.named()} == {torch.bfloat16}


def test_bf16_gradients_are_summed_in_float32() -> None:
    """Eight micro-batches; the sum of their bf16 gradients is exact to float32, the bf16 gradients are freed."""
    model = random_decoder(tiny_config())
    alone = copy.deepcopy(model).bfloat16()
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = [torch.zeros(parameter.shape) for parameter in alone.parameters()]
    for seed in range(8):
        backward(model, seed)
        alone.zero_grad()
        backward(alone, seed)
        for total, parameter in zip(expected, alone.parameters(), strict=True):
            total += parameter.grad
        assert all(parameter.grad is None for parameter in model.parameters())
    masters.finish_backward()
    for (name, master), total in zip(masters.named(), expected, strict=True):
        assert master.dtype == master.grad.dtype == torch.float32
        assert torch.equal(master.grad, total), name


def test_the_next_step_starts_from_nothing() -> None:
    """Also for a parameter that gets no gradient any more: its old one must not be used twice."""
    model = random_decoder(tiny_config())
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    by_name = dict(masters.named())
    backward(model, 0)
    masters.finish_backward()
    head = by_name["lm_head.weight"].grad.clone()
    assert head.any()
    masters.zero_grad()
    model(
        build_stream(random_pairs(2)), output="hidden"
    ).float().square().mean().backward()  # the head has no part in it
    masters.finish_backward()
    assert not by_name["lm_head.weight"].grad.any()
    assert by_name["norm.weight"].grad.any()
    masters.zero_grad()
    backward(model, 0)
    masters.finish_backward()
    assert torch.equal(by_name["lm_head.weight"].grad, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_gradient_gets_zeros(dtype: torch.dtype) -> None:
    model = random_decoder(tiny_config())
    masters = MasterWeights(model, compute_dtype=dtype)
    model(build_stream(random_pairs(2)), output="hidden").float().mean().backward()
    masters.finish_backward()
    gradients: dict[str, Tensor] = {name: master.grad for name, master in masters.named()}
    assert not gradients["lm_head.weight"].any()
    assert gradients["norm.weight"].any()


def test_bf16_training_keeps_updates_too_small_for_bf16() -> None:
    """Adam moves a weight by the learning rate. Below 1 the next bfloat16 number is 2^-8 away: three moves of 0.001 are
    nothing to a bf16 weight, each being less than half of that, while its float32 master gets past the half."""
    model = nn.Linear(1, 1, bias=False)
    pure = nn.Linear(1, 1, bias=False)
    weights = {}
    for name, each in (("master", model), ("pure", pure)):
        nn.init.ones_(each.weight)
        if name == "pure":
            each.bfloat16()
        masters = MasterWeights(each, compute_dtype=torch.bfloat16, pure=name == "pure")
        optimizer = torch.optim.AdamW(masters.masters, lr=1e-3, weight_decay=0.0, fused=True)
        for _ in range(3):
            masters.zero_grad()
            each(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
            masters.finish_backward()
            optimizer.step()
            masters.refresh()
        weights[name] = (masters.masters[0].item(), each.weight.item())
    assert weights["pure"] == (1.0, 1.0)
    assert weights["master"][0] == pytest.approx(0.997, abs=1e-6)
    assert weights["master"][1] == 1 - 2**-8


def test_updates_equal_a_float32_optimizer_on_the_same_gradients() -> None:
    model = random_decoder(tiny_config())
    plain = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    settings = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "fused": True}
    ours, theirs = torch.optim.AdamW(masters.masters, **settings), torch.optim.AdamW(plain, **settings)
    for seed in range(3):
        masters.zero_grad()
        backward(model, seed)
        masters.finish_backward()
        for parameter, (_, master) in zip(plain, masters.named(), strict=True):
            parameter.grad = master.grad.clone()
        ours.step()
        theirs.step()
        masters.refresh()
    for parameter, working, (name, master) in zip(plain, model.parameters(), masters.named(), strict=True):
        assert torch.equal(master, parameter), name
        assert torch.equal(working, parameter.bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_equals_the_class_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.ones(3, 4, dtype=dtype)), nn.Parameter(torch.zeros(5, dtype=dtype))] for _ in "ab"
    )
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    mine = AdamW(ours, lr=0.0, **options)
    torchs = torch.optim.AdamW(theirs, lr=0.0, fused=True, **options)
    for rate in (0.1, 0.05, 0.02):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=generator).to(dtype)
        mine.lr = torchs.param_groups[0]["lr"] = rate
        mine.step()
        torchs.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for name, value in torchs.state[other].items():
            assert torch.equal(mine.state[one][name], value), name
