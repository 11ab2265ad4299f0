"""The decoder against transformers' Llama with the same weights, read through a folder that transformers wrote."""

from pathlib import Path

import pytest
import torch
from model_fixtures import VOCABULARY, random_decoder, random_group, random_pairs, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.encode import Group
from kernels import dispatch
from trainer.batch import build_stream
from trainer.models import attention
from trainer.models.decoder import Decoder
from trainer.models.hf_weights import load_decoder
from trainer.parallelize import PRODUCTS, recompute_activations

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped heads": {},
    "tied head": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "no shared heads": {"num_key_value_heads": 4},
    "explicit head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama 3 rope": {"rope_parameters": LLAMA3_ROPE},
    "other theta and eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 321.0}, "rms_norm_eps": 1e-2},
}


def theirs(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama of transformers, in evaluation mode, attention by its plain implementation."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attn_implementation": "eager", **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def sequence(length: int = 40) -> Group:
    """One text, prompt only."""
    return random_group((length,))


@torch.no_grad()
def logits_of(model: LlamaForCausalLM, group: Group) -> Tensor:
    return model(torch.from_numpy(group.ids).long()[None]).logits[0]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_transformers(changes: dict, tmp_path: Path) -> None:
    """Logits, states and log-probs in float32; 40 positions, so that llama3 scaling has stretched and kept parts."""
    model = theirs(**changes)
    model.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    group = sequence()
    stream = build_stream([group], score_prompt=True)
    expected = logits_of(model, group)
    ids = torch.from_numpy(group.ids).long()
    with torch.no_grad():
        states = model.model(ids[None]).last_hidden_state[0]
        torch.testing.assert_close(ours(stream, output="logits"), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(ours(stream, output="hidden"), states, rtol=1e-5, atol=1e-5)
        expected_logps = expected[:-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        torch.testing.assert_close(ours(stream), expected_logps, rtol=1e-5, atol=1e-5)


def test_stream_of_pairs_equals_transformers_row_by_row(tmp_path: Path) -> None:
    """Log-probs and gradients of a stream of pairs, each completion scored alone by transformers."""
    model = theirs()
    model.save_pretrained(tmp_path)
    ours, groups = load_decoder(tmp_path), random_pairs(3)
    rows = []
    for group in groups:
        prompt, *completions = torch.from_numpy(group.ids).long().split(group.lengths)
        for completion in completions:
            ids = torch.cat([prompt, completion])
            logps = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rows.append(logps.gather(1, completion[:, None]).squeeze(1))
    expected, found = torch.cat(rows), ours(build_stream(groups))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.mean().backward()
    expected.mean().backward()
    by_name = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = by_name[name if name.startswith("lm_head.") else f"model.{name}"].grad
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=0, atol=1e-5 * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_bfloat16_is_as_close_to_float32_as_transformers(tmp_path: Path) -> None:
    model, group = theirs(), sequence()
    model.save_pretrained(tmp_path)
    ids = torch.from_numpy(group.ids).long()[1:, None]
    truth = logits_of(model, group)[:-1].log_softmax(-1).gather(1, ids).squeeze(1)
    in_bf16 = logits_of(model.bfloat16(), group)[:-1].float().log_softmax(-1).gather(1, ids).squeeze(1)
    with torch.no_grad():
        ours = load_decoder(tmp_path, dtype=torch.bfloat16)(build_stream([group], score_prompt=True))
    assert ours.dtype == torch.float32
    error, baseline = ((logps - truth).abs().mean().item() for logps in (ours, in_bf16))
    assert error <= 1.2 * baseline, f"{error=} {baseline=}"


class CountProducts(TorchDispatchMode):
    """Counts two-dimensional matrix products."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - torch's signature
        self.number += function in PRODUCTS
        return function(*args, **(kwargs or {}))


def gradients(model: Decoder, groups: list[Group]) -> list[Tensor]:
    model.zero_grad()
    logps = model(build_stream(groups))
    (logps * torch.linspace(-1, 1, logps.numel())).sum().backward()
    return [logps.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("how", ["full", "every_2", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole_group", [128, 0])
def test_activation_checkpointing_changes_no_bit(
    dtype: torch.dtype, whole_group: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WHOLE_GROUP", whole_group)
    model, groups = random_decoder(tiny_config(tie_word_embeddings=True), dtype=dtype), random_pairs(4)
    plain = gradients(model, groups)
    recompute_activations(model, how)
    for before, after in zip(plain, gradients(model, groups), strict=True):
        assert torch.equal(before, after)


def test_activation_checkpointing_keeps_less() -> None:
    """Of four layers; what `selective` keeps itself does not pass through these hooks, so it is weighed below."""
    model, groups = random_decoder(tiny_config(num_hidden_layers=4)), random_pairs(4)
    kept = {}
    for how in ("none", "every_2", "full"):
        recompute_activations(model, how)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(build_stream(groups))
        kept[how] = sum(sizes)
    assert kept["full"] < 0.35 * kept["none"]
    assert kept["full"] < 0.7 * kept["every_2"] < 0.5 * kept["none"]


def test_selective_checkpointing_runs_wide_products_again_and_narrow_ones_once() -> None:
    """Seven products a layer; gate and up are wider than the model (96 against 64)."""
    counts = {}
    for how in ("none", "selective", "full"):
        model, groups = random_decoder(tiny_config()), random_pairs(4)
        recompute_activations(model, how)
        logps = model(build_stream(groups))
        with CountProducts() as counter:
            logps.sum().backward()
        counts[how] = counter.number
    layers = len(model.layers)
    assert counts["selective"] - counts["none"] == 2 * layers
    assert counts["full"] - counts["none"] == 7 * layers


def test_stashed_logits_and_plain_kernels_agree() -> None:
    model, groups = random_decoder(tiny_config()), random_pairs(4)
    base = gradients(model, groups)
    for setting in ({"stash_logits": True}, {"kernel_impl": "reference"}):
        other = random_decoder(tiny_config())
        vars(other).update(setting)
        for ours, expected in zip(gradients(other, groups), base, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_log_probs_are_those_of_the_logits() -> None:
    model, groups = random_decoder(tiny_config()), random_pairs(3)
    stream = build_stream(groups, score_prompt=True)
    with torch.no_grad():
        logits, states = model(stream, output="logits"), model(stream, output="hidden")
        expected = logits[stream.score_index].log_softmax(-1)[
            torch.arange(len(stream.score_targets)), stream.score_targets
        ]
        torch.testing.assert_close(model(stream), expected)
        torch.testing.assert_close(states @ model.head_weight.T, logits)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_chosen_implementation_reaches_every_operator(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    resolve = dispatch.resolve
    monkeypatch.setattr(dispatch, "resolve", lambda given, *rest: asked.append(given) or resolve(given, *rest))
    model = random_decoder(tiny_config())
    model.kernel_impl = impl
    model(build_stream([random_group((3, 2, 2))]))
    layers = len(model.layers)
    # the model for all of it; a layer: two norms, two rotations, one SwiGLU; then the last norm and the head
    assert asked == [impl] * (1 + 5 * layers + 2)
