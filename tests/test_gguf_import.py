"""GGUF import against values worked out by hand, against `transformers`, and against a real model's numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.gguf_fixtures import KIND, MERGES, TOKENS, llama_cpp_rows
from trainer.errors import ModelError
from trainer.models import gguf_import
from trainer.models.gguf_tensors import rotary_rows

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
SHAPE = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
MODULES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
MODULES |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
MODULES |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

# A tensor as the writer takes it: its bytes or numbers, and the kind when it is bytes.
Encoded = tuple[np.ndarray, gguf.GGMLQuantizationType | None]


def metadata() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 4) + [4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, Encoded]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if key == "general.architecture":
            writer.kv_data[0][key].value = value  # the writer puts it in by itself
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """model.layers.1.mlp.up_proj.weight -> blk.1.ffn_up.weight"""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return fixed[stem] + ".weight"
    _, _, layer, module = stem.split(".", 3)
    short = {long: short for short, long in MODULES.items()}[module]
    return f"blk.{layer}.{short}.weight"


def random_model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPE,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def float_tensors(model: LlamaForCausalLM) -> dict[str, Encoded]:
    """The model's weights as GGUF float32 tensors, q and k in llama.cpp's order."""
    heads = {"q_proj": 4, "k_proj": 2}
    out: dict[str, Encoded] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().copy()
        module = name.split(".")[-2]
        out[gguf_name(name)] = (llama_cpp_rows(values, heads[module]) if module in heads else values, None)
    return out


@pytest.fixture(scope="module")
def tensors() -> dict[str, Encoded]:
    return float_tensors(random_model(tied=False))


@pytest.fixture
def convert(tmp_path: Path, tensors: dict[str, Encoded]) -> Callable[..., Path]:
    """Write a GGUF with these changes and import it; returns the folder."""

    def run(
        changes: dict[str, Any] | None = None, replaced: dict[str, Encoded | None] | None = None, dtype: str = "float32"
    ) -> Path:
        fields = {key: value for key, value in (metadata() | (changes or {})).items() if value is not None}
        written = {name: value for name, value in (tensors | (replaced or {})).items() if value is not None}
        path = write_gguf(tmp_path / "model.gguf", fields, written)
        gguf_import.convert(path, tmp_path / "out", dtype=dtype)
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("tied", [True, False])
def test_same_logits_as_the_model_that_went_in(tied: bool, tmp_path: Path) -> None:
    model = random_model(tied=tied)
    gguf_import.convert(write_gguf(tmp_path / "m.gguf", metadata(), float_tensors(model)), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied
    ids = torch.arange(40)[None] * 6
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_config_says_what_the_metadata_said(convert: Callable[..., Path]) -> None:
    config = json.loads((convert() / "config.json").read_text(encoding="utf-8"))
    expected = SHAPE | {"head_dim": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    expected |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    expected |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in expected} == expected


def test_bf16_rounds_to_nearest(convert: Callable[..., Path], tensors: dict[str, Encoded]) -> None:
    folder = convert(dtype="bf16")
    found = load_torch_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == torch.bfloat16
    expected = torch.from_numpy(tensors["blk.0.ffn_up.weight"][0])
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def encode(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A (96, 64) tensor of this kind: what goes into the file, and its values by the format's definition."""
    if kind in (KIND.F32, KIND.F16):
        stored = rng.normal(size=(96, 64)).astype(np.float32 if kind == KIND.F32 else np.float16)
        return stored, stored.astype(np.float32)
    if kind == KIND.BF16:  # the upper half of a float32
        bits = rng.normal(size=(96, 64)).astype(np.float32).view(np.uint32) & 0xFFFF0000
        return (bits >> 16).astype(np.uint16).view(np.uint8), bits.view(np.float32)
    # Blocks of 32 values. Scales that float16 holds exactly, so that values are exact too.
    scale = rng.integers(1, 64, size=(96, 2, 1)).astype(np.float16) / np.float16(256)
    if kind == KIND.Q8_0:  # float16 d, 32 x int8 q: d q
        q = rng.integers(-128, 128, size=(96, 2, 32), dtype=np.int8)
        stored = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], axis=2)
        return stored.reshape(96, -1), (scale.astype(np.float32) * q).reshape(96, 64)
    # Q4_1: float16 d and m, 16 bytes whose low halves are values 0..15 and whose high halves are 16..31: d q + m
    minimum = rng.integers(-64, 64, size=(96, 2, 1)).astype(np.float16) / np.float16(8)
    q = rng.integers(0, 16, size=(96, 2, 32), dtype=np.uint8)
    stored = np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), q[..., :16] | q[..., 16:] << 4], axis=2)
    return stored.reshape(96, -1), (scale.astype(np.float32) * q + minimum.astype(np.float32)).reshape(96, 64)


