"""The adapter of a linear layer against its definition: values, gradients, DoRA's lengths, dropout, which layers."""

import math

import pytest
import torch
from model_fixtures import random_decoder, random_pairs, tiny_config
from torch import Tensor, nn

from trainer.batch import build_stream
from trainer.errors import ConfigError
from trainer.lora import (
    Dropout,
    LoRALinear,
    LoraSettings,
    adapters,
    add_lora,
    chosen_layers,
    init_new,
    lora_layers,
    merged_weight,
)
from trainer.models.decoder import Decoder

PLAIN = LoraSettings(r=4, alpha=6.0)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""float64: the order of sums is all that differs."""


def random_layer(settings: LoraSettings, *, bias: bool = False, rate: float = 0.0, inner: int = 12) -> LoRALinear:
    generator = torch.Generator().manual_seed(5)
    base = nn.Linear(inner, 10, bias=bias, dtype=torch.float64)
    layer = LoRALinear(base, "layer", settings, Dropout(rate), torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_scaling(rslora: bool, scaling: float) -> None:
    assert LoraSettings(r=4, alpha=6.0, use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_place", [True, False])
def test_values_and_gradients_are_those_of_the_summed_weight(bias: bool, in_place: bool) -> None:
    layer = random_layer(PLAIN, bias=bias)
    layer.in_place = in_place
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 10, dtype=torch.float64)
    layer(x).backward(grad)
    found = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    assert layer.weight.grad is None

    x2, A, B = (tensor.detach().clone().requires_grad_() for tensor in (x, layer.lora_A, layer.lora_B))
    wanted = x2 @ (layer.weight + 1.5 * B @ A).T + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), wanted, **EXACT)
    wanted.backward(grad)
    for ours, theirs in zip(found, (x2.grad, A.grad, B.grad), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def dora_by_definition(layer: LoRALinear, x: Tensor, A: Tensor, B: Tensor, change: Tensor) -> Tensor:
    """m (W + s B A) / |W + s B A| with a detached length (Liu et al. 2024, equations 5 and 11), m from |W|."""
    whole = layer.weight + layer.settings.scaling * B @ A
    lengths = layer.weight.norm(dim=1) + change
    y = x @ (whole * (lengths / whole.norm(dim=1).detach())[:, None]).T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("bias", [False, True])
def test_dora_values_and_gradients(bias: bool) -> None:
    layer = random_layer(LoraSettings(r=4, alpha=6.0, use_dora=True), bias=bias)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 10, dtype=torch.float64)
    own = layer(x)
    own.backward(grad)
    leaves = (x, layer.lora_A, layer.lora_B, layer.lora_magnitude_change)
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    wanted = dora_by_definition(layer, *copies)
    wanted.backward(grad)
    torch.testing.assert_close(own, wanted, **EXACT)
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad, **EXACT)
    lengths = layer.start_lengths + layer.lora_magnitude_change
    merged = merged_weight(layer.weight, layer.lora_A, layer.lora_B, lengths, layer.settings)
    plain = x @ merged.double().T + (layer.bias if bias else 0)
    torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)  # merged in float32


def test_a_new_dora_adapter_changes_nothing_in_bf16() -> None:
    """Rounded to bf16, a length of its own would be off by up to 0.4 %."""
    layer = random_layer(LoraSettings(r=4, alpha=6.0, use_dora=True), inner=64).to(torch.bfloat16)
    layer.lora_B.data.zero_()
    layer.lora_magnitude_change.data.zero_()
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_dropout_follows_from_its_key_and_hits_the_adapter_alone() -> None:
    layer = random_layer(PLAIN, rate=0.5)
    x = torch.randn(400, 12, dtype=torch.float64, requires_grad=True)
    without = layer(x)
    assert torch.equal(without, layer(x)), "no key: nothing is dropped"
    layer.dropout.begin(42, 3, 0, 0)
    first = layer(x)
    assert torch.equal(first, layer(x))
    with torch.no_grad():
        assert torch.equal(layer(x), without), "evaluation drops nothing"
    layer.dropout.begin(42, 3, 1, 0)
    assert not torch.equal(first, layer(x))
    twin = random_layer(PLAIN, rate=0.5)
    twin.name = "another"
    twin.dropout.begin(42, 3, 1, 0)
    assert not torch.equal(twin(x), layer(x))
    # what is left is scaled up: the mean over many rows is that of no dropout
    gap = (first - without).mean(0)
    spread = (first - without).std(0) / math.sqrt(len(x))
    assert (gap.abs() < 5 * spread).all()


def test_dropout_gradients_by_finite_differences() -> None:
    layer = random_layer(PLAIN, rate=0.3)
    layer.dropout.begin(1, 2, 3, 4)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, A: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": A}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_A.detach().clone().requires_grad_()))


def logps(model: Decoder) -> Tensor:
    return model(build_stream(random_pairs(3)))


@pytest.mark.parametrize("use_dora", [False, True])
def test_states_of_a_model(use_dora: bool) -> None:
    """New: as the base. Trained: off is the base, start is where the run began."""
    model = random_decoder(tiny_config())
    base = logps(model).detach()
    settings = LoraSettings(r=4, alpha=8.0, use_dora=use_dora)
    names = add_lora(model, settings, dtype=torch.float32, keep_start=torch.float32)
    assert len(names) == 14
    init_new(model, seed=1)
    close = {"rtol": 0, "atol": 2e-5}  # the MLP's product is no longer fused
    torch.testing.assert_close(logps(model), base, **close)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1)
            layer.start_A.copy_(layer.lora_A)
            layer.start_B.copy_(layer.lora_B)
        begun = logps(model)
        for layer in lora_layers(model):
            layer.lora_B.mul_(1.5)
            if use_dora:
                layer.lora_magnitude_change.add_(0.1)
        trained = logps(model)
        assert (trained - begun).abs().max() > 1e-3 and (begun - base).abs().max() > 1e-3
        with adapters(model, "off"):
            torch.testing.assert_close(logps(model), base, **close)
        with adapters(model, "start"):
            assert torch.equal(logps(model), begun)
        assert torch.equal(logps(model), trained)


def test_only_adapters_train_and_the_head_takes_the_path_of_a_frozen_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products of the head's size, not four: `linear_logps` sees a weight that asks for no gradient."""
    from trainer.models import decoder

    seen, real = [], decoder.linear_logps

    def watch(hidden: Tensor, weight: Tensor, *args: Tensor, **options: object) -> Tensor:
        seen.append((hidden.requires_grad, weight.requires_grad))
        return real(hidden, weight, *args, **options)

    monkeypatch.setattr(decoder, "linear_logps", watch)
    for tied in (False, True):
        model = random_decoder(tiny_config(tie_word_embeddings=tied))
        add_lora(model, PLAIN)
        init_new(model, seed=1)
        logps(model).sum().backward()
        assert seen.pop() == (True, False)
        got = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert got == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_new_values_follow_from_seed_and_name() -> None:
    first, second, other = (random_decoder(tiny_config()) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_lora(model, PLAIN if model is not second else LoraSettings(r=4, alpha=6.0, target_modules=("v_proj",)))
        init_new(model, seed)
    name = "layers.1.self_attn.v_proj.lora_A"
    A = first.get_parameter(name)
    assert torch.equal(A, second.get_parameter(name)), "the other layers' draws change nothing"
    assert not torch.equal(A, other.get_parameter(name))
    assert not torch.equal(A, first.get_parameter("layers.0.self_attn.v_proj.lora_A"))
    bound = 64**-0.5  # of the uniform distribution; its standard deviation is bound / sqrt(3)
    assert A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (("all-linear",), 14),
        (("q_proj", "v_proj"), 4),
        (("layers.1.mlp.down_proj",), 1),
        (r"model\.layers\.0\..*_proj", 7),
    ],
)
def test_targets(targets: str | tuple[str, ...], count: int) -> None:
    assert len(chosen_layers(random_decoder(tiny_config()), targets)) == count


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("qproj",), "nothing", "(", ("layers",)])
def test_targets_that_are_no_layer_are_refused(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^lora.target_modules"):
        chosen_layers(random_decoder(tiny_config()), targets)
