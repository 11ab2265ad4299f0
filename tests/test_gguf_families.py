"""Each family from a GGUF: the same logits as the `transformers` model that went in, and as `transformers` reads it."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from data_tools.encode import Group
from tests.gguf_fixtures import FAMILIES, KIND, TOKENS, as_float32, logits, random_model, write_model
from trainer.batch import build_stream
from trainer.models import gguf_import
from trainer.models.gguf_tensors import iter_packed
from trainer.models.hf_weights import load_decoder

READ_BY_TRANSFORMERS = ("llama", "llama3", "qwen2", "gemma2", "gemma3", "phi3")
"""It knows qwen3 too, but not a head dim of its own (5.23)."""


def imported(path: Path, dtype: str = "float32") -> PreTrainedModel:
    folder = path.with_suffix("")
    gguf_import.convert(path, folder, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("case", FAMILIES)
def test_same_logits_as_the_model_that_went_in(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    loaded = imported(write_model(tmp_path / "m.gguf", case, model))
    assert type(loaded) is type(model)
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    keys = ("num_key_value_heads", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    keys += ("layer_types", "sliding_window", "query_pre_attn_scalar", "rope_parameters", "max_position_embeddings")
    for key in keys:
        found, wanted = (getattr(config, key, None) for config in (loaded.config, model.config))
        if key == "rope_parameters" and wanted.get("partial_rotary_factor") == 1.0:  # transformers may fill it in
            found, wanted = ({**rope, "partial_rotary_factor": 1.0} for rope in (found, wanted))
        assert found == wanted, key


@pytest.mark.parametrize("case", FAMILIES)
def test_our_decoder_runs_the_folder(case: str, tmp_path: Path) -> None:
    model = random_model(case)
    gguf_import.convert(write_model(tmp_path / "m.gguf", case, model), tmp_path / "out")
    ids = np.random.default_rng(0).integers(0, len(TOKENS), 20, dtype=np.int32)
    group = Group(record_id="x", ids=ids, lengths=(1, 19), spans=((), ((0, 19),)), weight=1.0)
    with torch.no_grad():
        found = load_decoder(tmp_path / "out")(build_stream([group]), output="logits")
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    # float32 in another order; logits of these models reach 10
    torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_same_weights_as_transformers_reads(case: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", case, random_model(case, seed=1))
    ours = imported(path).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0, msg=name)


# type -> largest error of a value, relative to the largest in its block of 32. Half a step of the grid, and for the
# grids that have one value more on the negative side a whole one; 16-bit floats round to 11 or 8 bits.
ERRORS = {"Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q8_0": 1 / 254, "F16": 2**-11, "BF16": 2**-8}


@pytest.mark.parametrize("kind", ERRORS)
def test_quantised_weights_are_as_near_as_the_type_allows(kind: str, tmp_path: Path) -> None:
    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if values.ndim < 2:
            return as_float32(name, values)
        return gguf.quants.quantize(values, KIND[kind]), KIND[kind]

    model = random_model("qwen3")
    loaded = imported(write_model(tmp_path / "m.gguf", "qwen3", model, pack))
    for name, tensor in model.state_dict().items():
        error = (loaded.state_dict()[name] - tensor).reshape(-1, 32 if tensor.ndim == 2 else 1).abs().amax(-1)
        largest = tensor.reshape(len(error), -1).abs().amax(-1)
        bound = ERRORS[kind] + 2**-10 if tensor.ndim == 2 else 0.0  # scale and minimum of a block are float16
        assert (error <= bound * largest).all(), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(kind: str, tmp_path: Path) -> None:
    """Random blocks: the file, our reading of it and the rows' order, with the package's formula for the values.

    That formula itself is held against the definition for one type in `test_q6_k_by_definition`.
    """
    generator = np.random.default_rng(0)

    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if values.ndim < 2 or values.shape[-1] % 256:
            return as_float32(name, values)
        block, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
        stored = generator.integers(0, 256, (len(values), values.shape[-1] // block, size), dtype=np.uint8)
        scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
        for place in scales:  # float16: random bits may be no number
            stored[..., place : place + 2] = np.full((*stored.shape[:2], 1), 2.0**-12, np.float16).view(np.uint8)
        return stored.reshape(len(values), -1), KIND[kind]

    FAMILIES["wide"] = ("llama", "Llama", {**FAMILIES["llama"][2], "hidden_size": 256, "num_hidden_layers": 1})
    try:
        model = random_model("wide")
        path = write_model(tmp_path / "m.gguf", "wide", model, pack)
    finally:
        del FAMILIES["wide"]
    loaded = imported(path)
    packed = {tensor.name: tensor for tensor in iter_packed(path)}
    assert sum(tensor.kind == kind for tensor in packed.values()) == 7  # q, k, v, gate, up, embedding, head
    for name, tensor in loaded.state_dict().items():
        values = gguf.quants.dequantize(packed[name].data, KIND[packed[name].kind]).reshape(packed[name].shape)
        values = values if packed[name].rows is None else values[packed[name].rows]
        np.testing.assert_array_equal(tensor.numpy(), values)
    assert torch.isfinite(logits(loaded)).all()


def test_q6_k_by_definition() -> None:
    """256 values in two halves of 128: four low bits, two high bits, an int8 scale for 16 values, one float16 scale."""
    generator = np.random.default_rng(1)
    low, high = generator.integers(0, 256, (2, 64), np.uint8), generator.integers(0, 256, (2, 32), np.uint8)
    scales, d = generator.integers(-128, 128, 16, np.int8), np.array([0.25], np.float16)
    stored = np.concatenate([low.reshape(-1), high.reshape(-1), scales.view(np.uint8), d.view(np.uint8)])
    expected = np.empty(256, np.float32)
    for half in range(2):
        for quarter in range(4):
            for j in range(32):
                byte = int(low[half, j + 32 * (quarter % 2)])
                bits = byte & 15 if quarter < 2 else byte >> 4
                q = bits | (int(high[half, j]) >> (2 * quarter) & 3) << 4
                index = 128 * half + 32 * quarter + j
                expected[index] = 0.25 * int(scales[index // 16]) * (q - 32)
    np.testing.assert_array_equal(gguf.quants.dequantize(stored, KIND.Q6_K), expected)


@pytest.mark.parametrize("case", ["llama", "gemma3", "phi3"])
def test_packed_tensors_are_views_that_give_the_same_values(case: str, tmp_path: Path) -> None:
    def pack(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        kind = KIND.F32 if values.ndim < 2 else KIND.Q8_0 if "attn" in name else KIND.BF16
        return gguf.quants.quantize(values, kind), kind

    path = write_model(tmp_path / "m.gguf", case, random_model(case), pack)
    gguf_import.convert(path, tmp_path / "out")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    seen = []
    for name, shape, kind, data, rows, offset in iter_packed(path):
        assert data.dtype == np.uint8 and not data.flags.owndata and data.shape[:-1] == shape[:-1]
        values = gguf.quants.dequantize(data, KIND[kind]).reshape(shape) + np.float32(offset)
        values = values if rows is None else values[rows]
        np.testing.assert_array_equal(values, expected[name].numpy())
        assert (rows is not None) == (case == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"))
        assert offset == (-1.0 if case == "gemma3" and name.endswith("norm.weight") else 0.0)
        seen.append(name)
    assert sorted(seen) == sorted(expected)
