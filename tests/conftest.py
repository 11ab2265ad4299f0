"""What all tests share: few threads, no cache outside the test's folders, and three places to find a model or data.

- `shared_dir`: published oracles and data sets that are not part of the repository; tests that need them are skipped
  where the folder is not there.
- `smollm2_dir`: SmolLM2-135M-Instruct, fetched and converted on first use (tests that need it are skipped offline).
- `tiny_model_dir`: a random Llama with a tokenizer of its own, made in milliseconds.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

# Before anything imports torch: results and timing must not depend on how many cores the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# As in the Makefile: threads that wait must not spin while others, or other processes, have work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests of Ctrl-C would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
SMOLLM2 = "SmolLM2-135M-Instruct"

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_VOCABULARY_TEXT = ["the answer of this question is that there are three of them and one more for each other"]


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shards and reference log-probs of tests stay out of the user's cache folder, also in processes tests start."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Oracles and data beside the checkout, or where LOGRATIO_SHARED says."""
    folder = Path(os.environ.get("LOGRATIO_SHARED", ROOT.parent / "shared"))
    if not (folder / "oracles").is_dir():
        pytest.skip("the shared oracles and data are not here (set LOGRATIO_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once by the two commands that `make train` uses."""
    folder = MODELS / SMOLLM2
    MODELS.mkdir(exist_ok=True)
    with open(MODELS / ".tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            fetched = _run_module("data_tools.fetch_model", "--out", str(MODELS))
            if fetched.returncode != 0:
                pytest.skip(f"{SMOLLM2} cannot be fetched: {fetched.stderr.strip().splitlines()[-1]}")
            gguf = MODELS / f"{SMOLLM2}.Q4_1.gguf"
            _run_module("trainer.models.gguf_import", "--gguf", str(gguf), "--out", str(folder)).check_returncode()
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama (hidden size 64, untied head) with a byte-level BPE tokenizer and a ChatML template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


def write_tiny_model(folder: Path) -> Path:
    """Fill an empty folder with the model of `tiny_model_dir`."""
    tokenizer = _tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    ids = {"bos_token_id": tokenizer.token_to_id("<|im_start|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>")}
    config = {**TINY_CONFIG, **ids, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_tiny_weights(config), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def _tiny_tokenizer() -> Tokenizer:
    """About 300 tokens: the special ones, all bytes, a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_VOCABULARY_TEXT * 2, trainer)
    return tokenizer


def _tiny_weights(config: dict) -> dict[str, np.ndarray]:
    """Weights large enough that log-probs differ between tokens; a generator of their own, no global seed."""
    generator = np.random.default_rng(0)
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query_width = config["num_attention_heads"] * config["head_dim"]
    key_width = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    norms = ["model.norm.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (query_width, width),
            f"{prefix}.self_attn.k_proj.weight": (key_width, width),
            f"{prefix}.self_attn.v_proj.weight": (key_width, width),
            f"{prefix}.self_attn.o_proj.weight": (width, query_width),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
        }
        norms += [f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]
    weights = {name: generator.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | {name: generator.uniform(0.5, 1.5, width).astype(np.float32) for name in norms}
