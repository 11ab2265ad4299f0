"""Every family of decoders against transformers; configs that are refused; rotary embeddings that depend on length."""

from pathlib import Path

import parity_table
import pytest
import torch
from family_fixtures import LLAMA3, SIZES, VARIANTS, YARN
from model_fixtures import random_group, tiny_config
from transformers import AutoModelForCausalLM

from trainer.batch import build_stream
from trainer.errors import ModelError
from trainer.models.config import ModelConfig
from trainer.models.families import FAMILIES
from trainer.models.hf_weights import load_decoder
from trainer.parallelize import recompute_activations


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, seed: int) -> None:
    row = parity_table.measure(VARIANTS[name], seed)
    assert row.round_trip
    assert row.logits <= parity_table.LOGIT_BOUND and row.logps <= parity_table.LOGIT_BOUND, row
    assert row.gradient <= parity_table.GRADIENT_BOUND, row


def test_every_family_has_a_variant() -> None:
    assert {variant.config().model_type for variant in VARIANTS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi", "cohere", "olmo2", "phi3"])
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str, tmp_path: Path) -> None:
    theirs = VARIANTS[name].model()
    theirs.save_pretrained(tmp_path)
    group = random_group((31,))
    ids = torch.from_numpy(group.ids).long()
    with torch.no_grad():
        truth = theirs(ids[None]).logits[0]
        in_bf16 = theirs.bfloat16()(ids[None]).logits[0].float()
        ours = load_decoder(tmp_path, dtype=torch.bfloat16)(build_stream([group]), output="logits").float()
    error, baseline = ((logits - truth).square().mean().sqrt().item() for logits in (ours, in_bf16))
    assert error <= 1.2 * baseline, f"{error=} {baseline=}"


@pytest.mark.parametrize("name", ["gemma2", "phi", "olmo2", "cohere2"])
def test_activation_checkpointing_changes_no_bit(name: str, tmp_path: Path) -> None:
    VARIANTS[name].model().save_pretrained(tmp_path)
    found = []
    for how in ("none", "full", "selective"):
        model = load_decoder(tmp_path)
        recompute_activations(model, how)
        logps = model(build_stream([random_group((9, 11, 4)), random_group((3, 2, 8), seed=1)]))
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
        found.append([logps.detach(), *(parameter.grad for parameter in model.parameters())])
    for again in found[1:]:
        assert all(torch.equal(ours, plain) for ours, plain in zip(again, found[0], strict=True))


@pytest.mark.parametrize("name", ["gemma3", "phi", "cohere qk norm", "olmo2", "phi3"])
def test_plain_kernels_agree(name: str) -> None:
    fast, plain = (parity_table.measure(VARIANTS[name], 0, impl=impl) for impl in ("cpu", "reference"))
    assert max(fast.gradient, plain.gradient) <= parity_table.GRADIENT_BOUND


def test_a_shared_prompt_is_refused_where_rope_depends_on_the_length(tmp_path: Path) -> None:
    """Dynamic: any sequence beyond the original 64 tokens; longrope: one prompt with sequences on both sides of 64."""
    VARIANTS["llama dynamic rope"].model().save_pretrained(tmp_path / "dynamic")
    VARIANTS["phi3 longrope"].model().save_pretrained(tmp_path / "longrope")
    dynamic, longrope = load_decoder(tmp_path / "dynamic"), load_decoder(tmp_path / "longrope")
    for model, lengths in ((dynamic, (60, 5, 3)), (dynamic, (60, 5)), (longrope, (60, 5, 3))):
        with pytest.raises(ModelError, match=r"depends on a sequence's length beyond 64 tokens.*data.max_length = 64"):
            model(build_stream([random_group(lengths)]))
    for model, lengths in ((dynamic, (60, 4, 3)), (longrope, (60, 5, 6)), (longrope, (60, 4, 3))):
        assert torch.isfinite(model(build_stream([random_group(lengths)]))).all()


def test_longrope_takes_short_and_long_groups_in_one_stream(tmp_path: Path) -> None:
    theirs = VARIANTS["phi3 longrope"].model()
    theirs.save_pretrained(tmp_path)
    groups = [random_group((3, 70, 65)), random_group((3, 20, 5), seed=1)]
    with torch.no_grad():
        found, expected = load_decoder(tmp_path)(build_stream(groups)), parity_table._logps(theirs, groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=parity_table.LOGIT_BOUND)