@pytest.mark.parametrize("kind", [KIND.F32, KIND.F16, KIND.BF16, KIND.Q8_0, KIND.Q4_1], ids=lambda kind: kind.name)
def test_dequantised_by_definition(kind: gguf.GGMLQuantizationType, convert: Callable[..., Path]) -> None:
    stored, expected = encode(kind, np.random.default_rng(0))
    raw = None if kind in (KIND.F32, KIND.F16) else kind
    folder = convert(replaced={"blk.1.ffn_gate.weight": (stored, raw)})
    found = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (3, 8), (4, 2)])
def test_rotary_rows_go_back(heads: int, head_dim: int) -> None:
    weight = np.arange(heads * head_dim * 5, dtype=np.float32).reshape(heads * head_dim, 5)
    np.testing.assert_array_equal(llama_cpp_rows(weight, heads)[rotary_rows(len(weight), heads)], weight)


def test_tokenizer_of_each_pre(convert: Callable[..., Path], tmp_path: Path) -> None:
    text = "<|im_start|>the 12 <tool> the"
    digits = Tokenizer.from_file(str(convert() / "tokenizer.json"))
    assert digits.encode(text).tokens == ["<|im_start|>", "t", "he", "Ġ", "1", "2", "Ġ", "<tool>", "Ġthe"]
    assert digits.decode(digits.encode(text).ids, skip_special_tokens=False) == text
    assert digits.decode(digits.encode(text).ids, skip_special_tokens=True) == "the 12 <tool> the"

    (tmp_path / "out").rename(tmp_path / "first")
    whole = Tokenizer.from_file(str(convert({"tokenizer.ggml.pre": "gpt-2"}) / "tokenizer.json"))
    assert whole.encode("the 12").tokens == ["t", "he", "Ġ", "12"]


def test_bos_is_added_when_the_model_asks(convert: Callable[..., Path]) -> None:
    folder = convert({"tokenizer.ggml.add_bos_token": True})
    assert AutoTokenizer.from_pretrained(folder)("he")["input_ids"] == [1, TOKENS.index("he")]
    assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_folder_without_a_chat_template(convert: Callable[..., Path]) -> None:
    folder = convert({"tokenizer.chat_template": None})
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names