def test_llama3_frequencies_by_hand() -> None:
    """Head width 4 and theta 10^4: wavelengths 2 pi (kept) and 200 pi (over 32 positions: divided by 4)."""
    config = tiny_config(head_dim=4, rope_scaling={**LLAMA3, "rope_theta": 10000.0})
    torch.testing.assert_close(config.layers[0].rope.frequencies(), torch.tensor([1.0, 0.01 / 4]))
    # theta 2 * pi / 16 turns a wavelength of 16 into the middle: 32 / 16 = 2 turns, (2 - 1) / (4 - 1) of the way
    between = tiny_config(head_dim=4, rope_scaling={**LLAMA3, "rope_theta": (16 / (2 * torch.pi)) ** 2})
    rate = 2 * torch.pi / 16
    assert between.layers[0].rope.frequencies()[1].item() == pytest.approx(rate * (1 / 3 + 2 / 3 / 4), rel=1e-5)


def test_yarn_by_hand() -> None:
    """The first dimension turns 16 / (2 pi) = 2.5 times in 16 positions: between beta_slow 1 and beta_fast 4."""
    rope = tiny_config(head_dim=4, rope_parameters={**YARN, "truncate": False}).layers[0].rope
    low, high = (4 * torch.log(torch.tensor(16 / (turns * 2 * torch.pi))) / (2 * torch.log(torch.tensor(100.0)))
                 for turns in (4.0, 1.0))  # fmt: skip
    share = (0 - max(low.item(), 0)) / (min(high.item(), 3) - max(low.item(), 0))
    assert rope.frequencies()[0].item() == pytest.approx((1 - share) + share / 4, rel=1e-5)
    assert rope.scaling.attention_factor == pytest.approx(0.1 * 1.3862943611 + 1)


OLD_AND_NEW = {
    "gemma3 old": (
        {"model_type": "gemma3_text", "rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window": 6,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2},
        {"model_type": "gemma3_text", "sliding_window": 6,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
    ),
    "phi partial": (
        {"model_type": "phi", "partial_rotary_factor": 0.4, "rope_theta": 99.0},
        {"model_type": "phi", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4,
                                                  "rope_theta": 99.0}},
    ),
    "su is longrope": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0] * 5, "long_factor": [2.0] * 5},
         "original_max_position_embeddings": 8},
        {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 5, "factor": 8.0,
         "long_factor": [2.0] * 5, "original_max_position_embeddings": 8}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_older_spellings_mean_the_same(case: str) -> None:
    old, new = (ModelConfig.from_dict({**SIZES, **keys}, "config.json") for keys in OLD_AND_NEW[case])
    assert old == new


REFUSED = [
    ({"model_type": "mamba", "state_size": 16, "conv_kernel": 4},
     r"model_type 'mamba' is not supported; supported: llama, .*, olmo2. Keys that Llama does not have: conv_kernel, "
     "state_size"),
    ({"model_type": "gemma3", "text_config": {}}, "of a model of several modalities, only the text model alone"),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "only causal attention is supported"),
    ({"model_type": "gemma2", "query_pre_attn_scalar": -1}, "'query_pre_attn_scalar' must be a positive number"),
    ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "'layer_types' must be a list of 3 items"),
    ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 3}, "'linear_attention' is not known; known: full"),
    ({"model_type": "mistral", "sliding_window": 0}, "'sliding_window' must be a positive integer"),
    ({"model_type": "phi", "partial_rotary_factor": 0.3}, "3 of a head's 10 dimensions turn; both numbers must"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
     "'short_factor' must be a list of 5 numbers"),
    ({"model_type": "cohere", "logit_scale": "big"}, "'logit_scale' must be a positive number"),
    ({"model_type": "llama", "hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu, swish"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "problem"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_refused(keys: dict, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        ModelConfig.from_dict({**SIZES, **keys}, "config.json")
    assert "\n" not in str(caught.value)


def test_keys_that_nobody_reads_are_found() -> None:
    for name, variant in VARIANTS.items():
        raw = variant.config().to_dict()
        _, unknown = ModelConfig.with_unknown_keys(raw, "config.json")
        assert unknown == [], name
    _, unknown = ModelConfig.with_unknown_keys({**SIZES, "model_type": "llama", "new_trick": 1}, "config.json")
    assert unknown == ["new_trick"]


def test_exports_load_in_transformers(tmp_path: Path) -> None:
    """The weights' own names: what was changed is what transformers reads."""
    from trainer.export import export

    for name in ("phi", "phi3", "gemma2"):
        VARIANTS[name].model().save_pretrained(tmp_path / name)
        model = load_decoder(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        export(model.named_parameters(), source=tmp_path / name, folder=tmp_path / f"{name} export")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} export").eval()
        group = random_group((20,))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(group.ids).long()[None]).logits[0]
            found = model(build_stream([group]), output="logits")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