BAD_METADATA = [
    ({"general.architecture": "mamba"}, "architecture 'mamba' is not known; known: cohere2, command-r, gemma, .*qwen3"),
    ({"tokenizer.ggml.pre": "qwen9"}, "pre-tokenizer 'qwen9' is not known; known: codeshell, .*smollm"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer model 't5' is not known; known: gpt2"),
    ({"tokenizer.ggml.model": "llama"}, "no key 'tokenizer.ggml.scores'"),
    ({"llama.attention.sliding_window_pattern": 2}, "sliding windows by the pattern 2, a llama model has None"),
    ({"llama.attention.sliding_window": 64}, "key 'llama.attention.sliding_window' = 64 has no place in a llama model"),
    ({"llama.expert_count": 8}, "key 'llama.expert_count' = 8 has no place in a llama model"),
    ({"llama.attention.value_length": 8}, "keys have 16 dimensions a head, values 8; both must be the same"),
    ({"tokenizer.ggml.merges": ["qq zz"]}, "merges do not fit its vocabulary"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], TOKENS[0]]}, "tokens \\(\\d+ different\\)"),
    ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token has id 9999, outside the vocabulary"),
    ({"llama.block_count": None}, "no key 'llama.block_count'"),
    ({"llama.block_count": "two"}, "key 'llama.block_count' is a str, expected int"),
    ({"llama.block_count": 3}, "tensor 'blk.2.attn_norm.weight' is missing"),
    ({"llama.block_count": 1}, "tensor 'blk.1.attn_k.weight' has no place in a Llama model \\(9 such\\)"),
    ({"llama.attention.head_count": 0}, "head_count is 0"),
    ({"llama.feed_forward_length": 97}, "ffn_gate.weight' has shape \\(96, 64\\), the metadata ask for \\(97, 64\\)"),
    ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' lacks its factor"),
    ({"llama.rope.scaling.type": "su"}, "RoPE scaling 'su' is not supported; known: none, linear, yarn"),
    ({"llama.rope.dimension_count": 8}, "RoPE turns 8 of 16 dimensions"),
]


@pytest.mark.parametrize(
    ("changes", "message"), BAD_METADATA, ids=[str(next(iter(c.items()))) for c, _ in BAD_METADATA]
)
def test_what_cannot_be_carried_over(changes: dict, message: str, convert: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as error:
        convert(changes)
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_unsupported_quantisation_leaves_nothing(convert: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="tensor 'blk.1.ffn_up.weight' is quantised as I8, which cannot be dequantised"
    ):
        convert(replaced={"blk.1.ffn_up.weight": (np.zeros((96, 64), np.int8), None)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, tensors: dict[str, Encoded]) -> None:
    path = write_gguf(tmp_path / "whole.gguf", metadata(), tensors)
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 200, 7), *np.linspace(200, len(data) - 1, 40).astype(int).tolist()]:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match="cut.gguf: is a truncated or damaged GGUF .*; download it again") as error:
            gguf_import.convert(cut, tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"", "is not a GGUF file"), (b"PK\3\4 zip", "is not a GGUF file")],
)
def test_not_a_gguf(content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    assert gguf_import.main(["--gguf", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {message}") and error.count("\n") == 1


def test_an_existing_folder_is_kept(convert: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ModelError, match="out: exists already; delete it or name another folder"):
        convert()
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_a_folder_that_cannot_be_made(convert: Callable[..., Path], tmp_path: Path) -> None:
    convert()
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written: Not a directory"):
        gguf_import.convert(tmp_path / "model.gguf", tmp_path / "file" / "out")


def test_real_model_gives_the_published_numbers(smollm2_dir: Path) -> None:
    golden = np.load(GOLDEN / "smollm2_forward.npz")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [
        {"role": "user", "content": "What is the capital of France? Answer in one sentence."},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France? Answer in one sentence.<|im_end|>\n"
        "<|im_start|>assistant\nThe capital of France is Paris.<|im_end|>\n"
    )
    assert tokenizer(text)["input_ids"] == golden["ids"].tolist()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.num_parameters() == 134_515_008
    ids = torch.from_numpy(golden["ids"])
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    token_logps = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    # float32 through 30 layers: other machines sum in another order
    np.testing.assert_allclose(token_logps, golden["token_logps"], rtol=0, atol=1e-4)
    for name, layer in (("hidden_embed", 0), ("hidden_layer1", 1), ("hidden_final_normed", -1)):
        np.testing.assert_allclose(output.hidden_states[layer][0], golden[name], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(output.logits[0, -4:], golden["logits_last4"], rtol=0, atol=1e-3)


def test_real_tokenizer_gives_the_published_ids(smollm2_dir: Path, shared_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    lines = (shared_dir / "data" / "tokenizers" / "reference_ids.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "smollm2" in row["file"]]
    assert len(rows) == 20
    for row in rows:
        assert tokenizer.encode(row["text"], add_special_tokens=False).ids == row["ids"]
